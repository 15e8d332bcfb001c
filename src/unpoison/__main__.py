"""``python -m unpoison``."""

import sys

from unpoison.cli import main

if __name__ == "__main__":
    sys.exit(main())
