"""Rows of a benchmark's table: one data set, model, attack, rate and method, with mean and interval over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unpoison.benchmark.cell import CellResult
from unpoison.benchmark.settings import CLEAN, GIVEN
from unpoison.evaluation.intervals import mean_over_seeds
from unpoison.results import Interval


@dataclass(frozen=True, kw_only=True)
class Value:
    """A mean over ``seeds``. ``std`` between seeds, None for one. ``low`` and ``high``: the 95 % interval, Student's of
    the mean over seeds, cut at what the figure can be, Wilson's of a rate of one seed; None where there is none."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: int


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
class Column:
    """``of`` gives the figure of one cell: a rate with its interval, a number, or None. ``digits``: shown after the
    point. ``limits``: what the figure can be, where an interval is cut; None: it is given no interval."""

    name: str
    title: str
    unit: str
    of: Callable[[CellResult], Interval | float | None]
    better: str = ""
    digits: int = 1
    limits: tuple[float, float] | None = (0.0, 100.0)


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
    Column(name="drift", title="drift", unit="", of=_drift, better="high", digits=2, limits=(-1.0, 1.0)),
    Column(name="auroc", title="AUROC", unit="", of=_detected("auroc"), better="high", digits=3, limits=(0.0, 1.0)),
    Column(name="recall", title="recall", unit="%", of=_detected("recall"), better="high"),
    Column(name="precision", title="precision", unit="%", of=_detected("precision"), better="high"),
    Column(name="purity", title="purity", unit="%", of=_detected("target_purity"), better="high"),
    Column(name="target_found", title="target found", unit="%", of=_detected("target_found"), better="high"),
    Column(name="target_exact", title="nothing else", unit="%", of=_detected("target_exact"), better="high"),
    Column(name="unlearnt", title="unlearnt", unit="%", of=_detected("unlearnt"), better="low", digits=2),
    Column(name="changed", title="changed", unit="%", of=_changed),
    Column(name="seconds", title="seconds", unit="s", of=_seconds, limits=None),
    Column(name="processor", title="CPU s", unit="s", of=processor_seconds, limits=None),
)


def columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The columns in which any of the rows has a figure."""
    return tuple(column for column in COLUMNS if any(column.name in row.values for row in rows))


def make_row(found: Sequence[CellResult], kind: str) -> Row:
    """The cells of one row, by seed."""
    first = found[0]
    values = {}
    for column in COLUMNS:
        figures = [value for value in map(column.of, found) if value is not None]
        if figures:
            values[column.name] = over_seeds(figures, column.limits)
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


def over_seeds(figures: Sequence[Interval | float], limits: tuple[float, float] | None) -> Value:
    """Mean and spread; the interval of one seed is the rate's own, that of several is cut at ``limits`` (None: there is
    no interval)."""
    numbers = [figure.value if isinstance(figure, Interval) else figure for figure in figures]
    found = mean_over_seeds(numbers)
    low, high = found.low, found.high
    if limits is None:
        low = high = None
    elif low is not None and high is not None:
        low, high = max(low, limits[0]), min(high, limits[1])
    elif isinstance(figures[0], Interval):
        low, high = figures[0].low, figures[0].high
    return Value(mean=found.mean, std=found.std, low=low, high=high, seeds=found.n)


def attack_name(attack: str, rate: float) -> str:
    """``badnet 5 %``; the control has no rate."""
    return attack if attack == CLEAN else f"{attack} {100 * rate:g} %"
