"""Time the README's two commands as a newcomer meets them: a fresh clone, empty caches, installation not counted.

    python benchmarks/commands.py [--only demo|tests]

The clone gets its own HOME, so nothing that this machine has cached is found; ../shared, where it is there, is beside
the clone as in a checkout, so the tests on real data run. The demo's figures stand in the same file.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/commands.json"


def command(words: list[str], clone: Path, home: Path) -> tuple[float, int, str]:
    """Seconds, exit code and output of one command in the clone."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "VIRTUAL_ENV", "HF_"))
    }
    begun = time.perf_counter()
    done = subprocess.run(
        words,
        cwd=clone,
        env=variables | {"HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return time.perf_counter() - begun, done.returncode, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["demo", "tests"], default=None)
    args = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    result["commit"] = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder) / "unpoison", Path(folder) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if (ROOT.parent / "shared").is_dir():
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        seconds, code, output = command(["make", ".venv/.installed", "browser"], clone, home)
        if code:
            raise SystemExit(output)
        result["install_seconds"] = seconds
        if args.only != "tests":
            seconds, code, output = command(["make", "demo"], clone, home)
            runs = sorted((clone / "unpoison-runs").glob("demo*/run.json"))
            result["demo"] = {"seconds": seconds, "exit": code, "output": output.splitlines()[-40:], "runs": len(runs)}
        if args.only != "demo":
            seconds, code, output = command(["make", "test"], clone, home)
            counts = Counter[str]()  # over both suites: open_clip has one of its own
            for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output):
                counts[kind] += int(number)
            failures = re.findall(r"^FAILED .*$", output, re.MULTILINE)
            result["tests"] = {"seconds": seconds, "exit": code, "counts": counts, "failures": failures}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
