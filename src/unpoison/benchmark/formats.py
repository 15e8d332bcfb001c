"""A benchmark's table as Markdown, CSV, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import msgspec

from unpoison.benchmark.settings import CLEAN
from unpoison.benchmark.table import COLUMNS, Column, Comparison, Row, Table, Value, columns_of
from unpoison.storage import SCHEMA_VERSION

SPREAD = (
    "Rates in percent: mean ± standard deviation over seeds; of one seed the 95 % interval (Wilson). ASR and floor "
    "leave the target class out; excess = ASR - floor. n: clean / attacked test images of each seed. Rows of "
    "the method none are the models as given, rows of the attack clean the control."
)
COMPARED = (
    "Papers use other models and data: their figures say what a method is known to do, not what it should do here."
)
COMPARISON = (
    "attack",
    "method",
    "ASR, paper",
    "C-Acc, paper",
    "ASR, ours",
    "C-Acc, ours",
    "the paper's setting",
    "source",
)
_SHORT = 8


def shown(value: Value | None, digits: int = 1) -> str:
    """``93.1 ± 0.4``, of one seed ``93.1 (92.1 to 94.0)``, "" where there is nothing."""
    if value is None:
        return ""
    text = f"{value.mean:.{digits}f}"
    if value.std is not None:
        return f"{text} ± {value.std:.{digits}f}"
    if value.low is not None and value.high is not None:
        return f"{text} ({value.low:.{digits}f} to {value.high:.{digits}f})"
    return text


def attack_name(row: Row) -> str:
    """``badnet 5 %``; the control has no rate."""
    return row.attack if row.attack == CLEAN else f"{row.attack} {100 * row.rate:g} %"


def sections(table: Table) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each data set and model, with a heading."""
    key = lambda row: (row.data, row.model)  # noqa: E731
    for (data, model), rows in groupby(sorted(table.rows, key=key), key=key):
        yield f"{data}, {model}", list(rows)


def cells_of(row: Row, columns: Iterable[Column]) -> list[str]:
    """What stands in a row: its name, and its figures in these columns."""
    n = f"{row.n:,} / {row.attacked:,}" if row.attacked else f"{row.n:,}"
    return [
        attack_name(row), row.method + (" *" if row.refused else ""), str(len(row.seeds)), n,
        *(shown(row.values.get(column.name), column.digits) for column in columns),
    ]  # fmt: skip


def headings(columns: Iterable[Column]) -> list[str]:
    return ["attack", "method", "seeds", "n", *(column.title for column in columns)]


def markdown(table: Table) -> str:
    lines = [SPREAD, ""]
    for heading, rows in sections(table):
        columns = columns_of(rows)
        titles = [*headings(columns), "cells"]
        lines += [f"### {heading}", "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
        for row in rows:
            keys = " ".join(f"`{key[:_SHORT]}`" for key in row.keys)
            lines.append("| " + " | ".join([*map(_no_bars, cells_of(row, columns)), keys]) + " |")
        lines.append("")
    if table.reported:
        lines += [
            "### What papers report",
            "",
            COMPARED,
            "",
            f"| {' | '.join(COMPARISON)} |",
            "|---" * len(COMPARISON) + "|",
        ]
        lines += ["| " + " | ".join(map(_no_bars, compared(entry))) + " |" for entry in table.reported]
        lines.append("")
    if table.rows:
        head = table.rows[0].command.partition(" --cell ")[0]
        folder = table.rows[0].command.rpartition(" -o ")[2]
        lines += [f"A row is made again by `{head} --cell CELL ... -o {folder}`.", ""]
    if any(row.refused for row in table.rows):
        lines += ["\\* not accepted by the method itself in one seed or more.", ""]
    lines += _endings(table, "- {}")
    return "\n".join(lines)


def compared(entry: Comparison) -> list[str]:
    """A paper's figures and ours, in the order of COMPARISON."""
    theirs = ("" if value is None else f"{value:g}" for value in (entry.asr, entry.c_acc))
    return [
        entry.attack,
        entry.method,
        *theirs,
        shown(entry.our_asr),
        shown(entry.our_c_acc),
        entry.setting,
        entry.source,
    ]


def as_csv(table: Table) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    names = (
        "data",
        "model",
        "kind",
        "attack",
        "rate",
        "method",
        "seeds",
        "n",
        "attacked",
        "not_accepted",
        "left_alone",
    )
    parts = ("mean", "std", "low", "high")
    writer.writerow([*names, *(f"{column.name}_{part}" for column in COLUMNS for part in parts), "cells", "command"])
    for row in table.rows:
        values = [row.values.get(column.name) for column in COLUMNS]
        writer.writerow(
            [
                row.data, row.model, row.kind, row.attack, row.rate, row.method, len(row.seeds), row.n, row.attacked,
                row.refused, row.left_alone,
                *("" if value is None else _number(getattr(value, part)) for value in values for part in parts),
                " ".join(row.keys), row.command,
            ]
        )  # fmt: skip
    return sink.getvalue()


def latex(table: Table) -> str:
    lines = [f"% {SPREAD}"]
    for heading, rows in sections(table):
        columns = columns_of(rows)
        drawn = (cells_of(row, columns) for row in rows)
        lines += [f"% {heading}", *_tabular("ll" + "r" * (2 + len(columns)), headings(columns), drawn)]
    if table.reported:
        lines += [f"% {COMPARED}", *_tabular("llrrrrll", COMPARISON, map(compared, table.reported))]
    return "\n".join([*lines, *_endings(table, "% {}")])


def _tabular(columns: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    return [
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(_escaped, headings)) + " \\\\",
        "\\midrule",
        *(" & ".join(map(_escaped, row)) + " \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "",
    ]


def as_json(table: Table) -> str:
    body = {"schema": "unpoison/bench-table", "schema_version": SCHEMA_VERSION}
    rest = msgspec.to_builtins(table)
    del rest["pictures"]
    return msgspec.json.format(msgspec.json.encode(body | rest), indent=2).decode()


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "csv": as_csv, "latex": latex, "json": as_json}


def _endings(table: Table, line: str) -> list[str]:
    """Cells without figures, and notes."""
    found = [f"{entry.key} {entry.names}: {entry.status}. {entry.reason}" for entry in table.failures]
    found += [f"{table.missing} of {table.cells} cells have not run."] if table.missing else []
    return [line.format(text.replace("\n", " ")) for text in (*found, *table.notes)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _no_bars(text: str) -> str:
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    plain = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    return "".join(plain.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
