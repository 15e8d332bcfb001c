"""Check that every claim still stands in its result file, and render the ledger as the table of docs/claims.md.

    python tools/claims.py            # check, then write docs/claims.md
    python tools/claims.py --check    # check only, and that docs/claims.md is up to date

A claim's ``result`` is "FILE#path.to.value" below the repository's root; ``value`` must equal what stands there.
"""

import json
import operator
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEDGER, PAGE = ROOT / "benchmarks/claims.json", ROOT / "docs/claims.md"
FIELDS = ("id", "value", "unit", "target", "met", "n", "seeds", "command", "result", "machine", "date")
COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


def problems(claim: dict) -> list[str]:
    name = claim.get("id", "a claim without id")
    missing = [field for field in FIELDS if field not in claim]
    if missing:
        return [f"{name}: without {', '.join(missing)}"]
    found = []
    file, _, path = claim["result"].partition("#")
    if not (ROOT / file).is_file():
        return [f"{name}: {file} is not there"]
    value = json.loads((ROOT / file).read_text())
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value.get(key)
    if value is None or abs(value - claim["value"]) > 0.005 * max(1.0, abs(claim["value"])):
        found.append(f"{name}: {claim['value']} is claimed, {value} stands in {claim['result']}")
    sign, bound = claim["target"].split()
    if COMPARE[sign](claim["value"], float(bound)) != claim["met"]:
        found.append(f"{name}: {claim['value']} against {claim['target']} is not met={claim['met']}")
    return found


def page(claims: list[dict]) -> str:
    lines = [
        "# Claims",
        "",
        "Every figure that README and docs state, from `benchmarks/claims.json`; `make claims` writes this page.",
        "",
        "| id | value | target | met | n | seeds | command | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in claims:
        met = "yes" if claim["met"] else "**no**"
        lines.append(
            f"| `{claim['id']}` | {claim['value']:g} {claim['unit']} | {claim['target']} | {met} | {claim['n']} "
            f"| {claim['seeds']} | `{claim['command']}` | `{claim['result'].partition('#')[0]}` |"
        )
    machines = sorted({f"{claim['machine']} ({claim['date']})" for claim in claims})
    return "\n".join([*lines, "", "Measured on: " + "; ".join(machines) + ".", ""])


def main() -> int:
    claims = json.loads(LEDGER.read_text())
    found = [problem for claim in claims for problem in problems(claim)]
    text = page(claims)
    if "--check" not in sys.argv:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        found.append("docs/claims.md is not what the ledger says: run make claims")
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(claims)} claims, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
