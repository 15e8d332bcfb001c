"""Grid cells on a local Ray cluster of two workers, with made-up figures: no model is trained here."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.grid import Grid, make_grid
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.process import Worker
from unpoison.benchmark.runner import run_grid
from unpoison.benchmark.store import Store, cell_message
from unpoison.distributed import cells
from unpoison.distributed.cells import result_of, run_grid_on_ray
from unpoison.distributed.cluster import check_answers
from unpoison.errors import UsageError
from unpoison.storage import from_json

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own: sockets and processes that it leaves to the interpreter


def stand_in(message: bytes) -> bytes:
    """A result that follows from the cell's names; the first try of one cell loses its worker."""
    import json
    import os
    from pathlib import Path

    body = json.loads(message)
    names, folder = body["cell"]["names"], Path(body["folder"])
    if names["method"] == "ft" and names["seed"] == 1:
        try:
            (folder / f"lost-{names['attack']}").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os._exit(1)
    (folder / f"process-{os.getpid()}").touch()
    rate = {"value": 90.0 - names["seed"], "low": 80.0, "high": 95.0, "n": 100}
    figures = {"c_acc": rate}
    made = {"key": body["key"], "names": names, "status": "done", "before": figures, "after": figures}
    return json.dumps({"schema": "unpoison/bench-cell", "schema_version": 1} | made).encode()


@pytest.fixture
def by_value() -> Iterator[None]:
    """Workers cannot import this file: what it defines travels with the task."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


def small(grid: Grid) -> Grid:
    """Cells that ask for little memory: the machine may be busy."""
    return replace(
        grid, cells=tuple(replace(cell, limits=replace(cell.limits, memory=100)) for cell in grid.cells)
    )  # fmt: skip


def kept(store: Store) -> dict[str, Any]:
    """Every result without when and where it was made."""
    found = {file.stem: json.loads(file.read_bytes()) for file in sorted((store.path / "cells").glob("*.json"))}
    for body in found.values():
        for name in ("finished", "command"):
            del body[name]
    return found


def test_a_lost_worker_costs_nothing_and_results_equal_those_of_one_process(
    tables: dict[str, Any], tmp_path: Path, by_value: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # "local" joins no cluster that the environment names
    grid = small(make_grid(tables, name="tiny", path="tiny.toml"))
    alone, spread = Store.open(tmp_path / "alone"), Store.open(tmp_path / "spread")
    for seed in ("clean", "badnet"):
        (alone.path / f"lost-{seed}").touch()

    def execute(cell: Cell, folder: Path) -> CellResult:
        return from_json(stand_in(message_of(cell, folder)), CellResult)

    run_grid(grid, alone, execute=execute)
    done = run_grid_on_ray(grid, lambda: spread, address="local", processors=2, compute=with_key(grid))
    assert (done.cells, done.ran, done.status) == (12, 12, {"done": 12})
    assert {file.name for file in spread.path.glob("lost-*")} == {"lost-clean", "lost-badnet"}
    assert not (spread.path / f"process-{os.getpid()}").exists()
    assert len(list(spread.path.glob("process-*"))) >= 2
    assert kept(spread) == kept(alone)
    assert spread.running() == []
    assert not ray.is_initialized()


def message_of(cell: Cell, folder: Path) -> bytes:
    from unpoison.benchmark.store import cell_message

    return json.dumps(json.loads(cell_message(cell, folder)) | {"key": cell.key}).encode()


def with_key(grid: Grid) -> Callable[[bytes], bytes]:
    """The stand-in, told the cells' hashes, which it cannot compute without the package."""
    keys = {json.dumps(json.loads(message_of(cell, Path()))["cell"]["names"]): cell.key for cell in grid.cells}

    def compute(message: bytes) -> bytes:
        import json

        body = json.loads(message)
        return stand_in(json.dumps(body | {"key": keys[json.dumps(body["cell"]["names"])]}).encode())

    return compute


def answering(message: bytes) -> bytes:
    """Answers of a node that is not what it should be, by the seed."""
    import json

    seed = json.loads(message)["cell"]["names"]["seed"]
    if seed == 0:
        return b'{"schema": "unpoison/bench-cell", "schema_version": 99}'
    raise ValueError("no room on this node\nsecond line")


def test_answers_that_cannot_be_used_cost_their_cells_alone_and_waiting_costs_nothing(
    tables: dict[str, Any], tmp_path: Path, by_value: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del tables["reported"]
    tables["cells"][0] |= {"attack": ["clean"], "method": ["none"], "seed": [0, 1, 2]}
    grid, store = small(make_grid(tables, name="tiny", path="tiny.toml")), Store.open(tmp_path / "out")
    first, second, other = grid.cells
    looked: list[str] = []
    plain = Store.stamp
    monkeypatch.setattr(Store, "stamp", lambda store, key: looked.append(key) or plain(store, key))

    def another_runner() -> None:
        with store.lease(other.key) as ours:
            assert ours
            held.set()
            while not store.has(second.key) or not store.has(first.key):
                time.sleep(0.1)
            before = len(looked)
            time.sleep(3.5)
            counted.append(len(looked) - before)
            store.save(failed(other, "crashed", "by the other runner"))

    held, counted = threading.Event(), []
    runner = threading.Thread(target=another_runner)
    runner.start()
    assert held.wait(10)
    done = run_grid_on_ray(grid, lambda: store, address="local", processors=1, compute=answering)
    runner.join()
    assert (done.ran, done.status) == (2, {"crashed": 3})
    assert "schema version 99" in store.load(first.key).reason
    assert "version of unpoison" in store.load(first.key).hint
    assert store.load(second.key).reason == "ValueError: no room on this node"
    assert counted[0] < 20


def test_a_node_without_memory_is_no_crash(grid: Grid) -> None:
    class Killed:
        exceptions = ray.exceptions

        @staticmethod
        def get(future: Any) -> bytes:
            raise ray.exceptions.OutOfMemoryError("\x1b[36mTask was killed\x1b[39m due to the node running low.")

    result = result_of(Killed, None, grid.cells[0])
    assert (result.status, result.reason) == (
        "out of memory", "Its node ran out of memory: Task was killed due to the node running low"
    )  # fmt: skip


HERE = """
import json, os, sys
for line in sys.stdin:
    names = json.loads(line)["cell"]["names"]
    body = {"schema": "unpoison/bench-cell", "schema_version": 1, "key": "k", "names": names, "status": "done"}
    print(json.dumps(body | {"reason": os.getcwd()}), flush=True)
"""


def test_relative_paths_start_where_the_grid_was_started(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("start", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(cells, "Worker", partial(Worker, command=(sys.executable, "-c", HERE)))
    monkeypatch.chdir(tmp_path / "start")
    message = cell_message(grid.cells[0], tmp_path / "out")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert from_json(cells.compute_message(message), CellResult).reason == str(tmp_path / "start")
    (tmp_path / "start").rmdir()
    assert from_json(cells.compute_message(message), CellResult).reason == str(tmp_path / "elsewhere")


def test_an_address_that_does_not_answer_is_said(grid: Grid, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    said = {f"127.0.0.1:{port}": "ray start --head", f"ray://127.0.0.1:{port}": "ray job submit"}
    for address, hint in said.items():
        with pytest.raises(UsageError, match=r"no Ray cluster answers at|Ray's client is not used") as caught:
            run_grid_on_ray(grid, partial(Store.open, tmp_path / "out"), address=address)
        assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        check_answers("somewhere")
