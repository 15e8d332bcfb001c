"""Runs the cells of a grid that are not done: each victim first, then its repairs; every failure is a result.

Any number of runners may share a folder: each cell belongs to the one that holds its lease.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from unpoison.benchmark.cell import DAMAGED, ITS_VICTIM, Cell, CellResult, Names
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.store import Store
from unpoison.errors import UsageError
from unpoison.runs import Progress, Silent

_WAIT = 2.0
Execute = Callable[[Cell, Path], CellResult]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How many cells the grid has of each status, and how many of them ran now."""

    cells: int
    ran: int
    status: dict[str, int]

    @property
    def failed(self) -> int:
        return self.cells - self.status.get("done", 0)


def run_grid(
    grid: Grid,
    store: Store,
    *,
    execute: Execute,
    only: Sequence[str] = (),
    retry: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Run every cell of ``grid`` that ``store`` has no result of; ``only``: these (and their victims), by their hashes.

    ``execute`` computes one cell and raises nothing. ``retry``: cells that failed before run again. A result that
    cannot be read is none: its file is set aside.
    """
    progress = progress or Silent()
    wanted = select_cells(grid, only)
    store.keep_plan(grid)
    pending = Pending.of(wanted, store, retry=retry)
    ran, total = 0, len(pending.cells)
    while pending.cells:
        moved = False
        for key, cell in list(pending.cells.items()):
            if pending.is_settled(key, store):
                pending.remove(key)  # another runner was faster
                moved = True
                continue
            if pending.waits(key):
                continue
            with store.lease(key) as ours:
                if not ours:
                    continue
                store.refresh(key)
                if not pending.is_settled(key, store):
                    progress.log(f"[{total - len(pending.cells) + 1}/{total}] {key} {cell.names}")
                    make_room(cell, store, progress)
                    result = finish(unfit(cell, store) or execute(cell, store.path), cell, grid, store)
                    store.save(result)
                    ran += 1
                    progress.log(f"  {describe(result)}")
                pending.remove(key)
                moved = True
        if pending.cells and not moved:
            time.sleep(_WAIT)
    return summary(wanted, store, ran)


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What is left to run, by key. ``stamps``: of the results that were there when this runner began, which a retry
    replaces; ``victims``: the key of each cell's victim."""

    cells: dict[str, Cell]
    stamps: dict[str, tuple[int, int] | None]
    victims: dict[str, str]

    @classmethod
    def of(cls, cells: Sequence[Cell], store: Store, *, retry: bool) -> Pending:
        before = {cell.key: store.stamp(cell.key) for cell in cells}  # first: what is saved while they are read is new
        left = to_run(cells, store, retry=retry)
        return cls(
            cells={cell.key: cell for cell in left},
            stamps={cell.key: before[cell.key] for cell in left},
            victims={cell.key: cell.given().key for cell in left},
        )

    def is_settled(self, key: str, store: Store) -> bool:
        """Whether another runner has saved a result since this one began; one that was set aside is none."""
        return store.stamp(key) not in (None, self.stamps[key])

    def waits(self, key: str) -> bool:
        """Whether the cell's victim comes first."""
        return self.victims[key] != key and self.victims[key] in self.cells

    def remove(self, key: str) -> None:
        del self.cells[key]


def select_cells(grid: Grid, only: Sequence[str]) -> list[Cell]:
    """The grid's cells, or those whose hash begins with one of ``only``, each with its victim. Raises UsageError."""
    if not only:
        return list(grid.cells)
    chosen: dict[str, Cell] = {}
    for name in only:
        found = [cell for cell in grid.cells if cell.key.startswith(name.lower())]
        if not found or not name:
            raise UsageError(
                f"{grid.path} has no cell {name!r}.",
                hint="`unpoison bench status` lists them; a cell's hash changes with its inputs.",
            )
        for cell in found:
            chosen |= {one.key: one for one in (cell.given(), cell)}
    return list(chosen.values())


def to_run(cells: Sequence[Cell], store: Store, *, retry: bool) -> list[Cell]:
    """Cells without a result that can be read; with ``retry`` those that failed too, and what was refused because its
    victim failed."""
    return [cell for cell in cells if is_left(cell.key, cell.names, store, retry=retry)]


def is_left(key: str, names: Names, store: Store, *, retry: bool = False) -> bool:
    """Whether the next run makes the cell, again where it was made before."""
    found = store.found(key, names)
    return found is None or found.status == DAMAGED or (retry and found.status != "done")


def make_room(cell: Cell, store: Store, progress: Progress) -> None:
    """Set a result aside that cannot be read, before the cell runs again."""
    found = store.found(cell.key, cell.names)
    if found is not None and found.status == DAMAGED:
        progress.log(f"  {found.reason} It is kept as {store.set_aside(cell.key).name}.")


def unfit(cell: Cell, store: Store) -> CellResult | None:
    """The result of a repair whose victim cannot be used."""
    victim = None if cell.is_given else store.found(cell.given().key, cell.given().names)
    if victim is None or victim.status in ("done", DAMAGED):
        return None
    result = failed(cell, "refused", f"{ITS_VICTIM}{victim.status}: {victim.reason}", victim.hint)
    return replace(result, before=victim.before)


def finish(result: CellResult, cell: Cell, grid: Grid, store: Store) -> CellResult:
    """The result with the command that makes it again, and when it was made."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(result, command=store.command(grid.path, cell.key), finished=now)


def summary(cells: Sequence[Cell], store: Store, ran: int) -> Summary:
    results = (store.found(cell.key, cell.names) for cell in cells)
    found = Counter(result.status for result in results if result is not None)
    return Summary(cells=len(cells), ran=ran, status=dict(found))


def describe(result: CellResult) -> str:
    """One line for the log."""
    if result.status != "done" or result.after is None:
        return f"{result.status}: {result.reason}"
    after = result.after
    shown = [f"C-Acc {after.c_acc.value:.1f}"]
    if after.asr is not None and after.asr_excess is not None and after.ra is not None:
        shown += [f"ASR {after.asr.value:.1f}", f"excess {after.asr_excess:.1f}", f"RA {after.ra.value:.1f}"]
    return "  ".join([*shown, f"{result.cost.wall:.1f} s"])
