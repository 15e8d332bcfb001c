"""The backdoored CLIPs that ``unpoison bench run grids/cpu.toml`` made, for the recipes that need some."""

from dataclasses import dataclass
from pathlib import Path

from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.parts import PoisoningParts
from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.clip_cells import open_setting, victim_of
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.store import Store
from unpoison.errors import UsageError
from unpoison.runs import Silent

GRID, BENCH = Path("grids/cpu.toml"), Path("runs/bench-cpu")


@dataclass(frozen=True, kw_only=True)
class GridClip:
    """A cell of a CLIP before any defense, its figures, its model's folder, and the poisoning (None: clean)."""

    cell: Cell
    result: CellResult
    model: Path
    poisoning: PairPoisoning | PoisoningParts | None


def cell_of(grid: Grid, attack: str, seed: int) -> Cell:
    """The cell of the CLIP that was attacked so, as it is given."""
    return next(
        cell
        for cell in grid.cells
        if cell.model.kind == "clip" and cell.is_given and (cell.names.attack, cell.names.seed) == (attack, seed)
    )


def find_clip(grid: Grid, bench: Path, attack: str, seed: int) -> GridClip:
    """Raises UsageError where the cell has not run, or was refused."""
    cell = cell_of(grid, attack, seed)
    store = Store.read(bench)
    if not store.has(cell.key):
        raise UsageError(
            f"the cell {cell.key} of {grid.path} has not run in {bench}.",
            hint=f"unpoison bench run {grid.path} -o {bench} --cell {cell.key}",
        )
    result = store.load(cell.key)
    if result.status != "done":  # a victim that is too weak has figures too
        raise UsageError(f"the cell {cell.key} was {result.status}: {result.reason}", hint="Go on without it.")
    setting = open_setting(cell, bench, Silent())
    return GridClip(cell=cell, result=result, model=victim_of(setting).resolve(), poisoning=setting.poisoning)
