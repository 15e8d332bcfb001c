"""Scores to a Split: CGD's fixed regions, and regions as large as the evidence for poison."""

from __future__ import annotations

from typing import Literal

import numpy as np

from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS
from unpoison.detection.poison_estimate import estimate_poison
from unpoison.detection.ranks import published_regions
from unpoison.results import CLEAN, MIXED, SKIPPED, SUSPECT, PoisonEstimate, Region, SampleScores, Split

OddLabels = Literal["leave-out", "unlearn"]
SUSPECT_FROM = 0.5
CLEAN_BELOW = 0.01
"""Posterior of being poisoned from which a sample is suspect, and under which one of a target label is clean."""


def split_as_published(scores: SampleScores, *, sigma1: float = 0.2, sigma2: float = 0.1) -> Split:
    """CGD's fixed percentiles. About 19 percent of any set, clean or not, end in the suspect region."""
    region = published_regions(scores.axes[CLIP_AXIS], scores.axes[EARLY_AXIS], sigma1=sigma1, sigma2=sigma2)
    return _split("cgd-published", scores, region, estimate_poison(scores)[0])


def split_by_evidence(scores: SampleScores, *, sigma1: float = 0.2, odd: OddLabels = "leave-out") -> Split:
    """Regions sized from the estimate: without evidence every usable sample is clean.

    In a target label a sample is suspect when it is more likely poisoned than not, and clean only when that is very
    unlikely and CLIP does not reject its label (``clip_rank <= 1 - sigma1``); the rest of the label is mixed. In an odd
    label the suspect ones are mixed too, unless ``odd`` is "unlearn".
    """
    estimate, posterior = estimate_poison(scores)
    clip, early = scores.axes[CLIP_AXIS], scores.axes[EARLY_AXIS]
    region = np.full(len(scores.ids), CLEAN, dtype=np.int8)
    judged = np.isin(scores.labels, (*estimate.target_labels, *estimate.odd_labels))
    region[judged & ((posterior >= CLEAN_BELOW) | (clip > 1 - sigma1))] = MIXED
    unlearnt = judged if odd == "unlearn" else np.isin(scores.labels, estimate.target_labels)
    region[unlearnt & (posterior >= SUSPECT_FROM)] = SUSPECT
    region[np.isnan(clip) | np.isnan(early)] = SKIPPED
    return _split("cgd", scores, region, estimate)


def _split(method: str, scores: SampleScores, region: Region, estimate: PoisonEstimate) -> Split:
    return Split(
        method=method,
        ids=scores.ids,
        labels=scores.labels,
        region=region,
        class_names=scores.class_names,
        estimate=estimate,
    )
