"""Rows of a benchmark's table: mean and spread over seeds, with the victim before the defense and the clean control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from unpoison.benchmark.cell import CellResult, Names
from unpoison.benchmark.settings import CLEAN, GIVEN, MEAN, Reported
from unpoison.benchmark.store import Plan, Store
from unpoison.evaluation.intervals import mean_over_seeds
from unpoison.results import Interval


@dataclass(frozen=True, kw_only=True)
class Value:
    """A mean over ``seeds``. ``std`` between seeds, None for one. ``low`` and ``high``: the 95 % interval, Student's of
    the mean over seeds, Wilson's of a rate of one seed; None where there is none."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell without figures, and why."""

    key: str
    names: Names
    status: str
    reason: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One data set, model, attack, rate and method over its seeds. ``values`` by the names of COLUMNS.

    ``n``: clean test images, ``attacked``: those that carry the trigger (0 in the clean control). ``refused``: repairs
    that the method itself did not accept. ``keys`` and ``command``: the cells, and what makes them again.
    """

    data: str
    model: str
    kind: str
    attack: str
    rate: float
    method: str
    seeds: tuple[int, ...]
    values: dict[str, Value]
    n: int
    attacked: int
    refused: int
    left_alone: int
    keys: tuple[str, ...]
    command: str

    @property
    def is_given(self) -> bool:
        return self.method == GIVEN

    @property
    def is_control(self) -> bool:
        return self.attack == CLEAN


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a paper reports of a method under an attack, in percent in its own ``setting``, and our ASR and C-Acc.

    None where a paper does not say it, or our cells have not run.
    """

    attack: str
    method: str
    asr: float | None
    c_acc: float | None
    our_asr: Value | None
    our_c_acc: Value | None
    setting: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows, in the order of the grids, and the cells that have none: failed, or still to run."""

    title: str
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    missing: int
    cells: int
    notes: tuple[str, ...]
    pictures: dict[str, str] = field(default_factory=dict)
    """A picture of each attack's trigger, as a PNG in base64."""
    reported: tuple[Comparison, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Column:
    """``of`` gives the figure of one cell: a rate with its interval, a number, or None. ``digits``: shown after the
    point."""

    name: str
    title: str
    unit: str
    of: Callable[[CellResult], Interval | float | None]
    better: str = ""
    digits: int = 1


def _rate(side: str, name: str) -> Callable[[CellResult], Interval | float | None]:
    def of(result: CellResult) -> Interval | float | None:
        figures = getattr(result, side)
        return None if figures is None else getattr(figures, name)

    return of


def _changed(result: CellResult) -> float | None:
    return None if result.repaired is None else result.repaired.changed_share


def _der(result: CellResult) -> float | None:
    return None if result.repaired is None else result.repaired.der


def processor_seconds(result: CellResult) -> float | None:
    """Of the method; for a cell that is older than the measure, its seconds by the cell's share of the processor."""
    cost = result.cost
    if result.repaired is None or cost.resumed:
        return None
    share = min(1.0, cost.cpu / cost.wall) if cost.cpu and cost.wall else 1.0
    return cost.seconds * share if cost.processor is None else cost.processor


def _seconds(result: CellResult) -> float | None:
    return None if result.repaired is None or result.cost.resumed else result.cost.seconds


def _drift(result: CellResult) -> float | None:
    drift = None if result.after is None or result.repaired is None else result.after.drift
    return None if drift is None else drift.image_raw


def _rebound(result: CellResult) -> float | None:
    rebound = None if result.repaired is None else result.repaired.rebound
    return None if rebound is None else rebound.asr_excess


def _detected(name: str) -> Callable[[CellResult], float | None]:
    return lambda result: None if result.repaired is None else result.repaired.detection.get(name)


COLUMNS = (
    Column(name="c_acc_before", title="C-Acc before", unit="%", of=_rate("before", "c_acc")),
    Column(name="c_acc", title="C-Acc", unit="%", of=_rate("after", "c_acc"), better="high"),
    Column(name="asr_before", title="ASR before", unit="%", of=_rate("before", "asr")),
    Column(name="asr", title="ASR", unit="%", of=_rate("after", "asr"), better="low"),
    Column(name="asr_floor", title="floor", unit="%", of=_rate("after", "asr_floor")),
    Column(name="asr_excess", title="excess ASR", unit="%", of=_rate("after", "asr_excess"), better="low"),
    Column(name="ra", title="RA", unit="%", of=_rate("after", "ra"), better="high"),
    Column(name="der", title="DER", unit="%", of=_der, better="high"),
    Column(name="r_at_1", title="R@1", unit="%", of=_rate("after", "image_to_text"), better="high"),
    Column(name="retrieval_asr", title="retrieval ASR", unit="%", of=_rate("after", "retrieval_asr"), better="low"),
    Column(name="rebound", title="rebound", unit="%", of=_rebound, better="low"),
    Column(name="drift", title="drift", unit="", of=_drift, better="high", digits=2),
    Column(name="auroc", title="AUROC", unit="", of=_detected("auroc"), better="high", digits=3),
    Column(name="recall", title="recall", unit="%", of=_detected("recall"), better="high"),
    Column(name="purity", title="purity", unit="%", of=_detected("target_purity"), better="high"),
    Column(name="target_found", title="target found", unit="%", of=_detected("target_found"), better="high"),
    Column(name="changed", title="changed", unit="%", of=_changed),
    Column(name="seconds", title="seconds", unit="s", of=_seconds),
    Column(name="processor", title="CPU s", unit="s", of=processor_seconds),
)


def columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The columns in which any of the rows has a figure."""
    return tuple(column for column in COLUMNS if any(column.name in row.values for row in rows))


def make_table(store: Store) -> Table:
    """The table of every grid that ran in the folder. Raises ResultError, SchemaVersionError."""
    plans = store.plans()
    planned = {cell.key: (cell, plan) for plan in plans for cell in plan.cells}
    results: dict[str, CellResult] = {key: store.load(key) for key in planned if store.has(key)}
    groups: dict[tuple[str, str, str, float, str], list[CellResult]] = {}
    for result in results.values():
        if result.after is not None and result.status == "done":
            groups.setdefault(result.names.row, []).append(result)
    order = {cell.names.row: at for at, (cell, _) in reversed(list(enumerate(planned.values())))}
    rows = [
        make_row(sorted(found, key=lambda result: result.names.seed), planned[found[0].key][0].kind)
        for _, found in sorted(groups.items(), key=lambda item: order[item[0]])
    ]
    failures = [
        Failure(key=key, names=result.names, status=result.status, reason=result.reason, command=result.command)
        for key, result in results.items()
        if result.status != "done"
    ]
    pictures = {result.names.attack: result.picture for result in results.values() if result.picture is not None}
    return Table(
        title=", ".join(plan.grid for plan in plans),
        rows=tuple(rows),
        failures=tuple(failures),
        missing=len(planned) - len(results),
        cells=len(planned),
        notes=tuple(f"{plan.grid}: {plan.not_run}" for plan in plans if plan.not_run and not results),
        pictures=pictures,
        reported=compare([entry for plan in plans for entry in plan.reported], rows),
    )


def compare(reported: Sequence[Reported], rows: Sequence[Row]) -> tuple[Comparison, ...]:
    """Each figure of a paper beside our row of that attack and method, the first where there are several; a paper's
    mean beside that over our attacked rows."""
    ours = {(row.attack, row.method): row.values for row in reversed(rows)}
    for method in {entry.method for entry in reported}:
        attacked = [row.values for row in rows if row.method == method and "asr" in row.values]
        if attacked:
            ours[MEAN, method] = {name: _mean_of([values[name] for values in attacked]) for name in ("asr", "c_acc")}
    return tuple(
        Comparison(
            attack=attack, method=entry.method, asr=entry.asr.get(attack), c_acc=entry.c_acc.get(attack),
            our_asr=ours.get((attack, entry.method), {}).get("asr"),
            our_c_acc=ours.get((attack, entry.method), {}).get("c_acc"),
            setting=entry.setting, source=entry.source,
        )
        for entry in reported
        for attack in dict.fromkeys((*entry.asr, *entry.c_acc))
    )  # fmt: skip


def _mean_of(values: Sequence[Value]) -> Value:
    """Over attacks: their spread says nothing about seeds."""
    seeds = min(value.seeds for value in values)
    return Value(mean=_mean([value.mean for value in values]), std=None, low=None, high=None, seeds=seeds)


def make_row(found: Sequence[CellResult], kind: str) -> Row:
    """The cells of one row, by seed."""
    first = found[0]
    values = {}
    for column in COLUMNS:
        figures = [value for value in map(column.of, found) if value is not None]
        if figures:
            values[column.name] = over_seeds(figures)
    after = first.after
    keys = tuple(result.key for result in found)
    head, _, rest = first.command.partition(f"--cell {first.key}")
    return Row(
        data=first.names.data,
        model=first.names.model,
        kind=kind,
        attack=first.names.attack,
        rate=first.names.rate,
        method=first.names.method,
        seeds=tuple(result.names.seed for result in found),
        values=values,
        n=0 if after is None else after.c_acc.n,
        attacked=0 if after is None or after.asr is None else after.asr.n,
        refused=sum(result.repaired is not None and not result.repaired.accepted for result in found),
        left_alone=sum(result.repaired is not None and result.repaired.left_alone for result in found),
        keys=keys,
        command=f"{head}{' '.join(f'--cell {key}' for key in keys)}{rest}" if rest else first.command,
    )


def over_seeds(figures: Sequence[Interval | float]) -> Value:
    """Mean and spread; the interval of one seed is the rate's own."""
    numbers = [figure.value if isinstance(figure, Interval) else figure for figure in figures]
    found = mean_over_seeds(numbers)
    low, high = found.low, found.high
    if found.n == 1 and isinstance(figures[0], Interval):
        low, high = figures[0].low, figures[0].high
    return Value(mean=found.mean, std=found.std, low=low, high=high, seeds=found.n)


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """A method over all attacks of one kind of model: means over rows in percent, the worst row, the clean control.

    ``fall``: points of C-Acc lost. ``rows``: how many attacked rows; ``control_fall``: the fall on the clean control.
    """

    kind: str
    method: str
    rows: int
    excess: float
    worst_excess: float
    fall: float
    worst_fall: float
    ra: float
    control_fall: float | None
    processor: float | None


def summarise(rows: Sequence[Row]) -> list[MethodSummary]:
    """Each method of each kind of model, lowest mean excess ASR first; methods with no attacked row are left out."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.method), []).append(row)
    found = []
    for (kind, method), members in groups.items():
        attacked = [row for row in members if "asr_excess" in row.values]
        if not attacked:
            continue
        control = [_fall(row) for row in members if row.is_control]
        processor = [row.values["processor"].mean for row in members if "processor" in row.values]
        falls = [_fall(row) for row in attacked]
        excess = [row.values["asr_excess"].mean for row in attacked]
        found.append(
            MethodSummary(
                kind=kind, method=method, rows=len(attacked), excess=_mean(excess), worst_excess=max(excess),
                fall=_mean(falls), worst_fall=max(falls), ra=_mean([row.values["ra"].mean for row in attacked]),
                control_fall=_mean(control) if control else None, processor=_mean(processor) if processor else None,
            )
        )  # fmt: skip
    return sorted(found, key=lambda entry: (entry.kind, entry.excess))


def progress_of(plan: Plan, store: Store) -> dict[str, int]:
    """How many of a grid's cells have which status; "to run" are those without a result."""
    counts: dict[str, int] = {}
    for cell in plan.cells:
        status = store.load(cell.key).status if store.has(cell.key) else "to run"
        counts[status] = counts.get(status, 0) + 1
    return counts


def _fall(row: Row) -> float:
    return row.values["c_acc_before"].mean - row.values["c_acc"].mean


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
