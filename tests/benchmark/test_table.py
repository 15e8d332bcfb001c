"""The table: means and spread over seeds re-derived, intervals, the control, failures, every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.formats import FORMATS, as_csv, as_json, compared, failure_lines, latex, markdown
from unpoison.benchmark.grid import Grid, make_grid
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.rows import over_seeds
from unpoison.benchmark.runner import run_grid
from unpoison.benchmark.settings import Reported
from unpoison.benchmark.store import Store
from unpoison.benchmark.table import Picture, Table, compare, make_table
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
    assert value.high == pytest.approx(asr.mean() + 12.7062 * asr.std(ddof=1) / np.sqrt(2), abs=1e-3)
    assert value.low == 0.0  # where a rate ends
    assert row.values["seconds"].std is not None
    assert row.values["seconds"].low is None
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
    assert over_seeds([3.0], (0.0, 100.0)).low is None
    assert over_seeds([3.0, 4.0], None).low is None
    assert over_seeds([99.0, 100.0], (0.0, 100.0)).high == 100.0


def test_the_control_and_the_model_as_given_stand_in_the_table(table: Table) -> None:
    shown = {(row.attack, row.method) for row in table.rows}
    assert {("clean", "none"), ("clean", "ft"), ("badnet", "none")} <= shown
    control = next(row for row in table.rows if (row.attack, row.method) == ("clean", "ft"))
    assert "asr" not in control.values
    assert control.values["c_acc_before"].mean - control.values["c_acc"].mean == pytest.approx(1.0)
    assert len(table.failures) == 2


def test_a_papers_mean_stands_beside_ours_over_the_runs_that_are_compared(table: Table) -> None:
    said = Reported(method="ft", setting="a net", source="a paper", asr={"mean": 0.4}, c_acc={"badnet": 90.0})
    mean, single = compare([said], table.rows, table.summaries)
    assert (mean.attack, mean.asr, mean.c_acc, mean.attacks) == ("mean", 0.4, None, 1)
    assert mean.our_asr is not None
    assert mean.our_asr.mean == pytest.approx(2.0)  # seed 0 alone: cgd has no figures with seed 1
    assert mean.our_asr.std is None  # a spread over attacks is none over seeds
    bound = replace(said, asr={"at-most": 1.0}, c_acc={})
    rows = table.summaries[0].rows
    easier = replace(
        rows[0], attack="blended", values={key: replace(value, mean=0.5) for key, value in rows[0].values.items()}
    )
    harder = replace(
        rows[0], attack="wanet", method="ft", values=rows[0].values | {"asr": replace(mean.our_asr, mean=9.0)}
    )
    summary = replace(table.summaries[0], rows=(*rows, replace(easier, method="ft"), harder))
    (worst,) = compare([bound], table.rows, [summary])
    assert (worst.asr, worst.attacks, worst.our_c_acc) == (1.0, 3, None)
    assert worst.our_asr is not None
    assert worst.our_asr.mean == 9.0
    assert compared(worst)[:5] == ["every attack, ours the worst of 3 attacks", "ft", "at most 1", "", "9.0"]
    assert compared(replace(worst, our_asr=None, attacks=None))[:3] == ["every attack", "ft", "at most 1"]
    page = render_leaderboard(replace(table, reported=(worst,)))
    assert ">at most 1</td>" in page
    attacked = next(row.values for row in table.rows if (row.attack, row.method) == ("badnet", "ft"))
    assert (single.attack, single.our_asr, single.attacks) == ("badnet", attacked["asr"], None)
    assert compare([replace(said, method="cgdd")], table.rows, table.summaries)[0].our_asr is None


def test_methods_are_compared_over_the_runs_that_all_of_them_have(table: Table) -> None:
    (summary,) = table.summaries
    found = {entry.method: entry for entry in summary.methods}
    assert set(found) == {"none", "ft", "cgd"}
    # cgd failed with seed 1: the others count with seed 0 alone
    assert found["ft"].excess == found["ft"].worst_excess == found["cgd"].excess == pytest.approx(1.0)
    assert found["ft"].control_fall == pytest.approx(1.0)
    assert found["none"].excess == pytest.approx(94.0)
    assert summary.methods[-1].method == "none"
    assert summary.over == (
        "Means over 1 attack (badnet 10 %; seed 0): 1 of the 2 runs (attack x seed) planned for all of these methods."
    )


def test_adaptive_attacks_and_methods_of_few_attacks_stand_apart(
    tables: dict[str, Any], made_up: Execute, tmp_path: Path
) -> None:
    tables["attack"] = {"near": {"trigger": "badnet", "select": "boundary"}, "sig": {"mode": "all-to-one"}}
    tables["cells"] = [
        product | {"data": ["shapes"], "model": ["net"], "rate": [0.1]}
        for product in (
            {"attack": ["clean", "badnet", "blended", "sig"], "method": ["ft", "cgd"], "seed": [0, 1]},
            {"attack": ["wanet"], "method": ["ft"], "seed": [0]},  # not planned for cgd
            {"attack": ["near", "low-gap"], "method": ["ft", "cgd"], "seed": [0]},
            {"attack": ["low-gap"], "method": ["nad"], "seed": [0]},
            {"attack": ["badnet"], "method": ["anp"], "seed": [0, 1]},
        )
    ]  # fmt: skip
    stop = {("cgd", "sig", 1), ("cgd", "sig", 0)}

    def execute(cell: Cell, folder: Path) -> CellResult:
        names = cell.names
        if (names.method, names.attack, names.seed) in stop:
            return failed(cell, "crashed", "It stopped.")
        result = made_up(cell, folder)
        if names.method == "ft" and names.attack in ("wanet", "sig") and result.after is not None:
            return replace(result, after=replace(result.after, asr_excess=80.0))  # must not count
        if names.method == "ft" and names.attack == "low-gap" and result.after is not None:
            return replace(result, after=replace(result.after, asr_excess=31.0))
        return result

    grid = make_grid(tables, name="tiny", path="tiny.toml")
    store = Store.open(tmp_path / "out")
    run_grid(grid, store, execute=execute)
    (summary,) = make_table(store).summaries
    found = {entry.method: entry for entry in summary.methods}
    assert set(found) == {"none", "ft", "cgd"}
    assert found["ft"].excess == found["cgd"].excess == pytest.approx(1.5)  # badnet and blended, both seeds
    assert {(row.attack, row.seeds) for row in summary.rows} == {("badnet", (0, 1)), ("blended", (0, 1))}
    assert (found["cgd"].adaptive, found["cgd"].worst_adaptive) == (1.0, 1.0)
    assert (found["ft"].adaptive, found["ft"].worst_adaptive) == (16.0, 31.0)
    assert "2 attacks (badnet 10 %, blended 10 %; seeds 0, 1): 4 of the 6 runs" in summary.over
    assert "Adaptive: 2 attacks (low-gap 10 %, near 10 %; seed 0): 2 of the 2 runs" in summary.over
    assert "compared: anp." in summary.over


def test_adaptive_attacks_stand_apart_before_they_have_run(
    tables: dict[str, Any], made_up: Execute, tmp_path: Path
) -> None:
    tables["attack"] = {"near": {"trigger": "badnet", "select": "boundary"}}
    product = tables["cells"][0] | {"attack": ["clean", "badnet", "blended"], "method": ["ft", "cgd"]}
    tables["cells"] = [product, product | {"attack": ["near", "low-gap"], "method": ["ft"]}]
    del tables["reported"]
    grid, store = make_grid(tables, name="tiny", path="tiny.toml"), Store.open(tmp_path / "out")
    usual = [cell.key for cell in grid.cells if cell.names.attack in ("clean", "badnet", "blended")]
    run_grid(grid, store, execute=made_up, only=usual)
    (summary,) = make_table(store).summaries
    assert {entry.method for entry in summary.methods} == {"none", "ft", "cgd"}
    assert "2 attacks (badnet 10 %, blended 10 %; seeds 0, 1): 4 of the 4 runs" in summary.over
    assert "too few" not in summary.over
    (plan,) = store.plans()
    assert {cell.names.attack for cell in plan.cells if cell.is_adaptive} == {"near", "low-gap"}
    older = [replace(cell, adaptive=None) for cell in plan.cells]
    assert {cell.names.attack for cell in older if cell.is_adaptive} == {"low-gap"}


def test_markdown_and_latex_hold_every_row_and_what_makes_it_again(table: Table) -> None:
    text = markdown(table)
    row = next(row for row in table.rows if (row.attack, row.method) == ("badnet", "ft"))
    keys = " ".join(f"`{key[:8]}`" for key in row.keys)
    shown = next(line for line in text.splitlines() if line.startswith("| badnet 10 % | ft | 2 | 1,000 / 1,000 |"))
    asr = row.values["asr"]
    assert f"| 2.5 ({asr.low:.1f} to {asr.high:.1f}) |" in shown
    assert "±" not in text
    assert shown.endswith(f"| {keys} |")
    assert "| badnet 10 % | cgd | 1 |" in text
    assert "2.0 (1.3 to 3.1)" in text
    assert "A row is made again by `unpoison bench run tiny.toml --cell CELL ... -o " in text
    assert "| badnet | ft | 7.5 |  | 2.5 (0.0 to 8.9) | 89.0 (88.3 to 89.6) | a large net | Doe \\| 2024 |" in text
    assert "| clean | ft |  | 93 |  | 89.0 (88.3 to 89.6) | a large net |" in text
    failure = table.failures[0]
    assert f"Again: {failure.command} --retry" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(table.rows) + 1 + 3 + 4
    drawn = latex(table)
    assert drawn.count("\\\\") == len(table.rows) + 1 + 3 + 4
    assert "badnet 10 \\%" in drawn
    assert all(f"\\\\ % {entry.command}\n" in drawn for entry in table.rows)


def test_what_a_victim_holds_up_stands_with_it_and_a_refusal_is_not_tried_again(
    grid: Grid, made_up: Execute, tmp_path: Path
) -> None:
    ends = {0: "refused", 1: "crashed"}

    def execute(cell: Cell, folder: Path) -> CellResult:
        if cell.is_given and cell.attack is not None:
            return failed(cell, ends[cell.names.seed], f"planted {cell.names.seed}")
        if cell.attack is None and (cell.names.method, cell.names.seed) == ("ft", 0):
            return failed(cell, "refused", "Too few samples.")
        return made_up(cell, folder)

    store = Store.open(tmp_path / "out")
    run_grid(grid, store, execute=execute)
    made = make_table(store)
    assert len(made.failures) == 7
    key = {(cell.names.attack, cell.names.method, cell.names.seed): cell.key for cell in grid.cells}
    again = " ".join(f"--cell {key['badnet', method, 1][:8]}" for method in ("ft", "cgd"))
    assert failure_lines(made.failures) == [
        f"{key['clean', 'ft', 0]} shapes / net / clean / ft / seed 0: refused. Too few samples.",
        f"{key['badnet', 'none', 0]} shapes / net / badnet 10 % / none / seed 0: refused. planted 0 "
        "Its repairs were not tried: ft, cgd.",
        f"{key['badnet', 'none', 1]} shapes / net / badnet 10 % / none / seed 1: crashed. planted 1 "
        f"Its repairs were not tried: ft, cgd. Again: unpoison bench run tiny.toml {again} -o {store.path} --retry",
    ]
    page = render_leaderboard(made)
    assert page.count("run again</summary>") == 1
    assert page.count("Its repairs were not tried: <bdi>ft, cgd</bdi>.") == 2
    assert markdown(made).count("Its victim") == 0

    run_grid(grid, store, execute=made_up, retry=True, only=[key["badnet", "none", 1]])
    left = failure_lines(make_table(store).failures)
    own = next(line for line in left if line.startswith(key["badnet", "ft", 1]))
    assert own.endswith(f"--cell {key['badnet', 'ft', 1]} -o {store.path} --retry")  # its victim is there now
    assert len(left) == 4


def test_rows_of_several_grids_name_their_own(table: Table) -> None:
    other = replace(table.rows[-1], command=table.rows[-1].command.replace("tiny.toml", "'other grid.toml'"))
    text = markdown(replace(table, rows=(*table.rows[:-1], other)))
    (line,) = (line for line in text.splitlines() if line.startswith("`unpoison bench run 'other grid.toml'"))
    assert line.endswith(f"makes these cells again: {' '.join(key[:8] for key in other.keys)}.")
    assert "`unpoison bench run tiny.toml --cell CELL ... -o " in text


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


def test_a_picture_belongs_to_its_data_and_model(table: Table) -> None:
    row = next(row for row in table.rows if row.attack == "badnet")
    other = replace(row, model="tiny", kind="clip")
    pictures = [
        Picture(data="shapes", model="net", attack="badnet", png="QQ=="),
        Picture(data="shapes", model="tiny", attack="badnet", png="Qg=="),
    ]
    page = render_leaderboard(replace(table, rows=(*table.rows, other), pictures=tuple(pictures)))
    assert page.count("base64,QQ==") == page.count("base64,Qg==") == 1
    assert "changes no pixel" not in page
    assert "changes no pixel" not in render_leaderboard(table)
    assert "No picture of this trigger is kept." in render_leaderboard(table)
    still = Picture(data="shapes", model="tiny", attack="badnet", png=None)
    assert "this attack changes no pixel" in render_leaderboard(replace(table, pictures=(still,)))


def test_pictures_are_kept_of_each_kind_of_model(tables: dict[str, Any], made_up: Execute, tmp_path: Path) -> None:
    tables["data"]["shapes"]["captioned"] = "shapes:100:2"
    del tables["reported"]
    tables["cells"] = [
        {"data": ["shapes"], "model": ["net", "tiny"], "attack": ["badnet"], "rate": [0.1]},
        {"data": ["shapes"], "model": ["tiny"], "attack": ["text-key"], "rate": [0.1]},
    ]
    for product in tables["cells"]:
        product |= {"method": ["none"], "seed": [0]}
    grid, store = make_grid(tables, name="tiny", path="tiny.toml"), Store.open(tmp_path / "out")

    def execute(cell: Cell, folder: Path) -> CellResult:
        return replace(made_up(cell, folder), picture=None if cell.names.attack == "text-key" else cell.names.model)

    run_grid(grid, store, execute=execute)
    found = {(picture.model, picture.attack): picture.png for picture in make_table(store).pictures}
    assert found == {("net", "badnet"): "net", ("tiny", "badnet"): "tiny", ("tiny", "text-key"): None}


def test_the_leaderboard_escapes_what_it_shows(table: Table) -> None:
    page = render_leaderboard(table)
    assert "<b>and</b>" not in page
    assert "&lt;b&gt;and&lt;/b&gt;" in page
    assert page.count("make again") >= len(table.rows)
    assert all(f"<code>{entry.command} --retry</code>" in page for entry in table.failures)
    assert "±" not in page
    assert "http" not in page.replace("http-equiv", "")
