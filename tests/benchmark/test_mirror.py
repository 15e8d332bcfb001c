"""Results at an address of fsspec: sent as they come, fetched by the next machine, refused where they are not ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.mirror import Mirror, local_copy
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.runner import run_grid
from unpoison.benchmark.store import Store
from unpoison.errors import SchemaVersionError, UsageError

Execute = Callable[[Cell, Path], CellResult]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield "memory://results/bench" if request.param == "memory" else f"file://{tmp_path}/address/bench"
    fsspec.filesystem("memory").store.clear()


def never(cell: Cell, folder: Path) -> CellResult:
    raise AssertionError("nothing is left to run")


def test_another_machine_goes_on_where_this_one_was(grid: Grid, made_up: Execute, tmp_path: Path, url: str) -> None:
    first = Store.open(tmp_path / "first", Mirror.at(url))
    half = [cell.key for cell in grid.cells[:5]]
    ran = run_grid(grid, first, execute=made_up, only=half).ran
    second = Store.open(tmp_path / "second", Mirror.at(url))
    assert run_grid(grid, second, execute=made_up).ran == len(grid.cells) - ran
    third = Store.open(tmp_path / "third", Mirror.at(url))
    assert run_grid(grid, third, execute=never).status == {"done": len(grid.cells)}
    for cell in grid.cells:
        assert third.file(cell.key).read_bytes() == second.file(cell.key).read_bytes()
        assert third.load(cell.key).command.endswith(f"-o {url}")
    with local_copy(url) as copy:
        found = Store.read(copy)
        assert [plan.grid for plan in found.plans()] == ["tiny"]
        assert sorted(file.stem for file in (copy / "cells").iterdir()) == sorted(cell.key for cell in grid.cells)
        assert {file.name for file in copy.iterdir()} == {"bench.json", "plans", "cells"}


def test_a_cell_that_was_sent_meanwhile_is_not_made_again(
    grid: Grid, made_up: Execute, tmp_path: Path, url: str
) -> None:
    here, there = (Store.open(tmp_path / name, Mirror.at(url)) for name in ("here", "there"))
    ran = []

    def execute(cell: Cell, folder: Path) -> CellResult:
        if not ran:
            run_grid(grid, there, execute=made_up, only=[other.key for other in grid.cells if other.key != cell.key])
        ran.append(cell.key)
        return made_up(cell, folder)

    run_grid(grid, here, execute=execute)
    assert len(ran) <= 2


def test_of_a_cell_that_both_have_the_one_that_is_done_counts(
    grid: Grid, made_up: Execute, tmp_path: Path, url: str
) -> None:
    first = Store.open(tmp_path / "first", Mirror.at(url))
    run_grid(grid, first, execute=lambda cell, folder: failed(cell, "crashed", "here"))
    alone = Store.open(tmp_path / "alone")
    run_grid(grid, alone, execute=made_up)
    Store.open(alone.path, Mirror.at(url))
    assert run_grid(grid, Store.open(first.path, Mirror.at(url)), execute=never).status == {"done": len(grid.cells)}


def test_half_a_cell_here_or_there_is_made_good(grid: Grid, made_up: Execute, tmp_path: Path, url: str) -> None:
    first = Store.open(tmp_path / "first", Mirror.at(url))
    run_grid(grid, first, execute=made_up)
    here, there = (cell.key for cell in grid.cells[:2])
    first.file(here).write_bytes(b"{")
    Mirror.at(url).put(f"cells/{there}.json", b"{")
    opened = Store.open(first.path, Mirror.at(url))
    assert run_grid(grid, opened, execute=never).status == {"done": len(grid.cells)}
    assert first.file(here).with_suffix(".damaged").read_bytes() == b"{"
    assert Mirror.at(url).read(f"cells/{there}.json") == first.file(there).read_bytes()


def test_what_is_not_ours_or_of_another_version_is_refused(tmp_path: Path, url: str) -> None:
    mirror = Mirror.at(url)
    mirror.put("mine.txt", b"mine")
    with pytest.raises(UsageError, match="holds no benchmark's results"):
        Store.open(tmp_path / "a", mirror)
    mirror.put("bench.json", json.dumps({"schema": "unpoison/bench", "schema_version": 99}).encode())
    with pytest.raises(SchemaVersionError, match="schema version 99"):
        Store.open(tmp_path / "b", mirror)
    assert not (tmp_path / "b").exists()
    assert mirror.read("mine.txt") == b"mine"


def test_an_address_that_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nope://bucket"):
        Mirror.at("nope://bucket")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be reached"):
        Store.open(tmp_path / "out", Mirror.at(f"file://{tmp_path}/file/bench"))
