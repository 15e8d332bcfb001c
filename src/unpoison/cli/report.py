"""``unpoison report``: one offline HTML file about one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from unpoison.cli.options import Common


def report(
    run: Annotated[Path, Parameter(help="Run folder, or the JSON file of one result.")],
    /,
    *more: Annotated[Path, Parameter(name="RUN", help="More of them.")],
    output: Annotated[
        Path, Parameter(name=["--output", "-o"], help="New HTML file; an existing one is refused.")
    ] = Path("report.html"),
    options: Common = Common(),
) -> int:
    """Write one offline HTML file about one or more runs."""
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.errors import UsageError
        from unpoison.report.html import write_report
        from unpoison.report.runs import read_runs

        if output.exists():
            raise UsageError(f"{output} exists.", hint="Choose another -o file; nothing was overwritten.")
        runs = [found for path in (run, *more) for found in read_runs(path)]
        write_report(output, runs)
        console.answer(
            {"file": str(output), "runs": [str(path) for path in (run, *more)]},
            lambda out: out.print(f"Report: {output}", soft_wrap=True),
        )
    return 0
