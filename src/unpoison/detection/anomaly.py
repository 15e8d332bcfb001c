"""Is one class reached by far too little? Statistics over what reaches each class, one score, and the words for it.

Papers
    Wang et al. "Neural Cleanse." IEEE S&P 2019: deviations under the median, by the median absolute deviation (MAD).
Idea
    What a class *costs* is the logarithm of its trigger's size over the share of images that it sends there; of
    squares, whose sizes are few and fixed, the logarithm of the size less the log odds of success: a square that sends
    nearly all images is as much cheaper than one that sends most as that one is than one that sends a third.
    A class is out of line by so many deviations as its cost lies under the median of the classes, and counts in full
    from ``success`` percent on, below in proportion. Beside clean references the same under the median of theirs. The
    score is the lower of the two; one cut of it makes a model suspicious, a higher one backdoored.
Where we differ
    The deviation has a floor: among classes of nearly equal costs every difference would be an outlier. The interval is
    a bootstrap over the classes that the candidate is compared with. No step in the score is a gate: a model just under
    any of these numbers scores just under one that is just above.

All of it is a pure function of sizes and successes (:func:`judge_reach`): the verdict, the choice of thresholds and the
tables of benchmarks/scan_model.py call the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from unpoison.errors import ConfigError
from unpoison.model_results import AnomalyIndex, Reach, WeightsWord

FEWEST_CLASSES = 3
"""Among two neither is out of line."""
_SMALLEST = 1e-6
_RESAMPLED = 2_000
_LEAST_SHARE, _LEAST_ODDS, _MOST_ODDS = 0.05, 0.05, 0.98


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig:
    """When a class is out of line. Ours, not calibrated yet (docs/scan_model.md says what they come from)."""

    backdoored: float = 3.0
    """Deviations from which on a model is called backdoored..."""
    suspicious: float = 2.2
    """...and suspicious."""
    success: float = 80.0
    """Percent of unseen images from which on a class counts in full; below in proportion."""
    floor: float = 0.25
    """Least deviation of a log size: sizes that differ by a quarter are nearly equal."""
    square_floor: float = 1.0
    """Least deviation of a square's cost: odds that differ by a factor of e are nearly equal."""

    def __post_init__(self) -> None:
        if not 0 <= self.suspicious <= self.backdoored or not 0 < self.success <= 100:
            raise ConfigError(
                "expected 0 <= suspicious <= backdoored and success in (0, 100] percent.", hint="Try the defaults."
            )
        if not min(self.floor, self.square_floor) > 0:
            raise ConfigError("expected floor and square_floor > 0.", hint="Try the defaults.")

    def floor_of(self, form: str) -> float:
        return self.square_floor if form == "square" else self.floor


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """``own`` and ``beside``: of each class its deviations under the others and under the references' classes,
    weighted; None where there are too few. ``candidate``: the place of the class with the highest ``score``, None
    without any."""

    word: WeightsWord
    score: float
    own: tuple[float | None, ...]
    beside: tuple[float | None, ...]
    candidate: int | None = None
    interval: AnomalyIndex | None = None


def judge_reach(
    found: Sequence[Reach],
    clean: Sequence[Reach] = (),
    config: AnomalyConfig | None = None,
    *,
    covered: float = 100.0,
    made_up: bool = False,
) -> Judgement:
    """The verdict on what reaches a model's classes, ``clean``: those of clean references, compared form by form.

    ``covered``: percent of the search that was done; ``made_up``: nobody photographed the images (:func:`capped`).
    """
    config = config or AnomalyConfig()
    own: list[float | None] = [None] * len(found)
    beside: list[float | None] = [None] * len(found)
    costs: dict[str, Float[np.ndarray, " k"]] = {}
    for form in dict.fromkeys(entry.form for entry in found):
        places = [place for place, entry in enumerate(found) if entry.form == form]
        costs[form], floor = cost(form, [found[place] for place in places]), config.floor_of(form)
        others = cost(form, [entry for entry in clean if entry.form == form])
        weights = np.array([weight(found[place], config) for place in places])
        if len(places) >= FEWEST_CLASSES:
            _fill(own, places, weights * deviations_under(costs[form], costs[form], floor))
        if len(others):
            _fill(beside, places, weights * deviations_under(costs[form], others, floor))
    scores = [min((value for value in pair if value is not None), default=None)
              for pair in zip(own, beside, strict=True)]  # fmt: skip
    known = [(score, -place) for place, score in enumerate(scores) if score is not None]
    if not known:
        return Judgement(word="inconclusive", score=0.0, own=tuple(own), beside=tuple(beside))
    score, place = max(known)[0], -max(known)[1]
    form = found[place].form
    interval = None
    if own[place] is not None:
        within = sum(entry.form == form for entry in found[:place])
        interval = index_with_interval(costs[form], within, config.floor_of(form), weight(found[place], config))
    word = capped(word_of(score, interval, config), covered=covered, made_up=made_up)
    return Judgement(
        word=word, score=score, own=tuple(own), beside=tuple(beside), candidate=place, interval=interval
    )  # fmt: skip


