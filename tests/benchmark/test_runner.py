"""The runner: order, resume, failures as values, leases, and that a second run changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import unpoison
from unpoison.benchmark import runner
from unpoison.benchmark.cell import Cell, CellResult, digest
from unpoison.benchmark.estimate import time_left
from unpoison.benchmark.grid import Grid, make_grid
from unpoison.benchmark.outcomes import failed, source_hash
from unpoison.benchmark.runner import Pending, run_grid
from unpoison.benchmark.store import Store
from unpoison.benchmark.table import make_table, progress_of
from unpoison.errors import ResultError, SchemaVersionError, UsageError
from unpoison.runs import Silent

Execute = Callable[[Cell, Path], CellResult]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        file.relative_to(folder).as_posix(): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file() and "leases" not in file.parts
    }


def test_victims_come_first_and_a_second_run_changes_nothing(grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store, order = Store.open(tmp_path / "out"), []

    def execute(cell: Cell, folder: Path) -> CellResult:
        order.append(cell.key)
        return made_up(cell, folder)

    done = run_grid(grid, store, execute=execute)
    assert (done.cells, done.ran, done.status, done.failed) == (12, 12, {"done": 12}, 0)
    for cell in grid.cells:
        assert order.index(cell.given().key) <= order.index(cell.key)
    before = snapshot(store.path)
    again = run_grid(grid, Store.open(store.path), execute=execute)
    assert (again.ran, len(order)) == (0, 12)
    assert snapshot(store.path) == before
    body = json.loads(store.file(grid.cells[1].key).read_bytes())
    assert body["command"] == f"unpoison bench run tiny.toml --cell {grid.cells[1].key} -o {store.path}"
    assert body["inputs"] == json.loads(json.dumps(grid.cells[1].inputs))
    assert {"torch", "unpoison", "python"} <= body["versions"].keys()
    assert body["versions"]["code"] == source_hash(Path(unpoison.__file__).parent)
    assert "versions" not in body["inputs"]


def test_the_hash_of_the_code_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    found = set()
    for name, content in (("a.py", b"x"), ("a.py", b"y"), ("deep/b.py", b""), ("deep/b.txt", b"no code")):
        (tmp_path / name).write_bytes(content)
        found.add(source_hash(tmp_path))
    assert len(found) == 3
    assert all(len(digits) == 16 for digits in found)


def test_an_interrupted_run_goes_on_where_it_was(grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store, seen = Store.open(tmp_path / "out"), []

    def execute(cell: Cell, folder: Path) -> CellResult:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(cell.key)
        return made_up(cell, folder)

    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, store, execute=execute)
    assert sum(store.has(cell.key) for cell in grid.cells) == 5
    assert store.running() == []
    rest = run_grid(grid, store, execute=made_up)
    assert (rest.ran, rest.status) == (7, {"done": 12})


def test_failures_are_values_and_what_hangs_on_a_victim_is_refused(
    grid: Grid, made_up: Execute, tmp_path: Path
) -> None:
    store = Store.open(tmp_path / "out")

    def execute(cell: Cell, folder: Path) -> CellResult:
        if cell.is_given and cell.attack is not None and cell.names.seed == 0:
            return failed(cell, "crashed", "ValueError: planted")
        return made_up(cell, folder)

    done = run_grid(grid, store, execute=execute)
    assert done.status == {"done": 9, "crashed": 1, "refused": 2}
    refused = [store.load(cell.key) for cell in grid.cells if store.load(cell.key).status == "refused"]
    assert {result.reason for result in refused} == {"Its victim crashed: ValueError: planted"}
    assert run_grid(grid, store, execute=made_up).ran == 0  # failures stay until they are asked for
    again = run_grid(grid, store, execute=made_up, retry=True)
    assert (again.ran, again.status) == (3, {"done": 12})


def test_only_the_cells_that_are_named_run_with_their_victims(grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "out")
    repair = next(cell for cell in grid.cells if not cell.is_given)
    done = run_grid(grid, store, execute=made_up, only=[repair.key[:10]])
    assert (done.cells, done.ran) == (2, 2)
    with pytest.raises(UsageError, match="has no cell 'zz'"):
        run_grid(grid, store, execute=made_up, only=["zz"])


def test_two_runners_share_the_cells(grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store, ran = Store.open(tmp_path / "out"), []

    def execute(cell: Cell, folder: Path) -> CellResult:
        ran.append(cell.key)
        return made_up(cell, folder)

    runners = [threading.Thread(target=run_grid, args=(grid, store), kwargs={"execute": execute}) for _ in range(2)]
    for thread in runners:
        thread.start()
    for thread in runners:
        thread.join()
    assert sorted(ran) == sorted(cell.key for cell in grid.cells)


def test_two_runners_retry_each_failed_cell_once(grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store, ran = Store.open(tmp_path / "out"), []
    run_grid(grid, store, execute=lambda cell, folder: failed(cell, "crashed", "planted"))
    both = threading.Barrier(2)

    def execute(cell: Cell, folder: Path) -> CellResult:
        ran.append(cell.key)
        if len(ran) <= 2:
            both.wait(20)  # each has read what is there
        return failed(cell, "crashed", "again") if cell.names.method == "ft" else made_up(cell, folder)

    options = {"execute": execute, "retry": True}
    runners = [threading.Thread(target=run_grid, args=(grid, store), kwargs=options) for _ in range(2)]
    for thread in runners:
        thread.start()
    for thread in runners:
        thread.join()
    assert sorted(ran) == sorted(cell.key for cell in grid.cells)


def test_names_of_cells_are_not_computed_again_and_again(
    tables: dict[str, Any], made_up: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables["cells"][0]["seed"] = list(range(10))
    grid, computed = make_grid(tables, name="many", path="many.toml"), []
    monkeypatch.setattr("unpoison.benchmark.cell.digest", lambda value: computed.append(1) or digest(value))
    run_grid(grid, Store.open(tmp_path / "out"), execute=made_up)
    assert len(computed) <= 4 * len(grid.cells)


def test_a_lease_is_held_by_one_and_freed_when_its_holder_dies(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "out")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom filelock import FileLock\n"
        "folder = Path(sys.argv[1])\nlock = FileLock(folder / 'a.lock')\nlock.acquire()\n"
        "(folder / 'a.json').write_text('{\"process\": 1, \"since\": 2.0}')\nprint('held', flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(store.path / "leases")], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with store.lease("a") as ours:
        assert not ours
    assert [entry.key for entry in store.running()] == ["a"]
    other.kill()
    other.wait()
    other.stdout.close()
    assert store.running() == []
    with store.lease("a") as ours:
        assert ours
        assert [entry.process for entry in store.running()] == [os.getpid()]


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ('{"schema": "unpoison/bench", "schema_version": 99}', SchemaVersionError, "schema version 99"),
        ('{"schema": "other"}', ResultError, "expected unpoison/bench"),
        ("{", ResultError, "damaged"),
    ],
)
def test_a_folder_of_another_version_is_refused(tmp_path: Path, content: str, error: Any, said: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(error, match=said):
        Store.open(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no benchmark's results"):
        Store.open(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("retry", [False, True])
def test_results_that_cannot_be_read_are_set_aside_and_made_again(
    grid: Grid, made_up: Execute, tmp_path: Path, retry: bool
) -> None:
    store = Store.open(tmp_path / "out")
    run_grid(grid, store, execute=made_up)
    half, other, same = (store.file(cell.key) for cell in grid.cells[:3])
    contents = {half: half.read_bytes()[:100], other: other.read_bytes().replace(b'_version": 1', b'_version": 99')}
    for file, content in contents.items():
        file.write_bytes(content)
    (store.path / "cells" / f"{half.stem}.damaged").write_bytes(b"of an earlier time")
    kept = same.read_bytes()
    table = make_table(store)
    assert [entry.status for entry in table.failures] == ["damaged", "damaged"]
    assert "not JSON" in table.failures[0].reason
    assert "schema version 99" in table.failures[1].reason
    assert f"--cell {half.stem} -o {store.path}" in table.failures[0].command
    assert progress_of(store.plans()[0], store) == {"damaged": 2, "done": 10}
    assert time_left(store, store.plans()) == pytest.approx(10.0)  # a victim and a repair

    said = Said()
    done = run_grid(grid, store, execute=made_up, retry=retry, progress=said)
    assert (done.ran, done.status) == (2, {"done": 12})
    assert (half.with_suffix(".damaged-2")).read_bytes() == contents[half]
    assert (other.with_suffix(".damaged")).read_bytes() == contents[other]
    assert half.with_suffix(".damaged").read_bytes() == b"of an earlier time"
    assert same.read_bytes() == kept
    assert f"It is kept as {half.stem}.damaged-2." in "\n".join(said.lines)
    assert "not JSON" in "\n".join(said.lines)


def test_two_runners_make_a_damaged_cell_once(grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store, ran = Store.open(tmp_path / "out"), []
    run_grid(grid, store, execute=made_up)
    victim, began, ended = grid.cells[0], threading.Event(), threading.Event()
    store.file(victim.key).write_bytes(b"{")

    def slow(cell: Cell, folder: Path) -> CellResult:
        ran.append(cell.key)
        began.set()
        ended.wait(20)
        return made_up(cell, folder)

    first = threading.Thread(target=run_grid, args=(grid, store), kwargs={"execute": slow})
    other = threading.Thread(target=run_grid, args=(grid, store), kwargs={"execute": slow})
    pending = Pending.of(grid.cells, store, retry=False)
    first.start()
    assert began.wait(20)
    assert not store.has(victim.key)
    assert not pending.is_settled(victim.key, store)  # set aside is not made
    other.start()
    ended.set()
    for thread in (first, other):
        thread.join()
    assert ran == [victim.key]
    assert pending.is_settled(victim.key, store)


def test_a_result_that_another_runner_saves_while_ours_begins_counts(
    grid: Grid, made_up: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cell = Store.open(tmp_path / "out"), grid.cells[0]
    store.file(cell.key).write_bytes(b"{")
    read = runner.to_run

    def read_then_saved(cells: Sequence[Cell], store: Store, *, retry: bool) -> list[Cell]:
        left = read(cells, store, retry=retry)
        store.save(made_up(cell, store.path))
        return left

    monkeypatch.setattr(runner, "to_run", read_then_saved)
    pending = Pending.of(grid.cells, store, retry=False)
    assert cell.key in pending.cells
    assert pending.is_settled(cell.key, store)


def test_a_cell_that_took_too_long_goes_on_where_it_was(grid: Grid, made_up: Execute, tmp_path: Path) -> None:
    store, cell = Store.open(tmp_path / "out"), grid.cells[0]
    stored = store.path / "work" / cell.key / "step"

    def execute(status: str) -> Execute:
        def run(cell: Cell, folder: Path) -> CellResult:
            there.append(stored.exists())
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.touch()
            return made_up(cell, folder) if status == "done" else failed(cell, status, "planted")

        return run

    for status in ("timed out", "out of memory", "crashed"):
        there: list[bool] = []
        run_grid(grid, store, execute=execute(status), only=[cell.key], retry=True)
        assert stored.exists()
    for status in ("refused", "done"):
        there = []
        run_grid(grid, store, execute=execute(status), only=[cell.key], retry=True)
        assert there == [status == "refused"]
        assert not stored.parent.exists()


class Said(Silent):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


def test_another_grid_shares_the_folder(grid: Grid, tables: dict[str, Any], made_up: Execute, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "out")
    run_grid(grid, store, execute=made_up)
    tables["cells"][0]["seed"] = [0, 1, 2]
    more = run_grid(make_grid(tables, name="more", path="more.toml"), store, execute=made_up)
    assert (more.cells, more.ran) == (18, 6)
    assert [plan.grid for plan in store.plans()] == ["more", "tiny"]
