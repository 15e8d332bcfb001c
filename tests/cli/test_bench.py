"""``unpoison bench`` as a process: a tiny cut of the quick grid, run and tabled; bad input."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unpoison.benchmark.cell import CellResult
from unpoison.benchmark.grid import make_grid

QUICK = Path(__file__).parents[2] / "grids" / "quick.toml"
SIZES = {"train": "shapes:240:0", "test": "shapes:120:1", "captioned": "shapes:60:2", "retrieval": "shapes:40:3"}


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, small_folder: Path) -> Path:
    """The quick grid with other sizes: hundreds of pictures, a CLIP of two layers, a few steps, two attacks."""
    tables = tomllib.loads(QUICK.read_text())
    for data in tables["data"].values():
        data |= {key: SIZES[key] for key in data if key in SIZES}
    tables["model"]["small-resnet"] |= {"epochs": 1, "scores": {"scorers": 1, "scorer_epochs": 1}}
    tables["model"]["tiny-clip"] |= {"model": str(small_folder), "victim": {"steps": 4, "batch": 16, "warm_up": 1}}
    short = {"steps": 3, "batch_size": 16}
    tables["method"]["par"]["config"] = short | {"search_concepts": 0}
    tables["method"]["cgd"]["config"] = {"steps": 3}
    tables["least_asr"] = 0
    classifiers, clips = tables["cells"]
    classifiers |= {"attack": ["blended"], "rate": [0.1], "method": ["cgd"]}
    clips |= {"attack": ["badnet-rand"], "method": ["par"]}
    file = tmp_path_factory.mktemp("grid") / "cut.toml"
    file.write_text(toml(tables))
    return file


def toml(tables: dict[str, Any]) -> str:
    return "".join(f"{key} = {inline(value)}\n" for key, value in tables.items())


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {inline(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


def test_a_grid_runs_and_running_it_again_changes_nothing(
    process: Callable, here: Callable, tmp_path: Path, cut: Path
) -> None:
    done = process("bench", "run", str(cut), "-o", "out", "--json")
    assert done.code == 0, done.err
    body = json.loads(done.out)
    assert (body["cells"], body["ran"], body["status"]) == (4, 4, {"done": 4})
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    results = [CellResult.load(file) for file in (tmp_path / "out" / "cells").glob("*.json")]
    assert {result.names.model for result in results} == {"small-resnet", "tiny-clip"}
    for result in results:
        assert result.before is not None
        assert result.before.asr is not None
        assert (result.picture is not None) == (result.names.method == "none")
        assert result.cost.wall > 0
        assert result.cost.memory > 0
        assert result.fingerprints["victim"]
    repaired = [result.repaired for result in results if result.repaired is not None]
    assert [sorted(found.config) != [] for found in repaired] == [True, True]
    assert (tmp_path / "out" / "work").exists() is False or not list((tmp_path / "out" / "work").iterdir())

    again = here("bench", "run", str(cut), "-o", "out")
    assert again.code == 0, again.err
    assert "0 ran now" in again.out
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {file: time for file, time in after.items() if file.suffix != ".lock"} == {
        file: time for file, time in files.items() if file.suffix != ".lock"
    }


def test_all_problems_of_a_grid_are_said_before_anything_runs(here: Callable, tmp_path: Path, cut: Path) -> None:
    tables = tomllib.loads(cut.read_text())
    tables["colour"] = 1
    tables["cells"][0] |= {"method": ["cdg", "par"], "attack": ["blended", "badnte"]}
    (tmp_path / "bad.toml").write_text(toml(tables))
    done = here("bench", "run", "bad.toml", "-o", "out")
    assert done.code == 2
    wanted = ("4 problems", "'colour'", "Did you mean 'cgd'?", "Did you mean 'badnet'?")
    for said in (*wanted, "par needs suspicious CLIP"):
        assert said in done.err
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_does_not_answer_is_said_before_anything_is_made(
    here: Callable, cut: Path, tmp_path: Path
) -> None:
    done = here("bench", "run", str(cut), "-o", "out", "--ray", "127.0.0.1:1")
    assert done.code == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in done.err
    assert not (tmp_path / "out").exists()
    done = here("bench", "run", str(cut), "-o", "out", "--ray", "ray://127.0.0.1:10001")
    assert done.code == 2
    assert "ray job submit" in done.err


def test_a_dry_run_writes_nothing(here: Callable, tmp_path: Path, cut: Path) -> None:
    done = here("bench", "run", str(cut), "--dry-run", "--json")
    assert done.code == 0, done.err
    body = json.loads(done.out)
    assert (body["cells"], body["done"]) == (4, 0)
    assert len(body["parts"]) == 4
    assert all(part["seconds"] > 0 for part in body["parts"])
    assert [file for file in tmp_path.iterdir() if file.name != "cache"] == []


def test_a_dry_run_reads_what_stands_at_an_address(
    here: Callable, tmp_path: Path, cut: Path, planted_results: Path
) -> None:
    url = f"file://{planted_results}"
    body = json.loads(here("bench", "run", str(cut), "--dry-run", "-o", url, "--json").out)
    assert (body["cells"], body["done"], body["failed"]) == (4, 2, {"crashed": 1})
    assert [part["cells"] for part in body["parts"]] == [1]
    shown = here("bench", "run", str(cut), "--dry-run", "-o", url).out
    assert f"4 cells; in {url}: 2 done, 1 crashed." in " ".join(shown.split())
    assert [file for file in tmp_path.iterdir() if file.name != "cache"] == []


def test_status_and_table_of_a_folder(here: Callable, tmp_path: Path, cut: Path, planted_results: Path) -> None:
    status = here("bench", "status", str(planted_results), "--json")
    assert status.code == 0, status.err
    body = json.loads(status.out)
    assert body["grids"] == {"cut": {"done": 2, "crashed": 1, "to run": 1}}
    assert body["failed"][0]["reason"] == "ValueError: \x1b[31mplanted"
    shown = here("bench", "status", str(planted_results))
    assert "2 done" in shown.out
    assert "\x1b" not in shown.out
    table = here("bench", "table", str(planted_results))
    assert "blended" in table.out
    assert "90.0" in table.out
    assert "1 of 4 cells have not run." in table.out
    assert "crashed" in table.out
    for name, said in (("t.md", "| attack |"), ("t.csv", "asr_excess_mean"), ("t.tex", "\\toprule"), ("t.json", "{")):
        assert here("bench", "table", str(planted_results), "-o", name).code == 0
        assert said in (tmp_path / name).read_text()
    twice = here("bench", "table", str(planted_results), "-o", "t.md")
    assert twice.code == 2
    assert "exists" in twice.err
    assert here("bench", "table", str(planted_results), "--format", "csv").out.startswith("data,model")
    assert here("bench", "table", str(planted_results), "--format", "html").code == 2
    assert here("bench", "table", str(planted_results), "-o", "leaderboard.html").code == 0
    assert (tmp_path / "leaderboard.html").stat().st_size > 10_000


def test_results_stand_at_an_address(here: Callable, tmp_path: Path, cut: Path, planted_results: Path) -> None:
    keys = [file.stem for file in (planted_results / "cells").glob("*.json")]
    done = [key for key in keys if CellResult.load(planted_results / f"cells/{key}.json").status == "done"]
    url = f"file://{planted_results}"
    ran = here("bench", "run", str(cut), "--cell", *done, "-o", url, "--json")  # all hashes after one --cell
    assert ran.code == 0, ran.err
    assert (json.loads(ran.out)["ran"], json.loads(ran.out)["folder"]) == (0, url)
    assert sorted(file.stem for file in (tmp_path / "runs/bench-cut/cells").iterdir()) == sorted(keys)
    body = json.loads(here("bench", "status", url, "--json").out)
    assert (body["folder"], body["grids"]) == (url, {"cut": {"done": 2, "crashed": 1, "to run": 1}})
    shown = here("bench", "table", url).out
    assert f"-o {url}" in shown
    assert shown.replace(url, str(planted_results)) == here("bench", "table", str(planted_results)).out
    refused = here("bench", "table", "nope://bucket")
    assert refused.code == 2
    assert "fsspec" in refused.err


def test_folders_that_are_none_are_refused(here: Callable, tmp_path: Path, cut: Path, planted_results: Path) -> None:
    assert here("bench", "status").code == 2
    assert here("bench", "table", "nowhere").code == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bench.json").write_text('{"schema": "unpoison/bench", "schema_version": 7}')
    done = here("bench", "run", str(cut), "-o", "other")
    assert done.code == 2
    assert "schema version 7" in done.err


@pytest.fixture
def planted_results(tmp_path_factory: pytest.TempPathFactory, cut: Path) -> Path:
    """A folder with two results, one failure and one cell to run."""
    from unpoison.benchmark.cell import Cost, Figures
    from unpoison.benchmark.outcomes import done, failed
    from unpoison.benchmark.store import Store
    from unpoison.evaluation.intervals import wilson

    grid = make_grid(tomllib.loads(cut.read_text()), name="cut", path=str(cut))
    store = Store.open(tmp_path_factory.mktemp("planted") / "out")
    store.keep_plan(grid)
    figures = Figures(
        c_acc=wilson(90, 100), asr=wilson(95, 100), asr_floor=wilson(1, 100), asr_excess=94.0, ra=wilson(5, 100)
    )
    for cell in grid.cells[:2]:
        store.save(done(cell, before=figures, after=figures, cost=Cost(wall=3.0)))
    store.save(failed(grid.cells[2], "crashed", "ValueError: \x1b[31mplanted"))
    return store.path
