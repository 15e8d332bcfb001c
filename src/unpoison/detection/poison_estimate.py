"""Is anything poisoned, toward which label, and how much? Beyond the CGD paper, from its two ranks alone.

In clean data what is hard for CLIP is hard for an early model too. So the corner of samples whose label CLIP rejects
(high ``clip_rank``) and which are nevertheless learnt first (high ``early_rank``) is nearly empty: in every class it
holds fewer samples than it would if the two ranks had nothing to do with each other. Poison fills it. A class whose
corner holds significantly *more* than independence predicts is taken for a target label; a two-component Gaussian
mixture over the two ranks of its samples, started at the corner, then says which samples and how many. Classes with a
weaker trace are named as odd (:mod:`unpoison.detection.odd_labels`); they do not make a set poisoned.

All constants here are our own choice; docs/decisions/0001-regions-from-evidence.md has their reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom, norm
from sklearn.mixture import GaussianMixture

from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS
from unpoison.detection.odd_labels import Oddity, find_odd_labels, rejected_by_clip
from unpoison.results import PoisonEstimate, SampleScores

CORNERS = (0.05, 0.1, 0.2)
"""The corner is the share of the set, on each axis, that counts as extreme; all three are looked at."""
P_VALUE = 1e-6
"""Chance of so full a corner under independence, over all classes and corners (Bonferroni)."""
LEAST = 8
"""A corner of fewer samples is no evidence, whatever its p-value."""
SMALLEST_CLASS = 20
BOOTSTRAPS = 40


@dataclass(frozen=True, kw_only=True)
class Corner:
    """One class's fullest corner: its samples, what independence within the class predicts, the p-value."""

    share: float
    found: int
    expected: float
    p_value: float

    @property
    def ratio(self) -> float:
        return self.found / max(self.expected, 1e-9)


def estimate_poison(scores: SampleScores, *, seed: int = 0) -> tuple[PoisonEstimate, Float[np.ndarray, " n"]]:
    """The verdict, and for each sample the probability in [0, 1] of being poisoned.

    It is 0 outside the target labels and the odd ones; the rate counts the target labels only.
    """
    clip, early, labels = scores.axes[CLIP_AXIS], scores.axes[EARLY_AXIS], scores.labels
    usable = ~np.isnan(clip) & ~np.isnan(early)
    posterior = np.zeros(len(labels))
    classes = [int(c) for c in np.unique(labels[usable]) if (usable & (labels == c)).sum() >= SMALLEST_CLASS]
    corners = {c: fullest_corner(clip[usable & (labels == c)], early[usable & (labels == c)]) for c in classes}
    tests = max(1, len(corners) * len(CORNERS))
    targets = [c for c, corner in corners.items() if corner.p_value * tests < P_VALUE and corner.found >= LEAST]
    odd = find_odd_labels(scores, classes, targets=targets)
    draws = np.zeros(BOOTSTRAPS)
    for c in targets:
        rows = np.flatnonzero(usable & (labels == c))
        points = normal_scores(clip[rows], early[rows])
        inside = corner_mask(clip[rows], early[rows], corners[c].share)
        posterior[rows] = mixture_posterior(points, inside)
        draws += bootstrap_counts(points, inside, np.random.default_rng([seed, c]))
    total = max(1, int(usable.sum()))
    rate = float(posterior.sum()) / total
    low, high = (float(np.quantile(draws, q)) / total for q in (0.025, 0.975)) if targets else (0.0, 0.0)
    for c in odd:  # after the rate has been summed
        rows = np.flatnonzero(usable & (labels == c))
        posterior[rows] = mixture_posterior(normal_scores(clip[rows], early[rows]), rejected_by_clip(clip[rows]))
    evidence = {"p_value_bound": P_VALUE / tests}
    for c, corner in corners.items():
        name = scores.class_names[c]
        evidence |= {
            f"corner.{name}": float(corner.found),
            f"expected.{name}": corner.expected,
            f"p.{name}": corner.p_value,
        }
    return (
        PoisonEstimate(
            poisoned=bool(targets),
            rate=rate,
            rate_low=min(low, rate),
            rate_high=max(high, rate),
            target_labels=tuple(targets),
            evidence=evidence,
            reason=_reason(scores, corners, targets) + _oddities(scores, odd),
            odd_labels=tuple(odd),
        ),
        posterior,
    )


