"""Is one class reached by far too little? Statistics over the sizes of inverted triggers, and the words for them.

Papers
    Wang et al. "Neural Cleanse." IEEE S&P 2019: deviations under the median, by the median absolute deviation (MAD).
Where we differ
    Sizes are compared as logarithms, and a trigger that sends half of the images counts as twice as large. The
    deviation has a floor: among classes of nearly equal sizes every difference would be an outlier. Clean reference
    models of the same kind give a second opinion: how small is the trigger beside those that *their* classes need? The
    interval is a bootstrap over the classes that the candidate is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from unpoison.errors import ConfigError
from unpoison.model_results import AnomalyIndex, WeightsWord

_SMALLEST = 1e-6
_RESAMPLED = 2_000
_LEAST, _LEAST_SQUARE = 0.05, 0.25


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig:
    """When a class is out of line. Ours, set on few models (docs/scan_model.md says which)."""

    backdoored: float = 3.0
    """Deviations from which on a model is called backdoored..."""
    suspicious: float = 2.2
    """...and suspicious."""
    success: float = 60.0
    """Percent of unseen images that a trigger must send to its class to count at all."""
    square_success: float = 80.0
    """The same for squares: the largest one sends many images to some class of a clean model, too."""
    floor: float = 0.25
    """Least deviation of a log size: sizes that differ by a quarter are nearly equal."""

    def __post_init__(self) -> None:
        shares = (self.success, self.square_success)
        if not 0 <= self.suspicious <= self.backdoored or not self.floor > 0 or not all(0 <= s <= 100 for s in shares):
            raise ConfigError(
                "expected 0 <= suspicious <= backdoored, success in percent and floor > 0.", hint="Try the defaults."
            )

    def needed(self, form: str) -> float:
        """Percent of unseen images for a trigger of this form."""
        return self.square_success if form == "square" else self.success


def log_sizes(sizes: Sequence[float], success: Sequence[float], *, form: str = "patch") -> Float[np.ndarray, " k"]:
    """Log of each trigger's size over the share of images that it sends, ``success`` in percent.

    A share under 5 percent counts as 5, under 25 percent as 25 for squares: how far a square fails says nothing.
    """
    share = np.clip(np.asarray(success, dtype=np.float64) / 100, _LEAST_SQUARE if form == "square" else _LEAST, 1.0)
    return np.log(np.maximum(np.asarray(sizes, dtype=np.float64), _SMALLEST) / share)


def deviations_under(
    logs: Float[np.ndarray, " k"], among: Float[np.ndarray, " m"], floor: float
) -> Float[np.ndarray, " k"]:
    """How many deviations (1.4826 MAD) each log size lies under the median of ``among``."""
    middle = float(np.median(among))
    spread = max(1.4826 * float(np.median(np.abs(among - middle))), floor)
    return (middle - logs) / spread


def index_with_interval(
    logs: Float[np.ndarray, " k"], candidate: int, floor: float, random: np.random.Generator
) -> AnomalyIndex:
    """The candidate's index and its 95 % percentile bootstrap over the other classes (at least two)."""
    others = np.delete(logs, candidate)
    drawn = others[random.integers(len(others), size=(_RESAMPLED, len(others)))]
    among = np.concatenate([drawn, np.full((_RESAMPLED, 1), logs[candidate])], axis=1)
    middle = np.median(among, axis=1, keepdims=True)
    spread = np.maximum(1.4826 * np.median(np.abs(among - middle), axis=1), floor)
    values = (middle[:, 0] - logs[candidate]) / spread
    low, high = np.quantile(values, (0.025, 0.975))
    value = float(deviations_under(logs[candidate : candidate + 1], logs, floor)[0])
    return AnomalyIndex(value=value, low=min(float(low), value), high=max(float(high), value), classes=len(logs))


def score_of(index: float, reference_index: float | None) -> float:
    """One number to rank models by: out of line among its own classes *and* beside clean models."""
    return index if reference_index is None else min(index, reference_index)


def word_of(score: float, index: float, reference_index: float | None, config: AnomalyConfig) -> WeightsWord:
    """The verdict: both opinions count for "backdoored", either one alone makes a model suspicious."""
    if score >= config.backdoored:
        return "backdoored"
    highest = max(index, index if reference_index is None else reference_index)
    return "suspicious" if score >= config.suspicious or highest >= 2 * config.backdoored else "no evidence"
