"""PAD-FT's purification against sums in high precision, and its choice of samples."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unpoison.defenses.pad_ft import PADFTConfig
from unpoison.detection.self_purified import (
    label_margin,
    own_loss,
    score_by_own_loss,
    select_clean,
    with_suspects,
)
from unpoison.errors import NotEnoughDataError, ResultError
from unpoison.results import CLEAN, MIXED, SKIPPED, SUSPECT, SampleScores

NAMES = ("a", "b", "c")
getcontext().prec = 400


def exact_loss(logits: list[float], label: int) -> Decimal:
    """-log p_y with 400 digits."""
    powers = [(Decimal(value) - Decimal(logits[label])).exp() for value in logits]
    return sum(powers, Decimal(0)).ln()


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (3,), elements=st.floats(-300, 300)), st.integers(0, 2))
def test_the_loss_keeps_what_a_softmax_loses(logits: np.ndarray, label: int) -> None:
    found = own_loss(logits[None], np.array([label]))[0]
    expected = float(exact_loss(logits.tolist(), label))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-290)


def test_saturated_samples_keep_their_order() -> None:
    logits = np.array([[60.0, 0, 0], [61.0, 0, 0], [500.0, 0, 0], [501.0, 0, 0]])
    loss = own_loss(logits, np.zeros(4, dtype=np.int64))
    assert (np.diff(loss) < 0).all()
    assert (loss > 0).all()
    assert (1 - np.exp(-loss) < 1e-15).all()  # a softmax says 1 for all of them


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_it_orders_as_the_papers_symmetric_loss(seed: int, weight: float) -> None:
    random = np.random.default_rng(seed)
    logits, label = random.normal(0, 3, (20, 4)), random.integers(0, 4, 20)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    forward = -np.log(p[np.arange(20), label])
    reverse = -(p * np.where(np.eye(4)[label] > 0, 0.0, -4.0)).sum(1)  # log 0 clamped to -4
    assert (np.argsort(weight * forward + (1 - weight) * reverse) == np.argsort(own_loss(logits, label))).all()


def scores_of(logits: np.ndarray, labels: np.ndarray) -> SampleScores:
    return score_by_own_loss(logits, labels, [str(row) for row in range(len(labels))], NAMES)


def test_each_class_gives_its_surest() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 40, 6])
    logits = random.normal(0, 2, (86, 3))
    logits[3] = np.nan  # a skipped row
    split = select_clean(scores_of(logits, labels), 10)
    assert split.region[3] == SKIPPED
    assert np.bincount(labels[split.clean]).tolist() == [10, 10, 3]  # half of a small class
    loss = own_loss(logits, labels)
    for label in (0, 1):
        members = np.flatnonzero((labels == label) & ~np.isnan(loss))
        assert set(split.clean[labels[split.clean] == label]) == set(members[np.argsort(loss[members])[:10]])


def test_more_than_half_of_a_class_has_to_be_asked_for() -> None:
    scores = scores_of(np.random.default_rng(0).normal(0, 1, (30, 3)), np.arange(30) % 3)
    assert [len(select_clean(scores, n).clean) for n in (4, 5, 8)] == [12, 15, 15]
    assert [len(select_clean(scores, n, largest_share=1.0).clean) for n in (8, 10, 99)] == [24, 30, 30]
    assert [PADFTConfig(per_class=n).largest_share for n in (10, 250, 251)] == [0.5, 0.5, 1.0]


def test_margins_break_ties() -> None:
    far = 800.0  # exp(-800) is 0 in float64, so every loss is
    logits = np.array([[far, 0, 0], [far + 5, 0, 0], [far + 9, 0, 0], [far + 1, 0, 0]])
    labels = np.zeros(4, dtype=np.int64)
    assert not own_loss(logits, labels).any()
    assert label_margin(logits, labels).tolist() == [800, 805, 809, 801]
    assert select_clean(scores_of(logits, labels), 2).clean.tolist() == [1, 2]


def test_other_scores_take_the_choice_over() -> None:
    labels = np.zeros(40, dtype=np.int64)
    logits = np.zeros((40, 3))
    logits[:, 0] = np.arange(40)  # the model is surest of the last
    own = scores_of(logits, labels)
    other = SampleScores(
        method="other", ids=own.ids, labels=labels, class_names=NAMES,
        axes={"x": np.arange(40.0)}, primary="x",
    )  # fmt: skip  # suspects the last most
    assert set(select_clean(own, 5).clean) == set(range(35, 40))
    assert set(select_clean(own, 5, other=other, share=1.0).clean) == set(range(5))
    assert set(select_clean(own, 5, other=other, share=0.0).clean) == set(range(35, 40))
    other.axes["x"][0] = np.nan
    assert select_clean(own, 5, other=other).region[0] == SKIPPED
    strange = SampleScores(
        method="other", ids=[f"x{name}" for name in own.ids], labels=labels, class_names=NAMES,
        axes=other.axes, primary="x",
    )  # fmt: skip
    with pytest.raises(ResultError, match="another set"):
        select_clean(own, 5, other=strange)
    with pytest.raises(ResultError, match="another list of classes"):
        select_clean(own, 5, other=replace(other, class_names=NAMES[::-1]))
    with pytest.raises(ResultError, match="of other labels"):
        select_clean(own, 5, other=replace(other, labels=labels + 1))


def test_trusted_samples_stay_trusted() -> None:
    split = select_clean(scores_of(np.random.default_rng(0).normal(0, 1, (30, 3)), np.arange(30) % 3), 4)
    marked = with_suspects(split, np.arange(30))
    assert set(marked.clean) == set(split.clean)
    assert (marked.region[split.mixed] == SUSPECT).all()
    assert (split.region[split.mixed] == MIXED).all()
    assert (split.region[split.clean] == CLEAN).all()


def test_nothing_usable_is_an_error() -> None:
    with pytest.raises(NotEnoughDataError):
        select_clean(scores_of(np.full((4, 3), np.nan), np.zeros(4, dtype=np.int64)), 2)
