"""A benchmark's table as Markdown, CSV, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, zip_longest

import msgspec

from unpoison.benchmark.rows import COLUMNS, Column, Row, Value, attack_name, columns_of
from unpoison.benchmark.summary import MethodSummary
from unpoison.benchmark.table import SHORT, Comparison, Failure, Table, troubles
from unpoison.storage import SCHEMA_VERSION

SPREAD = (
    "Rates in percent, with 95 % intervals: Wilson's of one seed, Student's of the mean over several. ASR and floor "
    "leave the target class out; excess = ASR - floor. n: clean / attacked test images of each seed. Rows of "
    "the method none are the models as given, rows of the attack clean the control."
)
GLANCE = (
    "method",
    "excess ASR",
    "worst",
    "fall of C-Acc",
    "worst fall",
    "RA",
    "fall, clean model",
    "adaptive",
    "worst adaptive",
    "CPU s",
)
"""Of a method over its runs; adaptive: the excess ASR of attacks made against a defense."""
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
_CELLS = re.compile(r"( --cell [0-9a-f]+)+")


def shown(value: Value | None, digits: int = 1) -> str:
    """``93.1 (92.1 to 94.0)``, ``93.1`` where there is no interval, "" where there is nothing."""
    if value is None:
        return ""
    text = f"{value.mean:.{digits}f}"
    if value.low is not None and value.high is not None:
        return f"{text} ({value.low:.{digits}f} to {value.high:.{digits}f})"
    return text


def sections(table: Table) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each data set and model, with a heading."""
    key = lambda row: (row.data, row.model)  # noqa: E731
    for (data, model), rows in groupby(sorted(table.rows, key=key), key=key):
        yield f"{data}, {model}", list(rows)


def cells_of(row: Row, columns: Iterable[Column]) -> list[str]:
    """What stands in a row: its name, and its figures in these columns."""
    n = f"{row.n:,} / {row.attacked:,}" if row.attacked else f"{row.n:,}"
    return [
        attack_name(row.attack, row.rate), row.method + (" *" if row.refused else ""), str(len(row.seeds)), n,
        *(shown(row.values.get(column.name), column.digits) for column in columns),
    ]  # fmt: skip


def headings(columns: Iterable[Column]) -> list[str]:
    return ["attack", "method", "seeds", "n", *(column.title for column in columns)]


def short_keys(row: Row) -> list[str]:
    """The row's cells by the beginnings of their hashes, which --cell takes too."""
    return [key[:SHORT] for key in row.keys]


def again(rows: Iterable[Row]) -> list[str]:
    """How rows are made again: one command for all of them, or each with the cells that it is for."""
    commands: dict[str, list[str]] = {}
    for row in rows:
        if row.command:
            commands.setdefault(_CELLS.sub(" --cell CELL ...", row.command, count=1), []).extend(short_keys(row))
    if len(commands) < 2:
        return [f"A row is made again by `{command}`." for command in commands]
    return [f"`{command}` makes these cells again: {' '.join(keys)}." for command, keys in commands.items()]


def glance(entry: MethodSummary) -> list[str]:
    """A method's means, in the order of GLANCE."""
    figures = (
        entry.excess, entry.worst_excess, entry.fall, entry.worst_fall, entry.ra, entry.control_fall, entry.adaptive,
        entry.worst_adaptive,
    )  # fmt: skip
    seconds = "" if entry.processor is None else f"{entry.processor:.0f}"
    return [entry.method, *("" if figure is None else f"{figure:.1f}" for figure in figures), seconds]


def markdown(table: Table) -> str:
    lines = [SPREAD, ""]
    for summary in table.summaries:
        lines += [f"### Methods at a glance: {summary.kind}", "", summary.over, ""]
        if summary.methods:
            lines += [*bars(GLANCE, map(glance, summary.methods)), ""]
    for heading, rows in sections(table):
        columns = columns_of(rows)
        drawn = ([*cells_of(row, columns), " ".join(f"`{key}`" for key in short_keys(row))] for row in rows)
        lines += [f"### {heading}", "", *bars([*headings(columns), "cells"], drawn), ""]
    if table.reported:
        lines += ["### What papers report", "", COMPARED, "", *bars(COMPARISON, map(compared, table.reported)), ""]
    lines += [line for text in again(table.rows) for line in (text, "")]
    if any(row.refused for row in table.rows):
        lines += ["\\* not accepted by the method itself in one seed or more.", ""]
    lines += _endings(table, "- {}")
    return "\n".join(lines)


