"""Labels that look odd without proof of poison. Beyond the CGD paper, from its two ranks alone.

Poison that only changes labels, or whose trigger is learnt no faster than the objects, leaves the corner of
:mod:`unpoison.detection.poison_estimate` empty. It leaves a weaker trace: in a clean class, what CLIP rejects is hard
and is learnt late; in a poisoned one, a part that CLIP rejects is learnt as readily as the rest. A class that CLIP's
text tower misnames leaves that trace too, so this is a reason to look at the pictures, not a verdict.

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
"""Share of its rejected samples that a clean class may learn before its median sample, or twice the other classes'."""
P_VALUE = 1e-6
"""Chance of so many under that bound, over all classes (Bonferroni)."""
LEAST = 20
"""Fewer rejected samples are no reason, whatever their p-value."""


@dataclass(frozen=True, kw_only=True)
class Oddity:
    """One class: samples that CLIP rejects, how many of them are readily learnt, the bound, the p-value."""

    rejected: int
    ready: int
    bound: float
    p_value: float


def find_odd_labels(scores: SampleScores, classes: list[int], *, targets: list[int]) -> dict[int, Oddity]:
    """The classes of ``classes``, without ``targets``, whose rejected samples are learnt too readily."""
    counts = {label: _count(scores, label) for label in classes if label not in targets}
    found = {}
    for label, (rejected, ready) in counts.items():
        others = np.array([counts[other] for other in counts if other != label]).reshape(-1, 2).sum(0)
        usual = float(others[1] / others[0]) if others[0] else 0.5
        bound = max(READY_BOUND, 2 * usual)
        chance = float(binom.sf(ready - 1, rejected, min(bound, 1.0)))
        if rejected >= LEAST and chance * len(counts) < P_VALUE:
            found[label] = Oddity(rejected=rejected, ready=ready, bound=bound, p_value=chance)
    return found


def rejected_by_clip(clip: Float[np.ndarray, " k"]) -> np.ndarray:
    """Mask [k] of one class's samples: in the rejected share of the set, and in the upper half of their class.

    The second part is for classes that are rejected as a whole: there the first would say nothing.
    """
    return (clip > 1 - REJECTED) & (clip > np.median(clip))


def _count(scores: SampleScores, label: int) -> tuple[int, int]:
    clip, early = scores.axes[CLIP_AXIS], scores.axes[EARLY_AXIS]
    rows = (scores.labels == label) & ~np.isnan(clip) & ~np.isnan(early)
    rejected = rejected_by_clip(clip[rows])
    return int(rejected.sum()), int((rejected & (early[rows] > np.median(early[rows]))).sum())
