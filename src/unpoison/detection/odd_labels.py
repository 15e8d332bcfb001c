"""Labels that look odd without proof of poison. Beyond the CGD paper, from its two ranks alone.

Poison that only changes labels, or whose trigger is learnt no faster than the objects, leaves the corner of
:mod:`unpoison.detection.poison_estimate` empty. It leaves a weaker trace: in a clean class, what CLIP rejects is hard
and is learnt late, so that few samples are rejected and yet *ready*, learnt before the class's median sample. A label
is odd for one of two reasons:

- Of what CLIP rejects of the class, too large a part is ready. A class that CLIP's text tower misnames leaves that
  trace too, so this is a reason to look at the pictures, not a verdict.
- CLIP knows the class, for it believes a good part of it, and yet the class holds many times as many rejected and
  ready samples as others do. Changed labels that are learnt rather late are found by this alone.

All constants here are our own choice; docs/decisions/0003-odd-labels.md has their reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import binom

from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS
from unpoison.results import SampleScores

REJECTED = 0.1
"""Share of the set, at the top of CLIP's axis, that counts as rejected."""
READY_BOUND = 0.2
"""Share of its rejected samples that may be ready in a clean class, or twice the other classes'."""
KNOWN = 0.5
"""CLIP knows a class if a quarter of it is in this share of the set, at the other end of CLIP's axis."""
SHARE_BOUND = 0.04
"""Share of a known class that may be rejected and ready, or ``TIMES`` the other classes' median."""
TIMES = 3.0
READINESS = 1.5
"""Nor is a known class odd of which CLIP merely rejects more: so many times the usual part of that must be ready."""
FEWEST_OTHERS = 3
"""What is usual in a known class takes so many other classes to say."""
P_VALUE = 1e-6
"""Chance of so many under a bound, over all classes (Bonferroni)."""
LEAST = 20
"""Fewer rejected samples are no reason, whatever their p-value."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """One class: usable samples, those that CLIP rejects, the ready ones of these; whether CLIP knows the class."""

    samples: int
    rejected: int
    ready: int
    known: bool

    @property
    def share(self) -> float:
        return self.ready / max(1, self.samples)

    @property
    def readiness(self) -> float:
        return self.ready / max(1, self.rejected)


@dataclass(frozen=True, kw_only=True)
class Oddity:
    """One class: samples that CLIP rejects, how many of them are ready, the p-value of the stronger reason."""

    rejected: int
    ready: int
    p_value: float


def find_odd_labels(scores: SampleScores, classes: list[int], *, targets: list[int]) -> dict[int, Oddity]:
    """The classes of ``classes``, without ``targets``, whose rejected samples are learnt too readily."""
    counts = {label: count_ready(scores, label) for label in classes if label not in targets}
    found = {}
    for label, count in counts.items():
        others = [counts[other] for other in counts if other != label]
        chance = min(_chance_of_readiness(count, others), _chance_of_share(count, others))
        if count.rejected >= LEAST and chance * len(counts) < P_VALUE:
            found[label] = Oddity(rejected=count.rejected, ready=count.ready, p_value=chance)
    return found


def count_ready(scores: SampleScores, label: int) -> Counts:
    clip, early = scores.axes[CLIP_AXIS], scores.axes[EARLY_AXIS]
    rows = (scores.labels == label) & ~np.isnan(clip) & ~np.isnan(early)
    clip, early = clip[rows], early[rows]
    rejected = rejected_by_clip(clip)
    return Counts(
        samples=len(clip),
        rejected=int(rejected.sum()),
        ready=int((rejected & (early > np.median(early))).sum()),
        known=float(np.quantile(clip, 0.25)) < KNOWN,
    )


def rejected_by_clip(clip: Float[np.ndarray, " k"]) -> np.ndarray:
    """Mask [k] of one class's samples: in the rejected share of the set, and in the upper half of their class.

    The second part is for classes that are rejected as a whole: there the first would say nothing.
    """
    return (clip > 1 - REJECTED) & (clip > np.median(clip))


def _chance_of_readiness(count: Counts, others: list[Counts]) -> float:
    """Chance that so many of the rejected samples are ready."""
    rejected = sum(other.rejected for other in others)
    usual = sum(other.ready for other in others) / rejected if rejected else 0.5
    return float(binom.sf(count.ready - 1, count.rejected, min(1.0, max(READY_BOUND, 2 * usual))))


def _chance_of_share(count: Counts, others: list[Counts]) -> float:
    """Chance that so many of a known class are rejected and ready; 1 where that is not to be asked."""
    if not count.known or len(others) < FEWEST_OTHERS:
        return 1.0
    if count.readiness < READINESS * np.median([other.readiness for other in others]):
        return 1.0
    usual = float(np.median([other.share for other in others]))
    return float(binom.sf(count.ready - 1, count.samples, min(1.0, max(SHARE_BOUND, TIMES * usual))))
