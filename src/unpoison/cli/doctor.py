"""``unpoison doctor``: is everything here that a run needs, and how fast may it get?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from unpoison.cli.options import RUNNING, Common

if TYPE_CHECKING:
    import rich.console

    from unpoison.doctor import Finding


def doctor(
    *,
    cache: Annotated[Path | None, Parameter(group=RUNNING, help="Cache folder to look at.", show_default=False)] = None,
    options: Common = Common(),
) -> int:
    """Check this installation and this machine. Exit code 2 when something that every run needs is missing."""
    from unpoison.cli import ERROR
    from unpoison.cli.console import Console
    from unpoison.cli.options import cache_folder

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.doctor import examine

        findings = examine(cache_folder(cache))
        failed = any(finding.status == "fail" for finding in findings)
        console.answer({"ok": not failed, "checks": findings}, lambda out: _show(out, findings))
    return ERROR if failed else 0


def _show(out: rich.console.Console, findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        detail = finding.found + (f"\n{finding.hint}" if finding.hint else "")
        table.add_row(Text(finding.status, style=colors[finding.status]), finding.what, detail)
    out.print(table)