def bars(titles: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    body = ["| " + " | ".join(map(_no_bars, row)) + " |" for row in rows]
    return [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *body]


def compared(entry: Comparison) -> list[str]:
    """A paper's figures and ours, in the order of COMPARISON."""
    attack = "every attack" if entry.is_bound else entry.attack
    if entry.attacks is not None:
        attack += f", ours {'the worst ' if entry.is_bound else ''}of {entry.attacks} attacks"
    theirs = [paper_asr(entry), "" if entry.c_acc is None else f"{entry.c_acc:g}"]
    return [
        attack,
        entry.method,
        *theirs,
        shown(entry.our_asr),
        shown(entry.our_c_acc),
        entry.setting,
        entry.source,
    ]


def paper_asr(entry: Comparison) -> str:
    """``7.5``, or ``at most 1`` where the paper bounds it."""
    return "" if entry.asr is None else f"{'at most ' if entry.is_bound else ''}{entry.asr:g}"


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
    for summary in table.summaries:
        lines += [f"% Methods at a glance: {summary.kind}. {summary.over}"]
        lines += _tabular("l" + "r" * (len(GLANCE) - 1), GLANCE, map(glance, summary.methods))
    for heading, rows in sections(table):
        columns = columns_of(rows)
        drawn = [cells_of(row, columns) for row in rows]
        made = [_one_line(row.command) for row in rows]
        lines += [f"% {heading}", *_tabular("ll" + "r" * (2 + len(columns)), headings(columns), drawn, made)]
    if table.reported:
        lines += [f"% {COMPARED}", *_tabular("llrrrrll", COMPARISON, map(compared, table.reported))]
    return "\n".join([*lines, *_endings(table, "% {}")])


def _tabular(
    columns: str, headings: Iterable[str], rows: Iterable[Iterable[str]], comments: Iterable[str] = ()
) -> list[str]:
    """``comments`` follow their rows: what makes each of them again."""
    return [
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(_escaped, headings)) + " \\\\",
        "\\midrule",
        *(
            " & ".join(map(_escaped, row)) + " \\\\" + (f" % {comment}" if comment else "")
            for row, comment in zip_longest(rows, comments, fillvalue="")
        ),
        "\\bottomrule",
        "\\end{tabular}",
        "",
    ]


def as_json(table: Table) -> str:
    body = {"schema": "unpoison/bench-table", "schema_version": SCHEMA_VERSION}
    rest = msgspec.to_builtins(table)
    del rest["pictures"]
    for summary in rest["summaries"]:
        del summary["rows"]
    return msgspec.json.format(msgspec.json.encode(body | rest), indent=2).decode()


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "csv": as_csv, "latex": latex, "json": as_json}


def _endings(table: Table, line: str) -> list[str]:
    """Cells without figures, and notes."""
    found = failure_lines(table.failures)
    found += [f"{table.missing} of {table.cells} cells have not run."] if table.missing else []
    return [line.format(_one_line(text)) for text in (*found, *table.notes)]


def failure_lines(failures: Sequence[Failure]) -> list[str]:
    """What happened to each cell that failed by itself, which repairs were not tried for its sake, and what runs them
    again where that may help."""
    found = []
    for trouble in troubles(failures):
        entry, repairs = trouble.failure, [other.names.method for other in trouble.held_up]
        said = [f"{entry.key} {entry.names}: {entry.status}. {entry.reason}"]
        said += [f"Its repairs were not tried: {', '.join(repairs)}."] if repairs else []
        said += [f"Again: {trouble.again}"] if trouble.again else []
        found.append(" ".join(said))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _no_bars(text: str) -> str:
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    plain = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    return "".join(plain.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
