"""The CLIPs of grids/cpu.toml, with the pairs that they were trained on and what is measured on them.

unpoison bench run grids/cpu.toml -o runs/bench-cpu       # makes them
"""

from collections.abc import Sequence
from pathlib import Path

from unpoison.benchmark.clip_cells import Setting, open_setting, victim_of
from unpoison.benchmark.grid import Grid, read_grid
from unpoison.benchmark.settings import CLEAN, GIVEN
from unpoison.benchmark.store import Store
from unpoison.runs import Progress

ROOT = Path(__file__).parents[1]
GRID = ROOT / "grids/cpu.toml"
FOLDER = ROOT / "runs/bench-cpu"
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


def open_grid() -> Grid:
    return read_grid(GRID)


def find_setting(grid: Grid, folder: Path, attack: str, seed: int, progress: Progress) -> Setting | None:
    """The pairs, the attack and the test data of the victim of this name; None where the grid has not made it, or
    refused it. Its model lies at :func:`unpoison.benchmark.clip_cells.victim_of`."""
    store = Store.read(folder)
    for cell in grid.cells:
        if (cell.model.kind, cell.names.attack, cell.names.seed, cell.names.method) == ("clip", attack, seed, GIVEN):
            done = store.has(cell.key) and store.load(cell.key).status == "done"
            return open_setting(cell, folder, progress) if done else None
    return None


def poisoned_ids(setting: Setting) -> Sequence[str]:
    return () if setting.poisoning is None else setting.poisoning.ids


__all__ = ["ATTACKS", "FOLDER", "find_setting", "open_grid", "poisoned_ids", "victim_of"]
