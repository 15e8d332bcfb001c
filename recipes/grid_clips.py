"""The backdoored CLIPs that ``unpoison bench run grids/cpu.toml`` made, for recipes and benchmarks that need some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.parts import PoisoningParts
from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.clip_cells import Setting, open_setting, victim_of
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.settings import CLEAN
from unpoison.benchmark.store import Store
from unpoison.errors import UsageError
from unpoison.runs import Progress, Silent

GRID, BENCH = Path("grids/cpu.toml"), Path("runs/bench-cpu")
ATTACKS = (
    "badnet-rand",
    "badnet-stripes",
    "blended-rand",
    "sig-clip",
    "wanet-strong",
    "blended-text",
    "badclip",
    CLEAN,
)
"""The seven of UBT's and CBPT's tables, and the control."""


@dataclass(frozen=True, kw_only=True)
class GridClip:
    """A cell of a CLIP before any defense, its figures, its model's folder, the pairs that it was trained on and
    what is measured on it."""

    result: CellResult
    model: Path
    setting: Setting

    @property
    def cell(self) -> Cell:
        return self.setting.cell

    @property
    def poisoning(self) -> PairPoisoning | PoisoningParts | None:
        """None: clean."""
        return self.setting.poisoning

    @property
    def poisoned(self) -> Sequence[str]:
        """The ids of the poisoned pairs."""
        return () if self.poisoning is None else self.poisoning.ids


def cell_of(grid: Grid, attack: str, seed: int) -> Cell:
    """The cell of the CLIP that was attacked so, as it is given. Raises UsageError where there is none."""
    for cell in grid.cells:
        if cell.model.kind == "clip" and cell.is_given and (cell.names.attack, cell.names.seed) == (attack, seed):
            return cell
    raise UsageError(f"{grid.path} has no CLIP under {attack} with seed {seed}.", hint="Add a block for it.")


def find_clip(grid: Grid, bench: Path, attack: str, seed: int, progress: Progress | None = None) -> GridClip:
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
    setting = open_setting(cell, bench, progress or Silent())
    return GridClip(result=result, model=victim_of(setting).resolve(), setting=setting)
