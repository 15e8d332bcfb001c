"""Intervals of rates: Wilson for one run, Student's t over seeds for several. n is printed beside every rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy.stats import t as student

from unpoison.errors import NotEnoughDataError, UsageError
from unpoison.results import Interval

Z_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """Mean over ``n`` seeds with the standard deviation between them (n - 1) and the 95 % interval of the mean.

    With one seed ``std``, ``low`` and ``high`` are None: one run says nothing about the spread between runs.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread} (n={self.n})"


def wilson(successes: int, n: int, z: float = Z_95) -> Interval:
    """The rate successes / n in percent with its Wilson score interval (Wilson 1927, JASA 22).

    Raises UsageError unless 0 <= successes <= n and z > 0, NotEnoughDataError for n = 0.
    """
    if n == 0:
        raise NotEnoughDataError("samples behind a rate", have=0, need=1, hint="Evaluate on more samples.")
    if not (0 <= successes <= n and z > 0):
        raise UsageError(
            f"expected 0 <= successes <= n and z > 0, got {successes} of {n}, z {z}.", hint="Give counts of samples."
        )
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at 0 and n the bound is 0 and 1 exactly; rounding must not push it past the value
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(value=100 * share, low=100 * low, high=100 * high, n=n)


def rate(hits: Bool[np.ndarray, " n"]) -> Interval:
    """The share of hits in percent with its Wilson interval. Raises NotEnoughDataError for none at all."""
    return wilson(int(hits.sum()), len(hits))


def mean_over_seeds(values: Sequence[float]) -> SeedMean:
    """Mean, standard deviation and 95 % t interval of one figure over seeds. Raises NotEnoughDataError for none."""
    n = len(values)
    if n == 0:
        raise NotEnoughDataError("seeds behind a mean", have=0, need=1, hint="Run at least one seed.")
    mean = float(np.mean(values))
    if n == 1:
        return SeedMean(mean=mean, std=None, low=None, high=None, n=1)
    std = float(np.std(values, ddof=1))
    half = float(student.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return SeedMean(mean=mean, std=std, low=mean - half, high=mean + half, n=n)
