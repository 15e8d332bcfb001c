"""Lay this environment over another one: its packages are found here, nothing is installed there.

    .venv-open-clip/bin/python tools/layer.py .venv

open_clip's tests need torchvision, which the main environment must not have, and otherwise the same packages.
"""

import sys
import sysconfig
from pathlib import Path


def main() -> None:
    variables = {"base": str(Path(sys.argv[1]).absolute()), "platbase": str(Path(sys.argv[1]).absolute())}
    below = sysconfig.get_path("purelib", "venv", vars=variables)
    if not (Path(below) / "torch").is_dir():
        raise SystemExit(f"{below} has no torch: make {sys.argv[1]} first, with the same version of Python.")
    # addsitedir, not a bare path: the files that make editable installs work are read as well
    layer = Path(sysconfig.get_path("purelib")) / "layer.pth"
    layer.write_text(f"import site; site.addsitedir({below!r})\n")


if __name__ == "__main__":
    main()
