"""The process that computes cells, one after another, so that a crash or a hang costs one cell and not the grid.

    python -m unpoison.benchmark.worker

One line of stdin is a cell, one line of the first stdout its result; whatever libraries print goes to stderr. The
process ends with its stdin: it never outlives the one that started it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_SAY_EVERY = 30.0


class Lines:
    """Progress as a line now and then on stderr."""

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[T]:
        said, done = time.monotonic(), 0
        for item in items:
            yield item
            done += weight
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                self.log(f"{what}: {done:,} of {total or 0:,} {unit}")

    def log(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()

    from unpoison.benchmark.compute import try_cell
    from unpoison.benchmark.outcomes import code
    from unpoison.benchmark.store import read_message
    from unpoison.storage import to_json

    code()  # what was imported, before it is changed under a long run
    while True:
        cell, folder, _ = read_message(lines.get())  # started where its paths start
        Lines().log(f"{cell.key}: {cell.names}")
        result = try_cell(cell, folder, progress=Lines())
        answers.write(to_json(result) + b"\n")
        answers.flush()


def _listen(lines: queue.Queue[bytes]) -> None:
    """Cells as they come; the end of stdin is the end of the process, in the middle of a cell too."""
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
