"""Is anything poisoned? Planted poison is found and named; clean sets of many kinds are left alone."""

from math import comb
from types import SimpleNamespace

import numpy as np
import pytest

from unpoison.detection.poison_estimate import (
    CORNERS,
    P_VALUE,
    SMALLEST_CLASS,
    corner_mask,
    estimate_poison,
    fullest_corner,
    normal_scores,
)
from unpoison.results import SampleScores

KINDS = ("plain", "one class CLIP cannot name", "label noise", "uneven classes", "weakly correlated", "an easy class")


@pytest.mark.parametrize("kind", KINDS)
def test_clean_sets_are_left_alone(planted: SimpleNamespace, kind: str) -> None:
    for seed in range(50):
        scores = planted.clean_set(kind, seed)
        estimate, posterior = estimate_poison(scores)
        assert not estimate.poisoned, f"seed {seed}: {estimate.reason}"
        assert estimate.target_labels == ()
        assert (estimate.rate, estimate.rate_low, estimate.rate_high) == (0, 0, 0)
        assert not posterior.any()
        assert "no evidence" in estimate.reason


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.10])
@pytest.mark.parametrize("seed", range(3))
def test_dirty_label_poison_is_found_named_and_sized(planted: SimpleNamespace, rate: float, seed: int) -> None:
    scores, poisoned = planted.poisoned_set(rate, seed)
    estimate, posterior = estimate_poison(scores)
    assert estimate.poisoned
    assert estimate.target_labels == (3,)
    assert "'class 3'" in estimate.reason
    assert estimate.rate_low <= estimate.rate <= estimate.rate_high
    slack = 0.1 * rate
    assert estimate.rate_low - slack <= rate <= estimate.rate_high + slack
    assert estimate.rate == pytest.approx(rate, rel=0.2)
    flagged = posterior >= 0.5
    assert not flagged[scores.labels != 3].any()
    assert (flagged & poisoned).sum() / poisoned.sum() >= 0.9
    assert (flagged & poisoned).sum() / flagged.sum() >= 0.9


def test_poison_that_outnumbers_its_small_class_is_found(planted: SimpleNamespace) -> None:
    random = np.random.default_rng(8)
    labels = random.integers(0, 12, 1000)
    clip, early = planted.losses(random, labels, agreement=0.6)
    clip, early, labels, mask = planted.poison(random, clip, early, labels, 3, 0.1)
    assert mask[labels == 3].mean() > 0.5
    estimate, posterior = estimate_poison(planted.make_scores(clip, early, labels, 12))
    assert estimate.target_labels == (3,)
    assert (posterior >= 0.5)[mask].mean() >= 0.9


def test_two_targets_at_once(planted: SimpleNamespace) -> None:
    scores, poisoned = planted.poisoned_set(0.03, 0, targets=(2, 7))
    estimate, posterior = estimate_poison(scores)
    assert estimate.target_labels == (2, 7)
    truth = float(poisoned.mean())  # a few samples were poisoned twice
    assert estimate.rate == pytest.approx(truth, rel=0.15)
    assert ((posterior >= 0.5) & poisoned).sum() / poisoned.sum() >= 0.9


def test_the_estimate_is_reproducible_and_independent_of_the_order_of_rows(planted: SimpleNamespace) -> None:
    scores, _ = planted.poisoned_set(0.05, 1)
    first, posterior = estimate_poison(scores, seed=5)
    assert estimate_poison(scores, seed=5)[0] == first
    order = np.random.default_rng(0).permutation(len(scores.ids))
    shuffled = SampleScores(
        method="cgd",
        ids=[scores.ids[row] for row in order],
        labels=scores.labels[order],
        class_names=scores.class_names,
        axes={name: values[order] for name, values in scores.axes.items()},
        primary=scores.primary,
    )
    moved, moved_posterior = estimate_poison(shuffled, seed=5)
    assert moved.target_labels == first.target_labels
    assert moved.rate == pytest.approx(first.rate, rel=0.01)
    np.testing.assert_allclose(moved_posterior, posterior[order], atol=0.02)


