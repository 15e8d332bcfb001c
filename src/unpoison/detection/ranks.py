"""Cross-entropies, ranks, means of ranks, and CGD's published regions. Pure functions over arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp
from scipy.stats import rankdata

from unpoison.results import CLEAN, MIXED, SKIPPED, SUSPECT, Region

Scores = Float[np.ndarray, " n"]
GivenLabels = Int[np.ndarray, " n"]


def label_cross_entropy(logits: Float[np.ndarray, "n c"], labels: GivenLabels) -> Scores:
    """``-log softmax(logits)[label]`` of each row, in float64; NaN rows (skipped samples) stay NaN."""
    logits = logits.astype(np.float64)
    return logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]


def rank_normalise(values: Scores, groups: GivenLabels | None = None) -> Scores:
    """Ranks scaled to (0, 1], ties at their mean, over all usable values or within each group; NaN stays NaN."""
    ranks = np.full(len(values), np.nan)
    usable = ~np.isnan(values)
    for members in _members(usable, groups):
        ranks[members] = rankdata(values[members]) / len(members)
    return ranks


def mean_of_ranks(scores: Iterable[Scores]) -> Scores:
    """An ensemble of at least one score, in (0, 1]: the mean of their ranks; NaN where any of them is NaN."""
    return np.mean([rank_normalise(values) for values in scores], axis=0)


def published_regions(clip_rank: Scores, early_rank: Scores, *, sigma1: float, sigma2: float) -> Region:
    """CGD's fixed regions (step 5). Both ranks rise with suspicion: ``early_rank`` is one minus the paper's r^s.

    Clean where both ranks are at most ``1 - sigma1``; suspect where either exceeds ``1 - sigma2``; mixed between.
    """
    region = np.full(len(clip_rank), MIXED, dtype=np.int8)
    region[(clip_rank <= 1 - sigma1) & (early_rank <= 1 - sigma1)] = CLEAN
    region[(clip_rank > 1 - sigma2) | (early_rank > 1 - sigma2)] = SUSPECT
    region[np.isnan(clip_rank) | np.isnan(early_rank)] = SKIPPED
    return region


def _members(usable: np.ndarray, groups: GivenLabels | None) -> list[np.ndarray]:
    if groups is None:
        return [np.flatnonzero(usable)]
    return [np.flatnonzero(usable & (groups == group)) for group in np.unique(groups[usable])]
