"""What the benchmarks of UBT and CBPT share: the grid's precision, and whether a kept cell is the one asked for.

A file that was made with other settings, of another victim or in another precision is made again, and that is said.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from unpoison.runs import Progress, Run, Silent

PRECISION = "bf16"
"""Of grids/cpu.toml."""


def new_run(seed: int, *, progress: Progress | None = None, **more: Any) -> Run:
    """A run in the grid's precision, whatever the environment says."""
    return Run(accelerator=Accelerator(mixed_precision=PRECISION), seed=seed, progress=progress or Silent(), **more)


def inputs_of(config: Any, **more: Any) -> dict[str, Any]:
    """What a cell is made from, as JSON has it: the method's settings, precision, threads, and ``more``."""
    found = {"config": asdict(config), "precision": PRECISION, "threads": torch.get_num_threads(), **more}
    return json.loads(json.dumps(found, default=str))


def is_done(file: Path, inputs: dict[str, Any]) -> bool:
    """Whether ``file`` holds the cell of these ``inputs``."""
    if not file.exists():
        return False
    there = json.loads(file.read_bytes()).get("inputs", {})
    others = [name for name in sorted(there.keys() | inputs.keys()) if there.get(name) != inputs.get(name)]
    if others:
        print(f"{file.stem}: kept with other {', '.join(others)}, made again", flush=True)
    return not others
