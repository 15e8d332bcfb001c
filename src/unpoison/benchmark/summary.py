"""Methods at a glance: each over the same runs (data set, model, attack, rate, seed) as every method beside it.

A mean over other attacks or seeds is no comparison. Which runs count follows from the plans: those that all methods of
one kind of model are planned for, as far as all of them have figures. Attacks that are made against a defense count
apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from unpoison.benchmark.cell import CellResult, Names
from unpoison.benchmark.rows import Row, attack_name, make_row
from unpoison.benchmark.settings import CLEAN
from unpoison.benchmark.store import Planned

ENOUGH = 0.5
"""Of the attacks of the method with the most: one that is planned for no more than this share is not compared."""
Trial = tuple[str, str, str, float, int]
"""Data set, model, attack, rate and seed."""


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """A method over the runs that are compared: means over attacks in percent, and the worst attack.

    ``fall``: points of C-Acc lost; ``control_fall``: the same on the clean control. ``adaptive``: excess ASR over the
    attacks that are made against a defense. None where it has no such figure.
    """

    method: str
    excess: float
    worst_excess: float
    fall: float
    worst_fall: float
    ra: float
    control_fall: float | None
    adaptive: float | None
    worst_adaptive: float | None
    processor: float | None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The runs that all ``methods`` have, and how many they are ``planned`` to have. ``few``: methods planned for too
    few of the attacks to be compared; ``waiting``: those without any figure yet."""

    methods: tuple[str, ...]
    runs: frozenset[Trial]
    planned: int
    few: tuple[str, ...]
    waiting: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The methods of one kind of model, lowest mean excess ASR first, and a sentence that says what they are over.

    ``rows``: what is averaged, attacks that are not adaptive.
    """

    kind: str
    methods: tuple[MethodSummary, ...]
    over: str
    rows: tuple[Row, ...] = ()


def summarise(kind: str, planned: Sequence[Planned], results: Mapping[str, CellResult]) -> Summary:
    """The summary of one ``kind`` of model. ``results``: of the cells that have one, done or not, by their keys."""
    cells = [cell for cell in planned if cell.kind == kind]
    done = {
        cell.key: results[cell.key]
        for cell in cells
        if cell.key in results and results[cell.key].status == "done" and results[cell.key].after is not None
    }
    unmeasured = {
        result.names.attack for result in done.values() if result.after is not None and result.after.asr_excess is None
    }  # attacks of retrieval alone, and the control
    against = {cell.names.attack for cell in cells if cell.is_adaptive}
    attacks = {cell.names.attack for cell in cells} - {CLEAN}
    usual = shared_runs(cells, done, attacks - against - unmeasured)
    adaptive = shared_runs(cells, done, against - unmeasured)
    control = shared_runs(cells, done, {CLEAN})
    rows = _rows(kind, usual, done)
    hard, clean = _by_method(_rows(kind, adaptive, done)), _by_method(_rows(kind, control, done))
    found = [
        _summary(method, members, clean.get(method, []), hard.get(method, []))
        for method, members in _by_method(rows).items()
    ]
    found.sort(key=lambda entry: entry.excess)
    return Summary(kind=kind, methods=tuple(found), over=_sentence(usual, adaptive), rows=tuple(rows))


def shared_runs(cells: Sequence[Planned], done: Mapping[str, CellResult], attacks: Collection[str]) -> Shared:
    """The runs under ``attacks`` that all methods have which are planned for enough of them and have any figure."""
    wanted: dict[str, set[Trial]] = {}
    have: dict[str, set[Trial]] = {}
    for cell in cells:
        if cell.names.attack in attacks:
            wanted.setdefault(cell.names.method, set()).add(_trial(cell.names))
            if cell.key in done:
                have.setdefault(cell.names.method, set()).add(_trial(cell.names))
    width = {method: len({run[2] for run in runs}) for method, runs in wanted.items()}
    most = max(width.values(), default=0)
    compared = [method for method in wanted if width[method] > ENOUGH * most]
    planned = frozenset[Trial].intersection(*(frozenset(wanted[method]) for method in compared)) if compared else ()
    ran = {method: found for method in compared if (found := have.get(method, set()) & set(planned))}
    return Shared(
        methods=tuple(ran),
        runs=frozenset(set.intersection(*ran.values())) if ran else frozenset(),
        planned=len(planned),
        few=tuple(method for method in wanted if method not in compared),
        waiting=tuple(method for method in compared if method not in ran),
    )


def _trial(names: Names) -> Trial:
    return names.data, names.model, names.attack, names.rate, names.seed


def _rows(kind: str, shared: Shared, done: Mapping[str, CellResult]) -> list[Row]:
    """The rows of the methods that are compared, over the shared runs alone."""
    groups: dict[tuple[str, str, str, float, str], list[CellResult]] = {}
    for result in done.values():
        if result.names.method in shared.methods and _trial(result.names) in shared.runs:
            groups.setdefault(result.names.row, []).append(result)
    return [make_row(sorted(found, key=lambda result: result.names.seed), kind) for found in groups.values()]


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return found


def _summary(method: str, rows: Sequence[Row], control: Sequence[Row], adaptive: Sequence[Row]) -> MethodSummary:
    excess, falls = [row.values["asr_excess"].mean for row in rows], [_fall(row) for row in rows]
    hard = [row.values["asr_excess"].mean for row in adaptive]
    seconds = [row.values["processor"].mean for row in rows if "processor" in row.values]
    return MethodSummary(
        method=method, excess=_mean(excess), worst_excess=max(excess), fall=_mean(falls), worst_fall=max(falls),
        ra=_mean([row.values["ra"].mean for row in rows]),
        control_fall=_mean([_fall(row) for row in control]) if control else None,
        adaptive=_mean(hard) if hard else None, worst_adaptive=max(hard, default=None),
        processor=_mean(seconds) if seconds else None,
    )  # fmt: skip


def _sentence(usual: Shared, adaptive: Shared) -> str:
    """What the means are over, and what is not among them."""
    said = [f"Means over {_over(usual)}."]
    if adaptive.methods:
        said.append(f"Adaptive: {_over(adaptive)}.")
    if usual.few:
        said.append(f"Planned for too few of these attacks to be compared: {', '.join(usual.few)}.")
    if usual.waiting:
        said.append(f"Without figures yet: {', '.join(usual.waiting)}.")
    return " ".join(said)


def _over(shared: Shared) -> str:
    names = sorted({(attack, rate) for _, _, attack, rate, _ in shared.runs})
    listed = ", ".join(attack_name(attack, rate) for attack, rate in names)
    seeds = sorted({run[-1] for run in shared.runs})
    numbered = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    what = f"{len(names)} attack{'s' if len(names) > 1 else ''} ({listed}; {numbered})" if names else "no attack yet"
    return f"{what}: {len(shared.runs)} of the {shared.planned} runs (attack x seed) planned for all of these methods"


def _fall(row: Row) -> float:
    return row.values["c_acc_before"].mean - row.values["c_acc"].mean


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
