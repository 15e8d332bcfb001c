"""Write what `unpoison --help` prints into the README's help block.

python tools/readme.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- help -->\n```\n).*?(```\n<!-- /help -->)", re.DOTALL)


def help_text() -> str:
    """The root help as a terminal of 80 columns shows it."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "unpoison", "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def main() -> None:
    text = help_text()
    README.write_text(BLOCK.sub(lambda match: match[1] + text + match[2], README.read_text()))


if __name__ == "__main__":
    main()
