"""What a grid would take: what is done, which lines are measured, over how many pairs a repair is planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unpoison.benchmark import estimate as module
from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.estimate import estimate, guess, probe_model
from unpoison.benchmark.grid import Grid, make_grid
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.runner import run_grid
from unpoison.benchmark.store import Store
from unpoison.defenses.ubt import UBTConfig

Execute = Callable[[Cell, Path], CellResult]


def test_what_failed_is_not_done_and_each_line_says_where_it_is_from(
    grid: Grid, made_up: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(cell: Cell, folder: Path) -> CellResult:
        if cell.is_given and cell.attack is not None and cell.names.seed == 0:
            return failed(cell, "refused", "planted")
        return made_up(cell, folder)

    monkeypatch.setattr(module, "probe_model", lambda cell: None)
    monkeypatch.setattr(module, "guess", lambda cell, known: 7.0)
    assert estimate(grid.cells, None).basis == "from a few probed batches"
    store = Store.open(tmp_path / "out")
    some = [cell.key for cell in grid.cells if cell.names.method != "cgd" and cell.names.seed == 0]
    run_grid(grid, store, execute=execute, only=some)
    found = estimate(grid.cells, store)
    assert (found.cells, found.done, found.failed) == (12, 2, {"refused": 2})
    lines = {part.what.rpartition(" ")[2]: (part.cells, part.seconds, part.measured) for part in found.parts}
    assert lines == {"victim": (2, 6.0, True), "ft": (2, 4.0, True), "cgd": (4, 7.0, False)}
    assert found.basis == "4 of 8 cells from like ones that ran before, the others from a few probed batches"
    again = estimate(grid.cells, store, retry=True)
    assert (again.done, again.failed, sum(part.cells for part in again.parts)) == (2, {}, 10)
    run_grid(grid, store, execute=made_up, retry=True)
    found = estimate(grid.cells, store)
    assert (found.done, found.failed, found.parts, found.basis) == (12, {}, (), "from cells that ran before")


def test_repairs_of_clips_are_planned_over_the_pairs_that_they_get(
    tables: dict[str, Any], small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables["data"]["shapes"] |= {"captioned": "shapes:300:2", "clean_captioned": "shapes:250:3", "later": "shapes:30:4"}
    tables["model"] = {"tiny": {"kind": "clip", "model": str(small_folder), "victim": {"steps": 4, "batch": 16}}}
    tables["cells"][0] |= {"model": ["tiny"], "method": ["par", "ubt"], "attack": ["badnet"], "seed": [0]}
    del tables["reported"]
    asked = []

    def plan(clip: Any, pairs: Any, config: Any, *, run: Any, tested: int, reference: Any = None) -> Any:
        asked.append((len(pairs), config.batch_size, isinstance(config, UBTConfig), reference is not None))
        return SimpleNamespace(seconds=float(len(pairs)))

    monkeypatch.setattr(module, "plan_clip_training", plan)
    cells = make_grid(tables, name="g", path="g.toml").cells
    known = probe_model(cells[0])
    assert [found[0] for found in asked] == [30]
    seconds = {cell.names.method: guess(cell, known) for cell in cells}
    assert seconds == {"none": 500.0, "par": 250.0 + 30.0, "ubt": 500.0 + 30.0}
    assert asked[1][:2] == (500, 16)
    assert [found[2:] for found in asked[1:]] == [(False, False), (False, False), (True, True)]
