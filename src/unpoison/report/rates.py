"""The rates of one evaluation or of two, before and after: excess, DER and the lines of their table."""

from __future__ import annotations

from dataclasses import dataclass

from unpoison.report.text import change, percent
from unpoison.results import ClipEvaluation, Evaluation, Interval

Rated = Evaluation | ClipEvaluation


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


def excess_of(result: Rated) -> float:
    """ASR above its floor, in percent points."""
    if result.asr_excess is not None:
        return result.asr_excess
    floor = result.asr_floor.value if result.asr_floor else 0.0
    return max(0.0, result.asr.value - floor) if result.asr else 0.0


def der_of(before: Rated, after: Rated) -> float | None:
    """Defense effectiveness rating in percent: [max(0, ASR fall) - max(0, C-Acc fall) + 1] / 2."""
    if before.asr is None or after.asr is None:
        return None
    asr_fall = max(0.0, before.asr.value - after.asr.value)
    accuracy_fall = max(0.0, before.c_acc.value - after.c_acc.value)
    return (asr_fall - accuracy_fall + 100) / 2


def rate_rows(before: Rated | None, after: Rated | None) -> list[RateRow]:
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


def retrieval_rows(before: ClipEvaluation | None, after: ClipEvaluation | None) -> list[RateRow]:
    """R@1, R@5 and R@10 both ways and the retrieval ASR with its floor; rates that neither has are left out."""
    rows = [
        _rate_row(f"R@{k}, {way}", f"{meaning} {k}", _recall(before, key, k), _recall(after, key, k))
        for key, way, meaning in (
            ("image_to_text", "image to text", "images that find a caption of theirs among the first"),
            ("text_to_image", "text to image", "captions that find their image among the first"),
        )
        for k in (1, 5, 10)
    ]
    rows += [
        _rate_row(name, meaning, getattr(before, key, None), getattr(after, key, None))
        for key, name, meaning in (
            ("retrieval_asr", "Retrieval ASR", "triggered images with a caption of the target among the first five"),
            ("retrieval_asr_floor", "Retrieval ASR floor", "the same images without the trigger"),
        )
    ]
    return [row for row in rows if row.before or row.after]


def _recall(result: ClipEvaluation | None, key: str, k: int) -> Interval | None:
    found = None if result is None else getattr(result, key)
    return None if found is None else getattr(found, f"at_{k}")


def _rate_row(name: str, meaning: str, before: Interval | None, after: Interval | None) -> RateRow:
    values = [None if rate is None else rate.value for rate in (before, after)]
    return RateRow(name=name, meaning=meaning, before=before, after=after, change=_change(values[0], values[1]))


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else change(after - before)
