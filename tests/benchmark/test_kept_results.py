"""The figures that benchmarks/grid.py claims, on made-up cells."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from unpoison.benchmark.cell import Cell, CellResult, digest
from unpoison.benchmark.grid import Grid, read_grid
from unpoison.benchmark.runner import run_grid
from unpoison.benchmark.store import Store
from unpoison.evaluation.intervals import wilson

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
    held_out = cells.figure("ft", ["badnet"], kept.excess, without=[0])
    assert (held_out["mean"], held_out["cells"], held_out["max_at"]) == (2.0, 1, "badnet-1")
    never = cells.rate("ft", ["badnet"], lambda cell: 0.0)
    assert (never["mean"], never["low"], never["high"]) == (0.0, 0.0, pytest.approx(wilson(0, 2).high, abs=1e-3))
    assert cells.rate("ft", ["badnet"], lambda cell: 100.0 * (cell.names.seed == 1))["mean"] == 50.0
    assert cells.rate("ft", ["clean"], kept.excess) == {"cells": 0}
    for cell in grid.cells:
        if (cell.names.method, cell.names.attack, cell.names.seed) == ("cgd", "badnet", 0):
            result = store.load(cell.key)
            store.save(replace(result, cost=replace(result.cost, resumed=True)))
    assert kept.Cells.of(tmp_path).ratio("ft", "cgd", ["badnet"])["cells"] == 1


def test_what_the_search_finds_is_told_apart_by_the_seeds_it_was_set_on(
    kept: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"target_found": {"cells": 21, "mean": 95.24, "low": 77.3, "high": 99.2},
            "target_found_held_out": {"cells": 7, "mean": 85.71, "low": 48.7, "high": 97.4},
            "false_alarm": {"cells": 2, "mean": 0.0, "low": 0.0, "high": 65.8},
            "false_alarm_held_out": {"cells": 0}}  # fmt: skip
    monkeypatch.setattr(kept, "claims", lambda cells: {"cbpt": made})
    assert kept.search_note(None) == (
        "CBPT's search, whose thresholds were set on victims of seeds 0 and 1; its second look was added after the "
        "clean model of seed 6 had been suspected. Target among the suspects: of 21 of all "
        "seeds 95 percent (95 % interval 77 to 99), of 7 of other seeds 86 percent (95 % interval 49 to 97). A clean "
        "model suspected: of 2 of all seeds 0 percent (95 % interval 0 to 66)."
    )


def test_no_figure_stands_in_the_place_of_another(kept: ModuleType, grid: Grid, tmp_path: Path) -> None:
    Store.open(tmp_path).keep_plan(grid)
    named = [*kept.CLIP_REPAIRS, "ubt", "cbpt", "rvpt", "linear-probe", "abl-clip", *kept.SAMPLE_METHODS]
    assert sorted(kept.claims(kept.Cells.of(tmp_path))) == sorted(["grid", *named])
    assert len(named) == len(set(named))


def test_every_kept_cell_is_still_one_of_its_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command beside a figure makes that cell. Hashes of data files, which need not be there, are those kept."""
    root = Path(__file__).resolve().parents[2]
    files = sorted((root / "benchmarks/results/bench-cpu/cells").glob("*.json"))
    results = [CellResult.load(file) for file in files]
    contents: dict[str, str] = {}
    for result in results:
        assert digest(result.inputs) == result.key
        assert result.machine.endswith(", bf16")  # which no name says
        data, known = result.inputs["data"], result.inputs["contents"]
        contents |= {data[key]: known[f"data.{key}"] for key in data if f"data.{key}" in known}
    monkeypatch.setattr("unpoison.benchmark.grid.source_content", lambda source: contents.get(source, "not kept"))
    grid = read_grid(root / "grids/cpu.toml")
    assert {cell.precision for cell in grid.cells} == {"bf16"}
    assert len(files) > 200
    assert {result.key for result in results} <= {cell.key for cell in grid.cells}
