"""The metrics against loops that follow their definitions word by word."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.evaluation import metrics

# a busy machine is no failure
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LABELS = arrays(np.int64, 30, elements=st.integers(0, 3))
SCORES = arrays(np.float64, 30, elements=st.integers(0, 6).map(float))  # few values, so that ties are common
FLAGS = arrays(np.bool_, 30)


def counted(values: list[bool]) -> float:
    return sum(values) / len(values)


@UNHURRIED
@given(guesses=LABELS, triggered=LABELS, labels=LABELS, target=st.integers(0, 3), matched=st.booleans())
def test_rates_follow_their_definitions(
    guesses: np.ndarray, triggered: np.ndarray, labels: np.ndarray, target: int, matched: bool
) -> None:
    wanted = (labels + 1) % 4 if matched else np.full(30, target)
    rows = [row for row in range(30) if labels[row] != wanted[row]]
    assert metrics.accuracy(guesses, labels) == counted([guesses[row] == labels[row] for row in range(30)])
    if not rows:
        with pytest.raises(NotEnoughDataError):
            metrics.asr(triggered, wanted, labels)
        return
    assert metrics.asr(triggered, wanted, labels) == counted([triggered[row] == wanted[row] for row in rows])
    assert metrics.asr_floor(guesses, wanted, labels) == counted([guesses[row] == wanted[row] for row in rows])
    assert metrics.robust_accuracy(triggered, wanted, labels) == counted([triggered[r] == labels[r] for r in rows])


def test_the_target_class_never_counts_as_success() -> None:
    labels = np.array([0, 0, 0, 1])
    wanted = np.zeros(4, dtype=np.int64)
    assert metrics.asr(np.array([0, 0, 0, 1]), wanted, labels) == 0
    assert metrics.asr(np.array([1, 1, 1, 0]), wanted, labels) == 1


def test_excess_and_der() -> None:
    assert metrics.excess_asr(0.5, 0.02) == pytest.approx(0.48)
    assert metrics.excess_asr(0.01, 0.02) == 0
    assert metrics.der(c_acc_before=0.9, c_acc_after=0.9, asr_before=1.0, asr_after=0.0) == 1
    assert metrics.der(c_acc_before=0.9, c_acc_after=0.95, asr_before=0.2, asr_after=0.3) == 0.5
    assert metrics.der(c_acc_before=0.9, c_acc_after=0.8, asr_before=1.0, asr_after=0.4) == pytest.approx(0.75)


@UNHURRIED
@given(scores=SCORES, poisoned=FLAGS)
def test_auroc_is_the_share_of_pairs_in_order(scores: np.ndarray, poisoned: np.ndarray) -> None:
    value = metrics.auroc(scores, poisoned)
    if poisoned.all() or not poisoned.any():
        assert value is None
        return
    pairs = [(s > c) + 0.5 * (s == c) for s in scores[poisoned] for c in scores[~poisoned]]
    assert value == pytest.approx(sum(pairs) / len(pairs))


@UNHURRIED
@given(scores=SCORES, poisoned=FLAGS)
def test_pr_auc_sums_precision_over_recall_steps(scores: np.ndarray, poisoned: np.ndarray) -> None:
    value = metrics.pr_auc(scores, poisoned)
    if poisoned.all() or not poisoned.any():
        assert value is None
        return
    area, last = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        flagged = [score >= threshold for score in scores]
        hits = sum(f and p for f, p in zip(flagged, poisoned, strict=True))
        reached = hits / poisoned.sum()
        area += (reached - last) * hits / sum(flagged)
        last = reached
    assert value == pytest.approx(area)


@UNHURRIED
@given(scores=SCORES, poisoned=FLAGS, fpr=st.sampled_from([0.0, 0.05, 0.2, 1.0]))
def test_tpr_at_fpr_tries_every_threshold(scores: np.ndarray, poisoned: np.ndarray, fpr: float) -> None:
    value = metrics.tpr_at_fpr(scores, poisoned, fpr)
    if poisoned.all() or not poisoned.any():
        assert value is None
        return
    best = 0.0
    for threshold in sorted(set(scores)):
        if counted([score >= threshold for score in scores[~poisoned]]) <= fpr:
            best = max(best, counted([score >= threshold for score in scores[poisoned]]))
    assert value == pytest.approx(best)


@UNHURRIED
@given(flagged=FLAGS, poisoned=FLAGS)
def test_recall_precision_and_false_positives(flagged: np.ndarray, poisoned: np.ndarray) -> None:
    both = sum(f and p for f, p in zip(flagged, poisoned, strict=True))
    only = sum(f and not p for f, p in zip(flagged, poisoned, strict=True))
    expected = {
        metrics.recall: (both, int(poisoned.sum())),
        metrics.precision: (both, int(flagged.sum())),
        metrics.false_positive_rate: (only, int((~poisoned).sum())),
    }
    for metric, (hits, total) in expected.items():
        assert metric(flagged, poisoned) == (pytest.approx(hits / total) if total else None)


def test_skipped_rows_count_nowhere() -> None:
    scores = np.array([0.9, 0.8, math.nan, 0.1, math.nan])
    poisoned = np.array([True, True, True, False, False])
    assert metrics.auroc(scores, poisoned) == 1
    assert metrics.tpr_at_fpr(scores, poisoned) == 1
    assert metrics.pr_auc(scores, poisoned) == 1


def test_a_rate_of_no_samples_and_an_impossible_bound_are_refused() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    with pytest.raises(NotEnoughDataError):
        metrics.accuracy(nothing, nothing)
    with pytest.raises(ConfigError, match="fpr"):
        metrics.tpr_at_fpr(np.ones(2), np.array([True, False]), 1.5)


def test_purity_is_of_each_given_labels_trusted_samples() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    trusted = np.array([True, True, False, True, True, False])
    poisoned = np.array([True, False, True, False, False, True])
    assert metrics.purity_per_class(labels, trusted, poisoned, 3) == [0.5, 1.0, None]