def test_skipped_rows_count_nowhere(planted: SimpleNamespace) -> None:
    scores, poisoned = planted.poisoned_set(0.05, 2)
    gone = np.random.default_rng(1).random(len(poisoned)) < 0.05
    axes = {name: np.where(gone, np.nan, values) for name, values in scores.axes.items()}
    holed = SampleScores(
        method="cgd", ids=scores.ids, labels=scores.labels, class_names=scores.class_names, axes=axes,
        primary=scores.primary,
    )  # fmt: skip
    estimate, posterior = estimate_poison(holed)
    assert estimate.target_labels == (3,)
    assert not posterior[gone].any()
    assert estimate.rate == pytest.approx(float(poisoned[~gone].mean()), rel=0.2)


def tiny(planted: SimpleNamespace, clip: list[float], early: list[float], labels: list[int]) -> SampleScores:
    return planted.make_scores(np.array(clip), -np.array(early), np.array(labels), max(labels) + 1)


def test_small_and_degenerate_sets_give_an_answer(planted: SimpleNamespace) -> None:
    random = np.random.default_rng(0)
    # a class with one sample among large ones
    labels = np.zeros(200, dtype=np.int64)
    labels[7] = 1
    clip, early = planted.losses(random, labels, agreement=0.6)
    assert not estimate_poison(planted.make_scores(clip, early, labels, 2))[0].poisoned
    # all equal
    same = tiny(planted, [1.0] * 100, [1.0] * 100, [0, 1] * 50)
    assert not estimate_poison(same)[0].poisoned
    # no class is large enough
    few, posterior = estimate_poison(tiny(planted, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0, 1, 2]))
    assert not few.poisoned
    assert f"No class has {SMALLEST_CLASS}" in few.reason
    assert posterior.tolist() == [0, 0, 0]
    # nothing usable
    nothing = planted.make_scores(np.full(60, np.nan), np.full(60, np.nan), np.zeros(60, dtype=np.int64), 1)
    estimate, posterior = estimate_poison(nothing)
    assert not estimate.poisoned
    assert estimate.rate == 0
    assert not posterior.any()


def test_poison_that_is_all_the_same_does_not_break_the_mixture(planted: SimpleNamespace) -> None:
    """Ties at the extreme end, as a CLIP and early models that are certain would give."""
    random = np.random.default_rng(3)
    labels = np.repeat(np.arange(10), 200)
    clip, early = planted.losses(random, labels, agreement=0.6)
    mask = np.zeros(len(labels), dtype=bool)
    mask[random.choice(np.flatnonzero(labels != 0), 100, replace=False)] = True
    clip[mask], early[mask], labels[mask] = 50.0, -50.0, 0
    estimate, posterior = estimate_poison(planted.make_scores(clip, early, labels, 10))
    assert estimate.target_labels == (0,)
    assert (posterior >= 0.5)[mask].all()
    assert estimate.rate == pytest.approx(0.05, rel=0.2)


def test_the_corner_against_counting() -> None:
    random = np.random.default_rng(4)
    clip, early = random.random(500), random.random(500)
    clip[:30], early[:30] = 0.97, 0.97
    corner = fullest_corner(clip, early)
    tails = {}
    for share in CORNERS:
        high_clip, high_early = sum(c > 1 - share for c in clip), sum(e > 1 - share for e in early)
        both = sum(c > 1 - share and e > 1 - share for c, e in zip(clip, early, strict=True))
        expected = high_clip * high_early / 500
        ways = [comb(high_clip, k) * comb(500 - high_clip, high_early - k) for k in range(both, high_early + 1)]
        tails[share] = (both, expected, sum(ways) / comb(500, high_early))
        assert corner_mask(clip, early, share).sum() == both
    best = min(tails, key=lambda share: tails[share][2])
    assert (corner.found, corner.expected) == (tails[corner.share][0], pytest.approx(tails[corner.share][1]))
    assert corner.p_value == pytest.approx(tails[best][2], rel=1e-6)
    assert corner.p_value < P_VALUE
    assert corner.ratio == pytest.approx(corner.found / corner.expected)


def test_normal_scores_are_finite_and_keep_the_order() -> None:
    ranks = np.array([1e-9, 0.1, 0.5, 0.9, 1.0])
    scores = normal_scores(ranks, ranks[::-1].copy())
    assert np.isfinite(scores).all()
    assert (np.diff(scores[:, 0]) > 0).all()
    assert scores[2].tolist() == [0, 0]
    assert scores[0, 0] == pytest.approx(-scores[-1, 0])
