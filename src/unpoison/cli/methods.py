"""``unpoison methods``: what there is, what it needs, where it comes from."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from unpoison.catalog import ATTACKS, DEFENSES, DETECTORS
from unpoison.cli.options import Common

if TYPE_CHECKING:
    import rich.console


def methods(*, options: Common = Common()) -> int:
    """List the attacks, detectors and defenses with what each needs and its paper."""
    from unpoison.cli.console import Console

    with Console(options) as console:
        lists = {"attacks": ATTACKS, "detectors": DETECTORS, "defenses": DEFENSES}
        console.answer({name: [asdict(entry) for entry in entries] for name, entries in lists.items()}, _show)
    return 0


def _show(out: rich.console.Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), show_header=False)
    for entry in (*ATTACKS, *DETECTORS, *DEFENSES):
        lines = [entry.idea, f"Needs: {', '.join(entry.needs)}.", entry.paper, entry.link]
        table.add_row(entry.kind, entry.name, "\n".join(lines))
    out.print(table)
