"""Steps that several cells need: made once, found again by a hash of all that they depend on."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout

from unpoison.benchmark.cell import VERSION, Cell, digest
from unpoison.errors import ConfigError
from unpoison.results import write_atomically
from unpoison.runs import Progress, Run, RunFolder

_COST = "cost.json"
_POLL, _FRESH = 1.0, 10.0


class Stopwatch:
    """Seconds since it was made, by the clock and of the processor (all threads of this process)."""

    def __init__(self) -> None:
        self._began, self._used = time.monotonic(), _processor_seconds()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def processor(self) -> float:
        return _processor_seconds() - self._used


@dataclass(frozen=True, kw_only=True)
class Step:
    """A finished shared step: its folder, its name, and the seconds that it took when it was made, by the clock and of
    the processor (None: not measured); ``resumed``: those of the rest alone, after an interruption."""

    path: Path
    key: str
    seconds: float
    processor: float | None
    resumed: bool


def run_of(cell: Cell, folder: Path | None, progress: Progress) -> Run:
    """The run that a cell's steps get, in the grid's precision whatever the environment says. Raises ConfigError."""
    if AcceleratorState._shared_state.get("_mixed_precision") not in (None, cell.precision):
        AcceleratorState._reset_state()  # it would hold the first precision of the process
    try:
        accelerator = Accelerator(mixed_precision=cell.precision)
    except ValueError as error:
        raise ConfigError(
            f"precision {cell.precision!r} cannot be had here: {error}.",
            hint="fp16 is for GPUs; elsewhere take bf16.",
        ) from error
    cache = None if folder is None else folder / "cache"
    return Run(accelerator=accelerator, seed=cell.names.seed, progress=progress, cache=cache)


def shared(folder: Path, kind: str, inputs: Mapping[str, Any], make: Callable[[RunFolder], None]) -> Step:
    """``folder``/KIND-HASH with what ``make`` wrote there, now or in an earlier cell.

    Another process that needs the same step waits for the one that makes it; one that was killed is gone on with.
    """
    wanted = {"benchmark": VERSION, "step": kind, **inputs}
    key = digest(wanted)
    place = folder / f"{kind}-{key}"
    if not (place / _COST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with alone(FileLock(folder / f"{kind}-{key}.lock"), folder):
            if not (place / _COST).exists():
                _make(place, wanted, make)
    cost = json.loads((place / _COST).read_bytes())
    return Step(
        path=place, key=key, seconds=cost["seconds"], processor=cost.get("processor"),
        resumed=cost.get("resumed", False),
    )  # fmt: skip


@contextmanager
def alone(lock: FileLock, folder: Path) -> Iterator[None]:
    """The lock, waited for as long as it takes; a note says so meanwhile, see :func:`is_waiting`."""
    note = _note(folder, os.getpid())
    try:
        while True:
            try:
                lock.acquire(timeout=_POLL)
                break
            except Timeout:
                note.touch()
    finally:
        note.unlink(missing_ok=True)
    try:
        yield
    finally:
        lock.release()


def is_waiting(folder: Path, process: int) -> bool:
    """Whether a process waits in ``folder`` for a step that another one makes: that is no time of its cell."""
    try:
        return time.time() - _note(folder, process).stat().st_mtime < _FRESH
    except OSError:
        return False


def _note(folder: Path, process: int) -> Path:
    return folder / f"waiting-{process}"


def _make(place: Path, inputs: Mapping[str, Any], make: Callable[[RunFolder], None]) -> None:
    resumed = place.exists()
    run = RunFolder.open(place, inputs)
    watch = Stopwatch()
    make(run)
    for file in (place / "steps").glob("*.safetensors"):  # large, and no longer needed
        file.unlink()
    cost = {"seconds": watch.seconds, "processor": watch.processor, "resumed": resumed}
    write_atomically(place / _COST, json.dumps(cost).encode())


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
