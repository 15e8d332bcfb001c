"""The table: means and spread over seeds re-derived, intervals, the control, failures, every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.formats import FORMATS, as_csv, as_json, latex, markdown
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.runner import run_grid
from unpoison.benchmark.settings import Reported
from unpoison.benchmark.store import Store
from unpoison.benchmark.table import Table, compare, make_table, over_seeds, summarise
from unpoison.evaluation.intervals import wilson
from unpoison.report.leaderboard import render_leaderboard

Execute = Callable[[Cell, Path], CellResult]


@pytest.fixture
def table(grid: Grid, made_up: Execute, tmp_path: Path) -> Table:
    def execute(cell: Cell, folder: Path) -> CellResult:
        if cell.names.method == "cgd" and cell.names.seed == 1:
            return failed(cell, "timed out", "It took more than 1 s | <b>and</b> was stopped.")
        return made_up(cell, folder)

    store = Store.open(tmp_path / "out")
    run_grid(grid, store, execute=execute)
    return make_table(store)


def test_rows_are_means_over_seeds(table: Table) -> None:
    row = next(row for row in table.rows if (row.attack, row.method) == ("badnet", "ft"))
    asr = np.array([2.0, 3.0])
    value = row.values["asr"]
    assert value.mean == pytest.approx(asr.mean())
    assert value.std == pytest.approx(asr.std(ddof=1))
    assert value.low is not None
    assert value.low == pytest.approx(asr.mean() - 12.7062 * asr.std(ddof=1) / np.sqrt(2), abs=1e-3)
    assert row.values["asr_excess"].mean == pytest.approx(1.5)
    assert row.values["asr_before"].mean == pytest.approx(95.0)
    assert (row.seeds, row.n, row.attacked) == ((0, 1), 1000, 1000)
    assert all(f"--cell {key}" in row.command for key in row.keys)
    assert row.command.count(" -o ") == 1


def test_seconds_of_a_cell_that_was_gone_on_with_are_left_out(grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "results")
    run_grid(grid, store, execute=made_up)
    rows = {(row.attack, row.method): row for row in make_table(store).rows}
    assert rows["badnet", "ft"].values["seconds"].mean == pytest.approx(2.5)
    for cell in grid.cells:
        if (cell.names.attack, cell.names.method, cell.names.seed) == ("badnet", "ft", 1):
            found = store.load(cell.key)
            store.save(replace(found, cost=replace(found.cost, resumed=True)))
    rows = {(row.attack, row.method): row for row in make_table(store).rows}
    assert (rows["badnet", "ft"].values["seconds"].mean, rows["badnet", "ft"].values["seconds"].seeds) == (2.0, 1)
    assert rows["badnet", "ft"].seeds == (0, 1)


def test_one_seed_has_wilsons_interval(table: Table) -> None:
    row = next(row for row in table.rows if (row.attack, row.method) == ("badnet", "cgd"))
    expected = wilson(20, 1000)
    value = row.values["asr"]
    assert (value.seeds, value.std, value.low, value.high) == (1, None, expected.low, expected.high)
    assert over_seeds([3.0]).low is None


def test_the_control_and_the_model_as_given_stand_in_the_table(table: Table) -> None:
    shown = {(row.attack, row.method) for row in table.rows}
    assert {("clean", "none"), ("clean", "ft"), ("badnet", "none")} <= shown
    control = next(row for row in table.rows if (row.attack, row.method) == ("clean", "ft"))
    assert "asr" not in control.values
    assert control.values["c_acc_before"].mean - control.values["c_acc"].mean == pytest.approx(1.0)
    assert len(table.failures) == 2


def test_a_papers_mean_stands_beside_ours_over_all_attacks(table: Table) -> None:
    said = Reported(method="ft", setting="a net", source="a paper", asr={"mean": 0.4}, c_acc={"badnet": 90.0})
    mean, single = compare([said], table.rows)
    attacked = [row.values for row in table.rows if row.method == "ft" and "asr" in row.values]
    assert (mean.attack, mean.asr, mean.c_acc) == ("mean", 0.4, None)
    assert mean.our_asr is not None
    assert mean.our_asr.mean == pytest.approx(np.mean([values["asr"].mean for values in attacked]))
    assert mean.our_asr.std is None  # a spread over attacks is none over seeds
    assert (single.attack, single.our_asr) == ("badnet", attacked[0]["asr"])
    assert compare([replace(said, method="cgdd")], table.rows)[0].our_asr is None


def test_methods_are_summed_up(table: Table) -> None:
    found = {entry.method: entry for entry in summarise(table.rows)}
    assert found["ft"].excess == found["ft"].worst_excess == pytest.approx(1.5)
    assert found["ft"].control_fall == pytest.approx(1.0)
    assert found["none"].excess == pytest.approx(94.0)
    assert next(iter(found)) == "cgd"


def test_markdown_and_latex_hold_every_row(table: Table) -> None:
    text = markdown(table)
    assert "| badnet 10 % | ft | 2 | 1,000 / 1,000 | 90.0 ± 0.1 | 89.0 ± 0.1 | 95.0 ± 0.0 | 2.5 ± 0.7 |" in text
    assert "| badnet 10 % | cgd | 1 |" in text
    assert "2.0 (1.3 to 3.1)" in text
    assert "unpoison bench run tiny.toml --cell CELL" in text
    assert "| badnet | ft | 7.5 |  | 2.5 ± 0.7 | 89.0 ± 0.1 | a large net | Doe \\| 2024 |" in text
    assert "| clean | ft |  | 93 |  | 89.0 ± 0.1 | a large net |" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(table.rows) + 1 + 3
    drawn = latex(table)
    assert drawn.count("\\\\") == len(table.rows) + 1 + 3
    assert "badnet 10 \\%" in drawn
    assert "$\\pm$" in drawn


def test_csv_and_json_hold_all_figures(table: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert len(rows) == len(table.rows)
    row = next(row for row in rows if (row["attack"], row["method"]) == ("badnet", "ft"))
    assert float(row["asr_mean"]) == pytest.approx(2.5)
    assert row["der_std"] == "0"
    body = json.loads(as_json(table))
    assert (body["schema"], body["schema_version"]) == ("unpoison/bench-table", 1)
    assert {entry["status"] for entry in body["failures"]} == {"timed out"}
    assert set(FORMATS) == {"markdown", "csv", "latex", "json"}


def test_the_leaderboard_escapes_what_it_shows(table: Table) -> None:
    page = render_leaderboard(table)
    assert "<b>and</b>" not in page
    assert "&lt;b&gt;and&lt;/b&gt;" in page
    assert page.count("make again") >= len(table.rows)
    assert "http" not in page.replace("http-equiv", "")
