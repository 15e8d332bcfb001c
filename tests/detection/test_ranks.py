"""The arithmetic of the separation against naive references in NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unpoison.detection.ranks import label_cross_entropy, published_regions, rank_normalise
from unpoison.results import CLEAN, MIXED, SKIPPED, SUSPECT

# few distinct values, so that ties are the rule
VALUES = st.lists(st.one_of(st.just(math.nan), st.integers(-3, 3).map(float), st.floats(-1e6, 1e6)), max_size=40)


def naive_ranks(values: list[float], groups: list[int]) -> list[float]:
    """Rank of each value among the usable ones of its group: 1 + how many are smaller, ties at their mean."""
    ranks = []
    for value, group in zip(values, groups, strict=True):
        peers = [v for v, g in zip(values, groups, strict=True) if g == group and not math.isnan(v)]
        below, equal = sum(v < value for v in peers), sum(v == value for v in peers)
        ranks.append(math.nan if math.isnan(value) else (below + (equal + 1) / 2) / len(peers))
    return ranks


@given(values=VALUES, data=st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_against_counting(values: list[float], data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    array = np.array(values, dtype=np.float64)
    np.testing.assert_allclose(rank_normalise(array), naive_ranks(values, [0] * len(values)))
    within = rank_normalise(array, np.array(groups, dtype=np.int64))
    np.testing.assert_allclose(within, naive_ranks(values, groups))
    assert ((within > 0) & (within <= 1))[~np.isnan(array)].all()


def test_ties_share_their_mean_rank() -> None:
    assert rank_normalise(np.array([5.0, 5.0, 5.0, 9.0])).tolist() == [0.5, 0.5, 0.5, 1.0]
    assert rank_normalise(np.array([np.nan, 2.0, np.nan, 1.0])).tolist()[1::2] == [1.0, 0.5]
    assert np.isnan(rank_normalise(np.full(3, np.nan))).all()


def test_ranks_of_integers_do_not_hide_the_order_of_close_losses() -> None:
    losses = 1 + np.arange(5) * 1e-12
    assert rank_normalise(losses).tolist() == [0.2, 0.4, 0.6, 0.8, 1.0]


def naive_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    rows = []
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        rows.append(-np.log(probabilities[label]))
    return np.array(rows)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cross_entropy_against_the_softmax(dtype: type) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(50, 7)).astype(dtype) * 5
    logits[3] = np.nan
    labels = random.integers(0, 7, 50)
    found = label_cross_entropy(logits, labels)
    assert found.dtype == np.float64
    assert np.isnan(found[3])
    np.testing.assert_allclose(found, naive_cross_entropy(logits, labels), rtol=1e-12, atol=1e-12)


def test_cross_entropy_neither_overflows_nor_loses_small_losses() -> None:
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0], [30.0, 0.0]], dtype=np.float32)
    found = label_cross_entropy(logits, np.array([0, 0, 0]))
    assert found[:2].tolist() == [0.0, 1000.0]
    assert found[2] == pytest.approx(math.exp(-30), rel=1e-2)


def test_published_regions_of_independent_axes() -> None:
    """64 / 19 / 17 percent: (1 - 0.2)^2, 1 - (1 - 0.1)^2, and the rest (methods' notes on CGD)."""
    grid = (np.arange(400) + 1) / 400
    clip, early = (axis.ravel() for axis in np.meshgrid(grid, grid))
    region = published_regions(clip, early, sigma1=0.2, sigma2=0.1)
    shares = {code: float((region == code).mean()) for code in (CLEAN, SUSPECT, MIXED, SKIPPED)}
    assert shares == pytest.approx({CLEAN: 0.64, SUSPECT: 0.19, MIXED: 0.17, SKIPPED: 0.0}, abs=1e-9)


def test_published_regions_at_their_borders() -> None:
    clip = np.array([0.8, 0.81, 0.9, 0.91, 0.1, 0.1, np.nan, 0.1])
    early = np.array([0.8, 0.1, 0.1, 0.1, 0.81, 0.91, 0.1, np.nan])
    expected = [CLEAN, MIXED, MIXED, SUSPECT, MIXED, SUSPECT, SKIPPED, SKIPPED]
    assert published_regions(clip, early, sigma1=0.2, sigma2=0.1).tolist() == expected
