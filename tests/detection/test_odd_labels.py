"""Labels that look odd: changed labels and made-up names are named, clean sets of many kinds are not."""

from types import SimpleNamespace

import numpy as np
import pytest

from unpoison.detection import odd_labels
from unpoison.detection.odd_labels import LEAST, find_odd_labels, rejected_by_clip
from unpoison.detection.poison_estimate import estimate_poison
from unpoison.detection.thresholds import split_by_evidence
from unpoison.results import CLEAN, MIXED, SUSPECT, SampleScores

KINDS = ("plain", "label noise", "uneven classes", "weakly correlated", "an easy class")


def changed_labels(planted: SimpleNamespace, seed: int, target: int = 3) -> tuple[SampleScores, np.ndarray]:
    """Five percent of the labels become ``target``: CLIP rejects them, they are learnt like any other sample."""
    random = np.random.default_rng([seed, 7])
    labels = random.integers(0, 10, 5000)
    clip, early = planted.losses(random, labels, agreement=0.6)
    mask = np.zeros(len(labels), dtype=bool)
    mask[random.choice(np.flatnonzero(labels != target), 250, replace=False)] = True
    labels[mask] = target
    clip[mask] = random.normal(3, 0.7, 250)
    early[mask] = np.median(early[labels == target]) + random.normal(0, 0.8, 250)
    return planted.make_scores(clip, early, labels, 10), mask


@pytest.mark.parametrize("seed", range(3))
def test_changed_labels_are_odd_and_no_proof(planted: SimpleNamespace, seed: int) -> None:
    scores, poisoned = changed_labels(planted, seed)
    estimate, posterior = estimate_poison(scores)
    assert (estimate.poisoned, estimate.target_labels, estimate.odd_labels) == (False, (), (3,))
    assert (estimate.rate, estimate.rate_high) == (0, 0)
    assert "Odd: of label 'class 3'" in estimate.reason
    doubtful = posterior >= 0.5
    assert not doubtful[scores.labels != 3].any()
    assert doubtful[poisoned].mean() >= 0.9
    assert poisoned[doubtful].mean() >= 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_clean_sets_have_no_odd_labels(planted: SimpleNamespace, kind: str) -> None:
    for seed in range(50):
        estimate, _ = estimate_poison(planted.clean_set(kind, seed))
        assert estimate.odd_labels == (), f"seed {seed}: {estimate.reason}"


def late_changed_labels(planted: SimpleNamespace, seed: int) -> tuple[SampleScores, np.ndarray]:
    """As above, but most are learnt later than the class's median sample."""
    random = np.random.default_rng([seed, 8])
    labels = random.integers(0, 10, 10_000)
    clip, early = planted.losses(random, labels, agreement=0.6, spread=0.0)
    mask = np.zeros(len(labels), dtype=bool)
    mask[random.choice(np.flatnonzero(labels != 0), 500, replace=False)] = True
    labels[mask] = 0
    clip[mask] = random.normal(2.5, 0.7, 500)
    early[mask] = np.median(early[labels == 0]) + random.normal(0.8, 0.8, 500)
    return planted.make_scores(clip, early, labels, 10), mask


@pytest.mark.parametrize("seed", range(3))
def test_changed_labels_that_are_learnt_late_are_odd_where_clip_knows_the_class(
    planted: SimpleNamespace, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, poisoned = late_changed_labels(planted, seed)
    estimate, posterior = estimate_poison(scores)
    assert (estimate.poisoned, estimate.odd_labels) == (False, (0,))
    doubtful = posterior >= 0.5
    assert doubtful[poisoned].mean() >= 0.8
    assert poisoned[doubtful].mean() >= 0.8
    monkeypatch.setattr(odd_labels, "KNOWN", 0.0)
    assert estimate_poison(scores)[0].odd_labels == ()


def test_two_or_three_classes_do_not_say_what_is_usual(planted: SimpleNamespace) -> None:
    scores, _ = late_changed_labels(planted, 0)
    assert 0 in find_odd_labels(scores, [0, 1, 2, 3], targets=[])
    assert find_odd_labels(scores, [0, 1, 2], targets=[]) == {}


def test_a_class_that_clip_merely_rejects_more_of_is_not_odd(planted: SimpleNamespace) -> None:
    random = np.random.default_rng(8)
    labels = random.integers(0, 10, 20_000)
    clip, early = planted.losses(random, labels, agreement=0.6, spread=0.0)
    clip[labels == 3] += 0.9  # harder for CLIP as a whole, and what it rejects is as hard for others
    assert estimate_poison(planted.make_scores(clip, early, labels, 10))[0].odd_labels == ()


def test_a_name_that_means_nothing_to_clip_is_odd(planted: SimpleNamespace) -> None:
    random = np.random.default_rng(5)
    labels = random.integers(0, 10, 5000)
    clip, early = planted.losses(random, labels, agreement=0.6)
    clip[labels == 4] = random.normal(1.5, 1.5, (labels == 4).sum())  # an opinion that has nothing to do with hardness
    estimate, _ = estimate_poison(planted.make_scores(clip, early, labels, 10))
    assert (estimate.poisoned, estimate.odd_labels) == (False, (4,))


def test_where_clip_knows_nothing_no_label_is_odd(planted: SimpleNamespace) -> None:
    random = np.random.default_rng(6)
    labels = random.integers(0, 10, 5000)
    scores = planted.make_scores(random.normal(size=5000), random.normal(size=5000), labels, 10)
    assert estimate_poison(scores)[0].odd_labels == ()


def test_a_target_label_is_not_odd_as_well(planted: SimpleNamespace) -> None:
    scores, _ = planted.poisoned_set(0.05, 0)
    estimate, _ = estimate_poison(scores)
    assert (estimate.target_labels, estimate.odd_labels) == ((3,), ())
    assert 3 in find_odd_labels(scores, list(range(10)), targets=[])


def test_a_scan_leaves_doubtful_samples_out_and_a_repair_unlearns_them(planted: SimpleNamespace) -> None:
    scores, poisoned = changed_labels(planted, 0)
    _, posterior = estimate_poison(scores)
    left, unlearnt = split_by_evidence(scores), split_by_evidence(scores, odd="unlearn")
    assert len(left.suspect) == 0
    assert (left.region[posterior >= 0.5] == MIXED).all()
    assert (unlearnt.region[posterior >= 0.5] == SUSPECT).all()
    for split in (left, unlearnt):
        assert (split.region[scores.labels != 3] == CLEAN).all()
        assert poisoned[split.clean].sum() <= 0.02 * poisoned.sum()


def test_few_rejected_samples_are_no_reason(planted: SimpleNamespace) -> None:
    labels = np.repeat(np.arange(10), 30)
    clip, early = np.tile(np.linspace(0, 1, 30), 10), np.tile(np.linspace(0, 1, 30), 10)
    clip[270 : 270 + LEAST - 1], early[270 : 270 + LEAST - 1] = 9, -9
    scores = planted.make_scores(clip, early, labels, 10)
    assert find_odd_labels(scores, list(range(10)), targets=[]) == {}


def test_of_a_class_that_is_rejected_as_a_whole_the_upper_half_counts() -> None:
    assert rejected_by_clip(np.array([0.95, 0.96, 0.97, 0.98])).tolist() == [False, False, True, True]
    assert rejected_by_clip(np.array([0.1, 0.2, 0.3, 0.95])).tolist() == [False, False, False, True]
