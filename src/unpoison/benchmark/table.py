"""A benchmark's table: its rows, the methods at a glance, what papers report, and the cells without figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unpoison.attacks.triggers import PAIR_TRIGGERS
from unpoison.benchmark.cell import ITS_VICTIM, CellResult, Names
from unpoison.benchmark.rows import Row, Value, make_row
from unpoison.benchmark.settings import GIVEN, MEAN, MOST, Reported
from unpoison.benchmark.store import Plan, Planned, Store
from unpoison.benchmark.summary import Summary, summarise

SHORT = 8
"""Digits of a hash that tables show."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell without figures, and why. ``victim``: the key of the victim for whose sake it was not tried, else ""."""

    key: str
    names: Names
    status: str
    reason: str
    command: str
    victim: str = ""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A cell that failed by itself, and the repairs that were not tried for its sake."""

    failure: Failure
    held_up: tuple[Failure, ...] = ()

    @property
    def again(self) -> str:
        """What runs it again, with what it held up, where that may come out otherwise; "" where it would not: a refusal
        stands as long as the grid does."""
        failure = self.failure
        if not failure.command or (failure.status == "refused" and not failure.victim):
            return ""
        cells = "".join(f" --cell {entry.key[:SHORT]}" for entry in self.held_up)
        return f"{failure.command.replace(f' --cell {failure.key}', cells or f' --cell {failure.key}')} --retry"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a paper reports of a method under an attack, in percent in its own ``setting``, and our ASR and C-Acc.

    None where a paper does not say it, or our cells have not run. ``attacks``: how many of ours stand beside a mean
    over the paper's, or beside a bound on each of them: then ours is the worst.
    """

    attack: str
    method: str
    asr: float | None
    c_acc: float | None
    our_asr: Value | None
    our_c_acc: Value | None
    setting: str
    source: str
    attacks: int | None = None

    @property
    def is_bound(self) -> bool:
        return self.attack == MOST


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A test image without and with an attack's trigger. ``png``: in base64; None for attacks that change no pixel."""

    data: str
    model: str
    attack: str
    png: str | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows, in the order of the grids, and the cells that have none: failed, or still to run."""

    title: str
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    missing: int
    cells: int
    notes: tuple[str, ...]
    summaries: tuple[Summary, ...] = ()
    """The methods of each kind of model, each over the same runs."""
    pictures: tuple[Picture, ...] = ()
    reported: tuple[Comparison, ...] = ()


def make_table(store: Store) -> Table:
    """The table of every grid that ran in the folder. Raises ResultError, SchemaVersionError."""
    plans = store.plans()
    planned = {cell.key: (cell, plan) for plan in plans for cell in plan.cells}
    kept = {key: store.found(key, cell.names) for key, (cell, _) in planned.items()}
    results = {key: result for key, result in kept.items() if result is not None}
    groups: dict[tuple[str, str, str, float, str], list[CellResult]] = {}
    for result in results.values():
        if result.after is not None and result.status == "done":
            groups.setdefault(result.names.row, []).append(result)
    order = {cell.names.row: at for at, (cell, _) in reversed(list(enumerate(planned.values())))}
    rows = [
        make_row(sorted(found, key=lambda result: result.names.seed), planned[found[0].key][0].kind)
        for _, found in sorted(groups.items(), key=lambda item: order[item[0]])
    ]
    failures = [_failure(result, *planned[key], store) for key, result in results.items() if result.status != "done"]
    kinds = dict.fromkeys(cell.kind for cell, _ in planned.values())
    summaries = tuple(summarise(kind, [cell for cell, _ in planned.values()], results) for kind in kinds)
    return Table(
        title=", ".join(plan.grid for plan in plans),
        rows=tuple(rows),
        failures=tuple(failures),
        missing=len(planned) - len(results),
        cells=len(planned),
        notes=tuple(f"{plan.grid}: {plan.not_run}" for plan in plans if plan.not_run and not results),
        summaries=summaries,
        pictures=pictures_of(results),
        reported=compare([entry for plan in plans for entry in plan.reported], rows, summaries),
    )


def _failure(result: CellResult, cell: Planned, plan: Plan, store: Store) -> Failure:
    return Failure(
        key=result.key, names=result.names, status=result.status, reason=result.reason,
        command=result.command or store.command(plan.path, cell.key),
        victim=cell.given if result.status == "refused" and result.reason.startswith(ITS_VICTIM) else "",
    )  # fmt: skip


def troubles(failures: Sequence[Failure]) -> list[Trouble]:
    """Each failure once: repairs that were not tried stand with their victim as long as it has failed."""
    own = {entry.key for entry in failures if not entry.victim}
    return [
        Trouble(failure=entry, held_up=tuple(other for other in failures if other.victim == entry.key))
        for entry in failures
        if entry.victim not in own
    ]


def pictures_of(results: Mapping[str, CellResult]) -> tuple[Picture, ...]:
    """The first picture of each attack on each data set and model; an attack whose cells kept none has no entry."""
    found: dict[tuple[str, str, str], Picture] = {}
    for result in results.values():
        names, attack = result.names, result.inputs.get("attack")
        still = attack is not None and attack["trigger"] in PAIR_TRIGGERS
        if names.method == GIVEN and (still or result.picture is not None):
            made = Picture(data=names.data, model=names.model, attack=names.attack, png=result.picture)
            found.setdefault((names.data, names.model, names.attack), made)
    return tuple(found.values())


def compare(
    reported: Sequence[Reported], rows: Sequence[Row], summaries: Sequence[Summary] = ()
) -> tuple[Comparison, ...]:
    """Each figure of a paper beside our row of that attack and method, the first where there are several; a paper's
    mean beside that over the runs in which our methods are compared, its bound beside the worst attack of these."""
    ours = {(row.attack, row.method): row.values for row in reversed(rows)}
    attacks: dict[str, int] = {}
    for method in {entry.method for entry in reported}:
        compared = [row.values for summary in summaries for row in summary.rows if row.method == method]
        if compared:
            attacks[method] = len(compared)
            ours[MOST, method] = {"asr": max((values["asr"] for values in compared), key=lambda value: value.mean)}
            ours[MEAN, method] = {name: _mean_of([values[name] for values in compared]) for name in ("asr", "c_acc")}
    return tuple(
        Comparison(
            attack=attack, method=entry.method, asr=entry.asr.get(attack), c_acc=entry.c_acc.get(attack),
            our_asr=ours.get((attack, entry.method), {}).get("asr"),
            our_c_acc=ours.get((attack, entry.method), {}).get("c_acc"),
            setting=entry.setting, source=entry.source,
            attacks=attacks.get(entry.method) if attack in (MEAN, MOST) else None,
        )
        for entry in reported
        for attack in dict.fromkeys((*entry.asr, *entry.c_acc))
    )  # fmt: skip


def _mean_of(values: Sequence[Value]) -> Value:
    """Over attacks: their spread says nothing about seeds."""
    mean = sum(value.mean for value in values) / len(values)
    return Value(mean=mean, std=None, low=None, high=None, seeds=min(value.seeds for value in values))


def progress_of(plan: Plan, store: Store) -> dict[str, int]:
    """How many of a grid's cells have which status; "to run" are those without a result."""
    counts: dict[str, int] = {}
    for cell in plan.cells:
        found = store.found(cell.key, cell.names)
        status = "to run" if found is None else found.status
        counts[status] = counts.get(status, 0) + 1
    return counts
