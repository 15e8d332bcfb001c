"""A benchmark's results as one offline HTML file: sortable tables, frontiers, a section for each attack."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from unpoison import __version__
from unpoison.benchmark.formats import COMPARED, SPREAD, paper_asr
from unpoison.benchmark.rows import Column, Row, Value, columns_of
from unpoison.benchmark.settings import CLEAN, GIVEN, MEAN, MOST
from unpoison.benchmark.summary import Summary
from unpoison.benchmark.table import Comparison, Picture, Table, troubles
from unpoison.report import charts
from unpoison.report.html import asset, content_policy, make_environment
from unpoison.report.text import count
from unpoison.report.views import Figure

_KINDS = {"classifier": "Classifiers", "clip": "CLIP models"}


@dataclass(frozen=True, kw_only=True)
class AttackView:
    """One attack: the trigger's pictures, one for each data set and model, its rows, figures of papers."""

    anchor: str
    name: str
    pictures: list[Picture]
    rows: list[Row]
    reported: list[Comparison]


@dataclass(frozen=True, kw_only=True)
class Board:
    """One kind of model: its methods at a glance, means of papers, a frontier for each data set and model."""

    title: str
    summary: Summary
    reported: list[Comparison]
    frontiers: list[Figure]


def render_leaderboard(table: Table) -> str:
    """The whole page as text."""
    environment = make_environment()
    environment.filters |= {"figure": figure_text, "range": range_text, "value": value_text, "paper_asr": paper_asr}
    script = asset(environment, "sort.js")
    return environment.get_template("leaderboard.html.j2").render(
        table=table,
        troubles=troubles(table.failures),
        boards=[make_board(summary, table) for summary in table.summaries],
        attacks=attack_views(table),
        columns=columns_of(table.rows),
        compared=COMPARED,
        spread=SPREAD,
        tiles=[
            (count(table.cells - table.missing - len(table.failures)), "cells done", f"of {count(table.cells)}"),
            (count(len(table.failures)), "cells failed", "listed below with reasons"),
            (count(len({row.attack for row in table.rows} - {CLEAN})), "attacks", "and the clean control"),
            (count(len({row.method for row in table.rows} - {GIVEN})), "methods", "and the models as given"),
        ],
        version=__version__,
        style=Markup(asset(environment, "style.css") + asset(environment, "leaderboard.css")),  # noqa: S704 - our own
        script=Markup(script),  # noqa: S704 - our own file
        policy=content_policy(script),
    )


def make_board(summary: Summary, table: Table) -> Board:
    """What stands on top for one kind of model."""
    rows = [row for row in table.rows if row.kind == summary.kind]
    settings = dict.fromkeys((row.data, row.model) for row in rows)
    frontiers = [found for data, model in settings if (found := frontier(rows, data, model)) is not None]
    methods = {row.method for row in rows}
    reported = [entry for entry in table.reported if entry.attack in (MEAN, MOST) and entry.method in methods]
    return Board(title=_KINDS[summary.kind], summary=summary, reported=reported, frontiers=frontiers)


def frontier(rows: list[Row], data: str, model: str) -> Figure | None:
    """C-Acc against excess ASR of every attacked row of one data set and model; None where no method was tried."""
    points: dict[str, list[tuple[float, float]]] = {}
    given: list[tuple[float, float]] = []
    for row in rows:
        if (row.data, row.model) == (data, model) and "asr_excess" in row.values:
            place = (row.values["c_acc"].mean, row.values["asr_excess"].mean)
            (given if row.is_given else points.setdefault(row.method, [])).append(place)
    if not points:
        return None
    drawn = charts.frontier_chart(
        {name: sorted(found) for name, found in points.items()}, given, across="clean accuracy, %", connected=False
    )
    caption = f"{data}, {model}: clean accuracy against what is left of the attack. The lower right corner is best; "
    return Figure(svg=Markup(drawn), caption=f"{caption}each point is one attack, the mean over its seeds.")  # noqa: S704 - charts escape all text


def attack_views(table: Table) -> list[AttackView]:
    """The attacks in the table's order, the control last."""
    names = list(dict.fromkeys(row.attack for row in table.rows if not row.is_control))
    names += [CLEAN] if any(row.is_control for row in table.rows) else []
    return [
        AttackView(
            anchor=f"attack-{at}",
            name=name,
            pictures=[picture for picture in table.pictures if picture.attack == name],
            rows=[row for row in table.rows if row.attack == name],
            reported=[entry for entry in table.reported if entry.attack == name],
        )
        for at, name in enumerate(names, start=1)
    ]


def figure_text(row: Row, column: Column) -> str:
    """``93.1``, or a dash."""
    return value_text(row.values.get(column.name), column.digits)


def value_text(value: Value | float | None, digits: int = 1) -> str:
    """The mean, ``93.1``; a dash where there is none."""
    mean = value.mean if isinstance(value, Value) else value
    return "–" if mean is None else f"{mean:.{digits}f}"  # noqa: RUF001


def range_text(value: Value | None, digits: int = 1) -> str:
    """``92.1 to 94.0``, "" where there is no interval."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{value.low:.{digits}f} to {value.high:.{digits}f}"