def fullest_corner(clip: Float[np.ndarray, " k"], early: Float[np.ndarray, " k"]) -> Corner:
    """The least likely of the ``CORNERS`` of one class under independence of its two ranks.

    The p-value is that of Fisher's exact test (hypergeometric tail): a Poisson tail would miss poison that is the
    larger part of a small class, where the poison itself raises the expectation.
    """
    found = []
    for share in CORNERS:
        count = int(corner_mask(clip, early, share).sum())
        rejected, first = int((clip > 1 - share).sum()), int((early > 1 - share).sum())
        chance = float(hypergeom.sf(count - 1, len(clip), rejected, first))
        found.append(Corner(share=share, found=count, expected=rejected * first / max(1, len(clip)), p_value=chance))
    return min(found, key=lambda corner: corner.p_value)


def corner_mask(clip: Float[np.ndarray, " k"], early: Float[np.ndarray, " k"], share: float) -> Bool[np.ndarray, " k"]:
    return (clip > 1 - share) & (early > 1 - share)


def normal_scores(clip: Float[np.ndarray, " k"], early: Float[np.ndarray, " k"]) -> Float[np.ndarray, "k 2"]:
    """Both ranks as standard normal quantiles, kept off the infinite ends."""
    return norm.ppf(np.clip(np.stack([clip, early], axis=1), 1e-4, 1 - 1e-4))


def mixture_posterior(points: Float[np.ndarray, "k 2"], inside: Bool[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Posterior of the component that starts at the corner, in a mixture of two Gaussians."""
    parts = (points[inside], points[~inside])
    share = float(np.clip(inside.mean(), 0.02, 0.98))
    mixture = GaussianMixture(
        2,
        means_init=np.stack([part.mean(0) for part in parts]),
        weights_init=[share, 1 - share],
        # without these the two components would start with the spreads of other clusters, in any order
        precisions_init=np.stack([np.linalg.inv(np.cov(part.T, bias=True) + 1e-3 * np.eye(2)) for part in parts]),
        reg_covar=1e-3,
        random_state=0,
    )
    return mixture.fit(points).predict_proba(points)[:, 0]


def bootstrap_counts(
    points: Float[np.ndarray, "k 2"], inside: Bool[np.ndarray, " k"], random: np.random.Generator
) -> Float[np.ndarray, " b"]:
    """Number of poisoned samples in each of ``BOOTSTRAPS`` resampled classes."""
    counts = []
    for _ in range(BOOTSTRAPS):
        drawn = random.integers(len(points), size=len(points))
        marked = inside[drawn]
        if marked.any() and not marked.all():
            counts.append(mixture_posterior(points[drawn], marked).sum())
        else:
            counts.append(float(marked.sum()))
    return np.array(counts)


def _reason(scores: SampleScores, corners: dict[int, Corner], targets: Int[np.ndarray, " t"] | list[int]) -> str:
    if not corners:
        return f"No class has {SMALLEST_CLASS} usable samples: nothing can be said."
    c = min(corners, key=lambda label: corners[label].p_value)
    corner = corners[c]
    found = (
        f"label {scores.class_names[c]!r} holds {corner.found} samples that CLIP rejects and that are learnt first, "
        f"{corner.expected:.1f} expected by chance"
    )
    return f"Evidence: {found}." if targets else f"The fullest corner is no evidence: {found}."


def _oddities(scores: SampleScores, odd: dict[int, Oddity]) -> str:
    if not odd:
        return ""
    parts = [
        f"of label {scores.class_names[label]!r} CLIP rejects {found.rejected} samples, and {found.ready} of them are "
        "learnt before its median sample, more than other labels explain"
        for label, found in list(odd.items())[:3]
    ]
    more = f" (and {len(odd) - 3} labels more)" if len(odd) > 3 else ""
    return f" Odd: {'; '.join(parts)}{more}. Either CLIP does not know the name or labels were changed: look at them."
