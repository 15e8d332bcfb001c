"""The rates of one evaluation or of two, before and after: excess, DER and the lines of their table."""

from __future__ import annotations

from dataclasses import dataclass

from unpoison.report.text import change, percent
from unpoison.results import Evaluation, Interval


@dataclass(frozen=True, kw_only=True)
class RateRow:
    """One line of the before/after table; the texts are complete with units."""

    name: str
    meaning: str
    before: Interval | None = None
    after: Interval | None = None
    before_text: str = ""
    after_text: str = ""
    change: str = ""


def excess_of(result: Evaluation) -> float:
    """ASR above its floor, in percent points."""
    if result.asr_excess is not None:
        return result.asr_excess
    floor = result.asr_floor.value if result.asr_floor else 0.0
    return max(0.0, result.asr.value - floor) if result.asr else 0.0


def der_of(before: Evaluation, after: Evaluation) -> float | None:
    """Defense effectiveness rating in percent: [max(0, ASR fall) - max(0, C-Acc fall) + 1] / 2."""
    if before.asr is None or after.asr is None:
        return None
    asr_fall = max(0.0, before.asr.value - after.asr.value)
    accuracy_fall = max(0.0, before.c_acc.value - after.c_acc.value)
    return (asr_fall - accuracy_fall + 100) / 2


def rate_rows(before: Evaluation | None, after: Evaluation | None) -> list[RateRow]:
    """C-Acc, ASR, floor, excess, RA and DER of one or two evaluations; rates that neither has are left out."""
    rows = [
        _rate_row(name, meaning, getattr(before, field, None), getattr(after, field, None))
        for field, name, meaning in (
            ("c_acc", "C-Acc", "clean images labelled right"),
            ("asr", "ASR", "triggered images that get the attack's label"),
            ("asr_floor", "ASR floor", "the same images without the trigger that get that label anyway"),
            ("ra", "RA", "triggered images that still get their true label"),
        )
    ]
    rows = [row for row in rows if row.before or row.after]
    tested = [result is not None and result.asr is not None for result in (before, after)]
    if any(tested):
        values = [excess_of(result) if result and result.asr else None for result in (before, after)]
        excess = RateRow(
            name="Excess ASR",
            meaning="ASR minus its floor: what the backdoor adds",
            before_text="" if values[0] is None else percent(values[0]),
            after_text="" if values[1] is None else percent(values[1]),
            change=_change(values[0], values[1]),
        )
        rows.insert(3 if any(row.name == "ASR floor" for row in rows) else 2, excess)
    der = der_of(before, after) if before and after else None
    if der is not None:
        meaning = "defense effectiveness: 50 % = no effect, 100 % = attack gone at no cost"
        rows.append(RateRow(name="DER", meaning=meaning, after_text=percent(der)))
    return rows


def _rate_row(name: str, meaning: str, before: Interval | None, after: Interval | None) -> RateRow:
    values = [None if rate is None else rate.value for rate in (before, after)]
    return RateRow(name=name, meaning=meaning, before=before, after=after, change=_change(values[0], values[1]))


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else change(after - before)
