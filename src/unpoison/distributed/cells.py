"""Grid cells as Ray tasks: any number of machines, the results of one.

The runner that calls this holds the leases, sends each cell as a task and writes what comes back. A task computes its
cell in a process of its own, so that a crash, a hang or too much memory is the cell's value; a task whose worker or
node is lost is tried again. Nothing but the cell's settings goes out and nothing but its JSON comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from unpoison.benchmark.cell import Cell, CellResult
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.outcomes import failed
from unpoison.benchmark.process import Worker
from unpoison.benchmark.runner import Pending, Summary, describe, finish, make_room, select_cells, summary, unfit
from unpoison.benchmark.store import Store, cell_message, read_message
from unpoison.distributed.cluster import cluster, reason_of
from unpoison.errors import ResultError, UsageError
from unpoison.runs import Progress, Silent
from unpoison.storage import from_json, to_json

RETRIES = 3
_POLL = 1.0
_AT_WORK = 500  # each holds a lock file open


def run_grid_on_ray(
    grid: Grid,
    open_store: Callable[[], Store],
    *,
    address: str,
    only: Sequence[str] = (),
    retry: bool = False,
    progress: Progress | None = None,
    processors: int | None = None,
    compute: Callable[[bytes], bytes] | None = None,
) -> Summary:
    """:func:`unpoison.benchmark.runner.run_grid` with the cells as tasks of the Ray cluster at ``address``.

    ``open_store`` is called once a cluster answers: without one no folder is made. "local" starts one on this machine
    with ``processors`` (all by default) and ends it afterwards. ``compute``: what a task does, :func:`compute_message`
    unless another is given. Raises MissingExtraError without Ray, UsageError where no cluster answers or none of its
    nodes has what a cell asks for.
    """
    progress = progress or Silent()
    wanted = select_cells(grid, only)
    with cluster(address, processors) as ray:
        store = open_store()
        store.keep_plan(grid)
        task = ray.remote(compute or compute_message)
        pending = Pending.of(wanted, store, retry=retry)
        check_fits(ray, list(pending.cells.values()))
        at_work: dict[Any, tuple[Cell, ExitStack]] = {}
        ran = 0
        try:
            while pending.cells or at_work:
                busy, before = {cell.key for cell, _ in at_work.values()}, len(pending.cells)
                for key, cell in list(pending.cells.items()):
                    if pending.is_settled(key, store):
                        pending.remove(key)
                        continue
                    if pending.waits(key) or pending.victims[key] in busy or len(at_work) >= _AT_WORK:
                        continue
                    lease = ExitStack()
                    if not lease.enter_context(store.lease(key)):
                        lease.close()
                        continue
                    pending.remove(key)
                    store.refresh(key)
                    if pending.is_settled(key, store):
                        lease.close()
                        continue
                    refused = unfit(cell, store)
                    if refused is not None:
                        with lease:
                            store.save(finish(refused, cell, grid, store))
                        ran += 1
                        continue
                    progress.log(f"{key} {cell.names}")
                    make_room(cell, store, progress)
                    asked = task.options(**resources(cell), max_retries=RETRIES, name=f"cell {key}")
                    at_work[asked.remote(cell_message(cell, store.path.resolve()))] = cell, lease
                    busy.add(key)
                if not at_work and len(pending.cells) == before:
                    time.sleep(_POLL)  # other runners hold what is left
                done, _ = ray.wait(list(at_work), timeout=_POLL) if at_work else ([], [])
                for future in done:
                    cell, lease = at_work.pop(future)
                    with lease:
                        store.save(finish(result_of(ray, future, cell), cell, grid, store))
                    ran += 1
                    progress.log(f"  {cell.key} {describe(store.load(cell.key))}")
        finally:
            for future, (_, lease) in at_work.items():
                ray.cancel(future, force=True)
                lease.close()
    return summary(wanted, store, ran)


def compute_message(message: bytes) -> bytes:
    """One cell in a process of this task's own: what Ray runs. Its answer is the result's JSON.

    Relative paths start where the grid was started, wherever Ray itself was; a node without that folder has none.
    """
    cell, folder, start = read_message(message)
    folder.mkdir(parents=True, exist_ok=True)
    with Worker(folder / "logs", start=start if start.is_dir() else None) as worker:
        return to_json(worker(cell, folder))


def resources(cell: Cell) -> dict[str, Any]:
    """What a cell's task asks of a node. Its limit of memory is a bound, not a need: half of it is asked for."""
    return {
        "num_cpus": cell.limits.threads, "num_gpus": cell.model.gpus, "memory": cell.limits.memory * 2**20 // 2,
    }  # fmt: skip


def check_fits(ray: Any, cells: Sequence[Cell]) -> None:
    """Raises UsageError for a cell that no node could ever run: Ray would wait for one forever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    for cell in cells:
        asked = {names[key]: value for key, value in resources(cell).items() if value}
        if not any(all(node.get(name, 0) >= value for name, value in asked.items()) for node in nodes):
            raise UsageError(
                f"no node of the Ray cluster has what the cell {cell.names} asks for: {asked}.",
                hint="Lower limits.threads or limits.memory (half of it is asked for, in bytes), or gpus, in the grid.",
            )


def result_of(ray: Any, future: Any, cell: Cell) -> CellResult:
    """The cell's result. Whatever comes back in its place is the cell's value."""
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError)
    try:
        return from_json(ray.get(future), CellResult, name=f"cell {cell.key}")
    except ResultError as error:
        hint = "Every node needs the version of unpoison that runs the grid."
        return failed(cell, "crashed", f"The answer of its node cannot be read: {error.message}", hint)
    except ray.exceptions.OutOfMemoryError as error:
        hint = "Give its node more memory, or raise limits.memory, so that fewer cells share it."
        return failed(cell, "out of memory", f"Its node ran out of memory: {reason_of(error)}", hint)
    except lost as error:
        return failed(cell, "crashed", f"Ray lost it {RETRIES + 1} times: {reason_of(error)}")
    except ray.exceptions.RayError as error:
        return failed(cell, "crashed", reason_of(error))


__all__ = ["compute_message", "run_grid_on_ray"]
