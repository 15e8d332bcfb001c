"""Scores to regions."""

from types import SimpleNamespace

import numpy as np
import pytest

from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS
from unpoison.detection.poison_estimate import estimate_poison
from unpoison.detection.thresholds import CLEAN_BELOW, SUSPECT_FROM, split_as_published, split_by_evidence
from unpoison.results import CLEAN, MIXED, SKIPPED, SUSPECT, SampleScores


def with_skips(scores: SampleScores, rows: list[int]) -> SampleScores:
    axes = {name: values.copy() for name, values in scores.axes.items()}
    for values in axes.values():
        values[rows] = np.nan
    return SampleScores(
        method=scores.method, ids=scores.ids, labels=scores.labels, class_names=scores.class_names, axes=axes,
        primary=scores.primary,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_set_stays_clean_everywhere(planted: SimpleNamespace, seed: int) -> None:
    scores = with_skips(planted.clean_set("plain", seed), [0, 5])
    split = split_by_evidence(scores)
    assert split.region[[0, 5]].tolist() == [SKIPPED, SKIPPED]
    assert (np.delete(split.region, [0, 5]) == CLEAN).all()
    assert split.estimate is not None
    assert not split.estimate.poisoned


def test_regions_follow_the_evidence(planted: SimpleNamespace) -> None:
    scores, poisoned = planted.poisoned_set(0.05, 0)
    scores = with_skips(scores, [1, 2])
    split = split_by_evidence(scores)
    estimate, posterior = estimate_poison(scores)
    assert split.method == "cgd"
    assert split.estimate == estimate
    for row, region in enumerate(split.region):  # the docstring's rule, sample by sample
        rejected = scores.axes[CLIP_AXIS][row] > 0.8
        if np.isnan(scores.axes[CLIP_AXIS][row]):
            expected = SKIPPED
        elif scores.labels[row] != 3:
            expected = CLEAN
        elif posterior[row] >= SUSPECT_FROM:
            expected = SUSPECT
        elif posterior[row] >= CLEAN_BELOW or rejected:
            expected = MIXED
        else:
            expected = CLEAN
        assert region == expected, row
    assert poisoned[split.suspect].mean() >= 0.9
    assert poisoned[split.clean].sum() <= 0.01 * poisoned.sum()
    assert (split.labels, split.ids) == (pytest.approx(scores.labels), scores.ids)


def test_published_regions_flag_the_same_share_of_a_clean_set(planted: SimpleNamespace) -> None:
    scores = with_skips(planted.clean_set("plain", 4), [0])
    split = split_as_published(scores, sigma1=0.3, sigma2=0.05)
    assert split.method == "cgd-published"
    clip, early = scores.axes[CLIP_AXIS], scores.axes[EARLY_AXIS]
    assert set(split.suspect) == set(np.flatnonzero((clip > 0.95) | (early > 0.95)))
    assert set(split.clean) == set(np.flatnonzero((clip <= 0.7) & (early <= 0.7)))
    assert split.region[0] == SKIPPED
    assert split.estimate is not None
    assert not split.estimate.poisoned
    assert len(split.suspect) > 0.05 * len(split.ids)
