"""Steps that several cells need: made once, found again by a hash of all that they depend on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from unpoison.benchmark.cell import VERSION, digest
from unpoison.results import write_atomically
from unpoison.runs import RunFolder

_COST = "cost.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A finished shared step: its folder, its name, and the seconds that it took when it was made; ``resumed``: those
    of the rest alone, after an interruption."""

    path: Path
    key: str
    seconds: float
    resumed: bool


def shared(folder: Path, kind: str, inputs: Mapping[str, Any], make: Callable[[RunFolder], None]) -> Step:
    """``folder``/KIND-HASH with what ``make`` wrote there, now or in an earlier cell.

    Another process that needs the same step waits for the one that makes it; one that was killed is gone on with.
    """
    wanted = {"benchmark": VERSION, "step": kind, **inputs}
    key = digest(wanted)
    place = folder / f"{kind}-{key}"
    if not (place / _COST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{kind}-{key}.lock"):
            if not (place / _COST).exists():
                _make(place, wanted, make)
    cost = json.loads((place / _COST).read_bytes())
    return Step(path=place, key=key, seconds=cost["seconds"], resumed=cost.get("resumed", False))


def _make(place: Path, inputs: Mapping[str, Any], make: Callable[[RunFolder], None]) -> None:
    resumed = place.exists()
    run = RunFolder.open(place, inputs)
    began = time.monotonic()
    make(run)
    for file in (place / "steps").glob("*.safetensors"):  # large, and no longer needed
        file.unlink()
    write_atomically(place / _COST, json.dumps({"seconds": time.monotonic() - began, "resumed": resumed}).encode())
