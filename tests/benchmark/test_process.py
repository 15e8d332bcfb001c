"""The worker process: crashes, hangs and too much memory cost one cell; it never outlives its owner."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from unpoison.benchmark import compute
from unpoison.benchmark.cell import Cell
from unpoison.benchmark.compute import try_cell
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.process import Worker
from unpoison.benchmark.store import cell_message, read_message

STAND_IN = """
import json, os, sys, time
for line in sys.stdin:
    cell = json.loads(line)["cell"]
    seed = cell["names"]["seed"]
    if seed == 1:
        print("a last word", file=sys.stderr, flush=True)
        os._exit(7)
    if seed == 2:
        time.sleep(60)
    if seed == 3:
        held = bytearray(400 << 20)
        for place in range(0, len(held), 4096):
            held[place] = 1
        time.sleep(60)
    if seed == 7:
        held = bytearray(170 << 20)
        for place in range(0, len(held), 4096):
            held[place] = 1
        time.sleep(1)
    if seed == 8:
        note = os.path.join(json.loads(line)["folder"], "shared", f"waiting-{os.getpid()}")
        os.makedirs(os.path.dirname(note), exist_ok=True)
        open(note, "w").close()
        time.sleep(3)
        os.unlink(note)
    if seed in (4, 7):
        os.kill(os.getpid(), 9)
    body = {"schema": "unpoison/bench-cell", "schema_version": 1, "key": "k", "names": cell["names"], "status": "done"}
    print("nonsense" if seed == 5 else json.dumps(body), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker(tmp_path / "logs", command=(sys.executable, "-c", STAND_IN)) as worker:
        yield worker


def cell_of(grid: Grid, seed: int) -> Cell:
    cell = grid.cells[0]
    limits = replace(cell.limits, seconds=1.5 if seed in (2, 8) else 60.0, memory=200 if seed in (3, 7) else 4000)
    return replace(cell, names=replace(cell.names, seed=seed), limits=limits)


def test_every_end_of_a_process_is_a_result(worker: Worker, grid: Grid, tmp_path: Path) -> None:
    ends = [worker(cell_of(grid, seed), tmp_path) for seed in range(8)]
    assert [end.status for end in ends] == [
        "done", "crashed", "timed out", "out of memory", "crashed", "crashed", "done",
        "out of memory",
    ]  # fmt: skip
    assert "ended with code 7" in ends[1].reason
    assert "a last word" in ends[1].hint
    assert "more than 1.5 s" in ends[2].reason
    assert "more than 200 MiB" in ends[3].reason
    assert ends[3].cost.memory > 200
    assert "SIGKILL" in ends[4].reason
    assert "cannot be read" in ends[5].reason
    assert "SIGKILL" in ends[7].reason
    assert all(end.cost.wall > 0 for end in ends)


def test_waiting_for_the_step_of_another_runner_is_no_time_of_the_cell(
    worker: Worker, grid: Grid, tmp_path: Path
) -> None:
    found = worker(cell_of(grid, 8), tmp_path)
    assert (found.status, found.reason) == ("done", "")
    assert found.cost.wall > 2
    assert worker(cell_of(grid, 2), tmp_path).status == "timed out"


def test_a_cell_passes_through_a_message_unchanged(grid: Grid, tmp_path: Path) -> None:
    for cell in grid.cells:
        again, folder, start = read_message(cell_message(cell, tmp_path))
        assert (again, again.key, folder, start) == (cell, cell.key, tmp_path, Path.cwd())


def test_errors_of_a_cell_are_its_value(grid: Grid, tmp_path: Path) -> None:
    gone = replace(grid.cells[0], data=replace(grid.cells[0].data, train=str(tmp_path / "gone.parquet")))
    refused = try_cell(gone, tmp_path)
    assert refused.status == "refused"
    assert "gone.parquet" in refused.reason
    assert refused.hint


def test_memory_that_torch_cannot_get_is_no_crash(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*arguments: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(compute, "classifier_cell", too_much)
    found = try_cell(grid.cells[0], tmp_path)
    assert (found.status, "can't allocate memory" in found.reason) == ("out of memory", True)


def test_the_worker_ends_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'unpoison.benchmark.worker'], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    child = psutil.Process(int(owner.stdout.readline()))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 100
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
