"""``unpoison bench``: run a grid of attacks and methods, say how far it is, show its table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from unpoison.cli.options import RUNNING, Common
from unpoison.errors import UsageError

if TYPE_CHECKING:
    import rich.console

    from unpoison.benchmark.estimate import Estimate
    from unpoison.benchmark.runner import Summary
    from unpoison.benchmark.store import Plan, Store

Format = Literal["markdown", "csv", "latex", "json", "html"]
_ENDINGS: dict[str, Format] = {".html": "html", ".md": "markdown", ".csv": "csv", ".tex": "latex", ".json": "json"}


def run(
    grid: Annotated[Path, Parameter(help="TOML file; docs/benchmark.md says what it holds.")],
    /,
    *,
    output: Annotated[
        str | None,
        Parameter(
            name=["--output", "-o"],
            group=RUNNING,
            metavar="PATH",
            show_default=False,
            help="Results folder; cells that are done there are not run again. An address such as s3://bucket/results "
            "gets them beside the default folder. [default: runs/bench-GRID]",
        ),
    ] = None,
    cell: Annotated[
        list[str] | None,
        Parameter(negative="", show_default=False, consume_multiple=True, help="Only these cells, by their hashes."),
    ] = None,
    retry: Annotated[
        bool, Parameter(negative="", show_default=False, help="Run cells again that failed before.")
    ] = False,
    dry_run: Annotated[
        bool,
        Parameter(negative="", show_default=False, group=RUNNING, help="Show cells and an estimate; write nothing."),
    ] = False,
    ray: Annotated[
        str | None,
        Parameter(
            show_default=False,
            metavar="[ADDRESS]",
            help="Run the cells as tasks of the Ray cluster at HOST:PORT or 'auto'. Last or before another option, it "
            "needs no address: one is started on this machine ('local').",
        ),
    ] = None,
    options: Common = Common(),
) -> int:
    """Run every cell of a grid that has no result yet. A killed command goes on where it was.

    The same command started twice shares the work. Exit code 3 where a cell failed.
    """
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.benchmark.grid import read_grid
        from unpoison.benchmark.mirror import MARKER, Mirror, is_url, local_copy
        from unpoison.benchmark.runner import run_grid, select_cells
        from unpoison.benchmark.store import Store

        found = read_grid(grid)
        mirror = Mirror.at(output) if output is not None and is_url(output) else None
        path = Path("runs", f"bench-{grid.stem}") if output is None or mirror is not None else Path(output)
        only = cell or []
        place = str(path) if mirror is None else mirror.url
        if dry_run:
            from unpoison.benchmark.estimate import estimate

            with local_copy(place) as folder:
                store = Store.read(folder) if (folder / MARKER).exists() else None
                guess = estimate(select_cells(found, only), store, retry=retry)
            console.answer(guess, lambda out: _show_estimate(out, guess, place))
            return 0
        if ray is not None:
            from unpoison.distributed.cells import run_grid_on_ray

            done = run_grid_on_ray(
                found, partial(Store.open, path, mirror), address=ray, only=only, retry=retry, progress=console
            )
        else:
            from unpoison.benchmark.process import Worker

            store = Store.open(path, mirror)
            with Worker(path / "logs") as worker:
                done = run_grid(found, store, execute=worker, only=only, retry=retry, progress=console)
        body = {"folder": place, "cells": done.cells, "ran": done.ran, "status": done.status}
        console.answer(body, lambda out: _show_summary(out, done, place))
    return 3 if done.failed else 0


def status(
    folder: Annotated[str | None, Parameter(help="Results folder or address. [default: the one in runs/]")] = None,
    /,
    *,
    options: Common = Common(),
) -> int:
    """How many cells are done, which run, which failed and why, and how long the rest may take."""
    from unpoison.cli.console import Console

    place = _folder(folder)
    with Console(options) as console, _results(place) as store:
        from unpoison.benchmark.estimate import time_left
        from unpoison.benchmark.table import make_table, progress_of

        plans, table = store.plans(), make_table(store)
        names = {cell.key: str(cell.names) for plan in plans for cell in plan.cells}
        running = [entry for entry in store.running() if entry.key in names]
        counts = {plan.grid: progress_of(plan, store) for plan in plans}
        left = time_left(store, plans)
        body = {
            "folder": place, "grids": counts, "seconds_left": left,
            "running": [
                {"cell": entry.key, "name": names[entry.key], "process": entry.process,
                 "seconds": time.time() - entry.since}
                for entry in running
            ],
            "failed": list(table.failures),
        }  # fmt: skip
        console.answer(body, lambda out: _show_status(out, store, plans, body))
    return 0


def table(
    folder: Annotated[str | None, Parameter(help="Results folder or address. [default: the one in runs/]")] = None,
    /,
    *,
    format: Annotated[
        Format | None,
        Parameter(show_default=False, help="How to write it. [default: as the -o file ends, else for the terminal]"),
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(name=["--output", "-o"], show_default=False, help="File to write; html is the leaderboard."),
    ] = None,
    options: Common = Common(),
) -> int:
    """The table over all seeds: models before and after each method, n, spread, intervals, the clean control."""
    from unpoison.cli.console import Console

    with Console(options) as console:
        from unpoison.benchmark.formats import FORMATS, as_json
        from unpoison.benchmark.table import make_table
        from unpoison.cli.bench_table import show_table

        chosen = format or (None if output is None else _ENDINGS.get(output.suffix.lower()))
        if output is not None and chosen is None:
            raise UsageError(f"{output}: which format?", hint=f"End it in {', '.join(_ENDINGS)}, or give --format.")
        if chosen == "html" and output is None:
            raise UsageError("the leaderboard is a file.", hint="Give -o leaderboard.html.")
        with _results(_folder(folder)) as store:
            made = make_table(store)
        if output is not None and chosen is not None:
            if chosen == "html":
                from unpoison.report.leaderboard import render_leaderboard

                text = render_leaderboard(made)
            else:
                text = FORMATS[chosen](made)
            _write(output, text)
            console.answer({"file": str(output)}, lambda out: out.print(f"Table: {output}", soft_wrap=True))
        elif chosen is not None and not options.json:
            text = FORMATS[chosen](made)
            console.answer(None, lambda out: out.print(text, soft_wrap=True, end=""))
        else:
            console.answer(as_json(made).encode(), lambda out: show_table(out, made))
    return 0


@contextmanager
def _results(place: str) -> Iterator[Store]:
    """The results in a folder or, for the time of the block, at an address."""
    from unpoison.benchmark.mirror import Mirror, is_url, local_copy
    from unpoison.benchmark.store import Store

    with local_copy(place) as path:
        yield replace(Store.read(path), mirror=Mirror.at(place) if is_url(place) else None)


def _folder(given: str | None) -> str:
    """The results folder: as given, or the only one in runs/. Raises UsageError."""
    if given is not None:
        return given
    found = sorted(marker.parent for marker in Path("runs").glob("*/bench.json"))
    if len(found) == 1:
        return str(found[0])
    listed = ", ".join(map(str, found)) or "there is none"
    raise UsageError(f"which results folder? In runs/: {listed}.", hint="Name it: unpoison bench table FOLDER.")


def _write(path: Path, text: str) -> None:
    from unpoison.storage import write_atomically

    if path.exists():
        raise UsageError(f"{path} exists.", hint="Choose another -o file; nothing was overwritten.")
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", hint="Choose another -o file.") from error


def _show_estimate(out: rich.console.Console, guess: Estimate, place: str) -> None:
    from unpoison.cli.console import duration
    from unpoison.cli.tables import plain_table

    said = ", ".join(f"{count} {name}" for name, count in {"done": guess.done, **guess.failed}.items())
    out.print(f"Nothing is written in a dry run. {guess.cells} cells; in {place}: {said}.")
    shown = plain_table("to run", "cells", "each", "together", "from", right=("cells", "each", "together"))
    for entry in guess.parts:
        times = duration(entry.seconds), duration(entry.cells * entry.seconds)
        shown.add_row(entry.what, str(entry.cells), *times, "like cells" if entry.measured else "a probe")
    out.print(shown)
    out.print(f"Time: about {duration(guess.seconds)} with one runner ({guess.basis})")


def _show_summary(out: rich.console.Console, done: Summary, place: str) -> None:
    import shlex

    said = ", ".join(f"{count} {name}" for name, count in sorted(done.status.items()))
    out.print(f"{done.cells} cells: {said or 'none'}. {done.ran} ran now.")
    folder = shlex.quote(place)
    if done.failed:
        out.print(f"Why: unpoison bench status {folder}", soft_wrap=True)
    out.print(f"Next:\n  unpoison bench table {folder} -o leaderboard.html", soft_wrap=True)


def _show_status(out: rich.console.Console, store: Store, plans: list[Plan], body: dict[str, Any]) -> None:
    from unpoison.benchmark.formats import failure_lines
    from unpoison.cli.console import duration, printable
    from unpoison.cli.tables import plain_table

    for plan in plans:
        counts = body["grids"][plan.grid]
        said = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        out.print(printable(f"{plan.grid}: {len(plan.cells)} cells: {said}"))
        if plan.not_run:
            out.print(printable(f"  {plan.not_run}"))
    if body["running"]:
        shown = plain_table("running", "since", "process")
        for entry in body["running"]:
            shown.add_row(
                printable(f"{entry['cell']} {entry['name']}"), duration(entry["seconds"]), str(entry["process"])
            )
        out.print(shown)
    for line in failure_lines(body["failed"]):
        out.print(printable(line), soft_wrap=True)
    if body["seconds_left"] is not None:
        out.print(f"Left: about {duration(body['seconds_left'])} with one runner")