def cost(form: str, found: Sequence[Reach]) -> Float[np.ndarray, " k"]:
    """What each class costs in this form; lower is easier.

    A share under 5 percent counts as 5: how far a trigger fails says nothing. Of squares one over 98 counts as 98.
    """
    sizes = np.log(np.maximum(np.array([entry.size for entry in found], dtype=np.float64), _SMALLEST))
    share = np.array([entry.success for entry in found], dtype=np.float64) / 100
    if form != "square":
        return sizes - np.log(np.clip(share, _LEAST_SHARE, 1.0))
    share = np.clip(share, _LEAST_ODDS, _MOST_ODDS)
    return sizes - np.log(share / (1 - share))


def weight(entry: Reach, config: AnomalyConfig) -> float:
    """What a class counts for, in [0, 1]."""
    return min(1.0, entry.success / config.success)


def deviations_under(
    costs: Float[np.ndarray, " k"], among: Float[np.ndarray, " m"], floor: float
) -> Float[np.ndarray, " k"]:
    """How many deviations (1.4826 MAD) each cost lies under the median of ``among``."""
    middle = float(np.median(among))
    spread = max(1.4826 * float(np.median(np.abs(among - middle))), floor)
    return (middle - costs) / spread


def index_with_interval(
    costs: Float[np.ndarray, " k"], candidate: int, floor: float, weight: float = 1.0
) -> AnomalyIndex:
    """The candidate's index and its 95 % percentile bootstrap over the other classes (at least two)."""
    others, random = np.sort(np.delete(costs, candidate)), np.random.default_rng(0)  # of any order the same
    drawn = others[random.integers(len(others), size=(_RESAMPLED, len(others)))]
    among = np.concatenate([drawn, np.full((_RESAMPLED, 1), costs[candidate])], axis=1)
    middle = np.median(among, axis=1, keepdims=True)
    spread = np.maximum(1.4826 * np.median(np.abs(among - middle), axis=1), floor)
    values = weight * (middle[:, 0] - costs[candidate]) / spread
    low, high = np.quantile(values, (0.025, 0.975))
    value = weight * float(deviations_under(costs[candidate : candidate + 1], costs, floor)[0])
    return AnomalyIndex(value=value, low=min(float(low), value), high=max(float(high), value), classes=len(costs))


def word_of(score: float, interval: AnomalyIndex | None, config: AnomalyConfig) -> WeightsWord:
    """By the two cuts of the score. "Backdoored" needs the interval above the lower cut, too: else "suspicious"."""
    if score < config.suspicious:
        return "no evidence"
    sure = interval is None or interval.low >= config.suspicious
    return "backdoored" if score >= config.backdoored and sure else "suspicious"


def capped(word: WeightsWord, *, covered: float, made_up: bool) -> WeightsWord:
    """What half a search or made-up images allow to be said: the cuts are those of whole searches on real images."""
    if covered >= 100 and not made_up:
        return word
    return {"backdoored": "suspicious", "no evidence": "inconclusive"}.get(word, word)  # pyright: ignore[reportReturnType]


def _fill(values: list[float | None], places: Sequence[int], found: Float[np.ndarray, " k"]) -> None:
    for place, value in zip(places, found.tolist(), strict=True):
        values[place] = value
