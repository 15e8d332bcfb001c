"""A cell's figures: the victim, made or found, the method on it, and the rates before and after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from unpoison.benchmark.cell import Cell, CellResult, Figures
from unpoison.benchmark.classifier_cells import classifier_cell
from unpoison.benchmark.clip_cells import clip_cell
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.shared import Stopwatch
from unpoison.errors import UnpoisonError
from unpoison.runs import Progress, Silent

_REFUSED = "refused"
_CPU_ALLOCATOR = "DefaultCPUAllocator: "  # torch has an error of its own for GPUs only


def compute_cell(cell: Cell, folder: Path, *, progress: Progress | None = None) -> CellResult:
    """The cell, with everything that can be kept or shared in ``folder``. Raises what its steps raise."""
    torch.set_num_threads(cell.limits.threads)
    watch = Stopwatch()
    resumed = (folder / "work" / cell.key).exists()
    make = clip_cell if cell.model.kind == "clip" else classifier_cell
    result = make(cell, folder, progress or Silent())
    if cell.is_given and result.before is not None and too_weak(result.before, cell.least_asr):
        asr = result.before.asr.value if result.before.asr else 0.0
        result = replace(
            result, status=_REFUSED, reason=f"The victim's ASR is {asr:.2f} %, under {cell.least_asr:g} %.",
            hint="Train it longer, raise the rate, or lower least_asr: its repairs say little.",
        )  # fmt: skip
    cost = replace(
        result.cost, wall=watch.seconds, cpu=watch.processor, threads=torch.get_num_threads(),
        resumed=resumed or result.cost.resumed,
    )  # fmt: skip
    return replace(result, cost=cost)


def try_cell(cell: Cell, folder: Path, *, progress: Progress | None = None) -> CellResult:
    """:func:`compute_cell`, with every failure as the cell's value: nothing is raised."""
    try:
        return compute_cell(cell, folder, progress=progress)
    except UnpoisonError as error:
        return failed(cell, "refused", error.message, error.hint)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return failed(cell, "out of memory", str(error) or "no memory was left.")
    except Exception as error:
        if isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error):
            return failed(cell, "out of memory", str(error))
        return failed(cell, "crashed", f"{type(error).__name__}: {error}")


def too_weak(before: Figures, least: float) -> bool:
    """Whether an attacked victim hardly has a backdoor."""
    return before.asr is not None and before.asr.value < least
