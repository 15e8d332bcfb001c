"""The figures that benchmarks/grid.py claims, on made-up cells."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.runner import run_grid
from unpoison.benchmark.store import Store

Execute = Callable[[Cell, Path], CellResult]


@pytest.fixture(scope="module")
def kept() -> ModuleType:
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("grid")
    finally:
        sys.path.remove(folder)


def test_means_extremes_and_ratios(kept: ModuleType, grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    run_grid(grid, store, execute=made_up)
    cells = kept.Cells.of(tmp_path)
    assert (len(cells.all), cells.failed, cells.planned) == (len(grid.cells), 0, len(grid.cells))
    found = cells.figure("ft", ["badnet"], kept.excess)
    assert (found["mean"], found["max"], found["max_at"], found["min_at"]) == (1.5, 2.0, "badnet-1", "badnet-0")
    assert (found["cells"], found["seeds"]) == (2, 2)
    assert cells.figure("ft", ["clean"], kept.excess) == {"cells": 0}
    assert cells.figure("ft", ["badnet"], kept.fall)["mean"] == pytest.approx(1.0)
    assert cells.ratio("ft", "cgd", ["badnet"])["mean"] == pytest.approx(1.0)
    for cell in grid.cells:
        if (cell.names.method, cell.names.attack, cell.names.seed) == ("cgd", "badnet", 0):
            result = store.load(cell.key)
            store.save(replace(result, cost=replace(result.cost, resumed=True)))
    assert kept.Cells.of(tmp_path).ratio("ft", "cgd", ["badnet"])["cells"] == 1


def test_no_figure_stands_in_the_place_of_another(kept: ModuleType, grid: Grid, tmp_path: Path) -> None:
    Store.open(tmp_path).keep_plan(grid)
    named = [*kept.CLIP_REPAIRS, "ubt", "cbpt", "rvpt", "linear-probe", "abl-clip", *kept.SAMPLE_METHODS]
    assert sorted(kept.claims(kept.Cells.of(tmp_path))) == sorted(["grid", *named])
    assert len(named) == len(set(named))
