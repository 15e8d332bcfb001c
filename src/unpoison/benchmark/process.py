"""The other side of :mod:`unpoison.benchmark.worker`: one worker process, watched for time and memory."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import psutil

from unpoison.benchmark.cell import Cell, CellResult, Status
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.shared import is_waiting
from unpoison.benchmark.store import cell_message
from unpoison.errors import ResultError
from unpoison.storage import from_json

_POLL, _TAIL = 0.2, 400
_NEARLY = 0.75
COMMAND = (sys.executable, "-m", "unpoison.benchmark.worker")


class Worker:
    """Computes cells in a process of its own; a new one is started after a crash, a hang or too much memory.

    ``start``: the folder that relative paths of cells start from, this process's own unless given.
    """

    def __init__(self, logs: Path, *, start: Path | None = None, command: Sequence[str] = COMMAND) -> None:
        self._logs, self._start = logs, start
        self._command = tuple(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._log = logs / "none"

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __call__(self, cell: Cell, folder: Path) -> CellResult:
        """The cell's result, whatever happens to the process."""
        began = time.monotonic()
        process = self._running(cell.limits.threads)
        before = self._log.stat().st_size
        try:
            if process.stdin is None:
                raise RuntimeError("the worker has no stdin")
            process.stdin.write(cell_message(cell, folder) + b"\n")
            process.stdin.flush()
        except OSError:
            pass  # it died already; the watch below says how
        memory, answer, status, reason = self._watch(process, cell, folder / "shared")
        if answer is not None:
            try:
                result = from_json(answer, CellResult, name=f"cell {cell.key}")
            except ResultError as error:
                self.stop()
                result = failed(cell, "crashed", f"Its answer cannot be read: {error.message}")
        else:
            self.stop()
            tail = self._log.read_bytes()[before:].decode(errors="replace")[-_TAIL:].strip()
            result = failed(cell, status, reason, f"Its last words, in {self._log.name}: {tail}" if tail else "")
        wall = time.monotonic() - began
        return replace(result, cost=replace(result.cost, wall=wall, memory=memory / 2**20))

    def _watch(
        self, process: subprocess.Popen[bytes], cell: Cell, shared: Path
    ) -> tuple[int, bytes | None, Status, str]:
        """(most resident bytes, its answer or None, what happened, in words). Waiting for a step that another runner
        makes in ``shared`` is not counted."""
        limits, most, spent, seen = cell.limits, 0, 0.0, time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return most, self._answers.get(timeout=_POLL), "done", ""
            most = max(most, resident(process.pid))
            if process.poll() is not None:
                with contextlib.suppress(queue.Empty):
                    return most, self._answers.get(timeout=_POLL), "done", ""
                status = "out of memory" if _starved(process.returncode, most, limits.memory) else "crashed"
                return most, None, status, _ended(process.returncode)
            if most > limits.memory * 2**20:
                return most, None, "out of memory", f"It took more than {limits.memory:,} MiB and was stopped."
            now = time.monotonic()
            spent += 0.0 if is_waiting(shared, process.pid) else now - seen
            seen = now
            if spent > limits.seconds:
                return most, None, "timed out", f"It took more than {limits.seconds:g} s and was stopped."

    def _running(self, threads: int) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._answers = queue.Queue()
            self._logs.mkdir(parents=True, exist_ok=True)
            self._log = self._logs / f"worker-{os.getpid()}-{time.time_ns():x}.log"
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603 - our own module
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                    start_new_session=True, cwd=self._start,
                )  # fmt: skip
            threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()
        return self._process

    def stop(self) -> None:
        """End the process and its children, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def resident(process: int) -> int:
    """Resident bytes of a process and its children; 0 where it is gone."""
    try:
        parent = psutil.Process(process)
        return sum(_resident(entry) for entry in (parent, *parent.children(recursive=True)))
    except psutil.Error:
        return 0


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _read(process: subprocess.Popen[bytes], answers: queue.Queue[bytes]) -> None:
    if process.stdout is not None:
        with contextlib.suppress(ValueError, OSError):
            for line in process.stdout:
                answers.put(line)


def _starved(code: int, most: int, limit: int) -> bool:
    """Whether a process that the system killed had taken nearly all that it, or the machine, may: the kernel does that
    between two looks at it."""
    return code == -signal.SIGKILL and most > _NEARLY * min(limit * 2**20, psutil.virtual_memory().total)


def _ended(code: int) -> str:
    if code >= 0:
        return f"Its process ended with code {code}."
    name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
    more = " The system does this when memory runs out." if -code == signal.SIGKILL else ""
    return f"Its process was ended by signal {name}.{more}"
