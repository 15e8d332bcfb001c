"""``unpoison schema``: the JSON Schema that a result's ``--json`` follows."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter


def schema(
    result: Annotated[Literal["model-scan"], Parameter(help="Which result.")] = "model-scan",
    /,
) -> int:
    """Print the JSON Schema of a result, for tools that read --json."""
    from unpoison.cli.console import Console
    from unpoison.cli.options import Common

    with Console(Common(json=True)) as console:
        from unpoison.schemas import read_schema

        console.answer(read_schema(result), lambda out: None)
    return 0
