"""Low similarity and the density of the least similar pairs: known answers, planted poison, nothing to tell apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from unpoison.detection.ranks import mean_of_ranks, rank_normalise
from unpoison.detection.reference_similarity import DensityConfig, density_of_least_similar, low_similarity
from unpoison.errors import ConfigError, NoSeparationError, NotEnoughDataError


def planted(n: int = 2000, poisoned: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Suspicion, embeddings and truth: poison is less similar than most, as are many bad captions, and clustered."""
    random = np.random.default_rng(0)
    truth = np.arange(n) < poisoned
    suspicion = random.normal(size=n) + 2.5 * truth
    embeddings = random.normal(size=(n, 32))
    embeddings[truth] = random.normal(size=32) + 0.3 * random.normal(size=(poisoned, 32))
    return suspicion, embeddings.astype(np.float32), truth


def test_density_is_the_mean_distance_inside_the_least_similar_share() -> None:
    suspicion, embeddings, _ = planted(300, 10)
    scores = density_of_least_similar(suspicion, embeddings, DensityConfig(share=0.2, neighbours=5))
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    inside = np.argsort(-suspicion)[:60]
    distances = np.sort(cdist(units[inside], units[inside]), axis=1)[:, 1:6]
    np.testing.assert_allclose(scores[inside], 1 - distances.mean(axis=1) / 2, rtol=1e-5)
    outside = np.setdiff1d(np.arange(300), inside)
    np.testing.assert_allclose(scores[outside], rank_normalise(suspicion)[outside] - 1)
    assert scores[inside].min() >= 0 > scores[outside].max()
    assert scores.min() > -1


def test_density_tells_poison_from_bad_captions() -> None:
    suspicion, embeddings, truth = planted()
    scores = density_of_least_similar(suspicion, embeddings)
    assert roc_auc_score(truth, suspicion) > 0.9
    assert truth[np.argsort(-suspicion)[:20]].mean() < 0.9
    assert truth[np.argsort(-scores)[:20]].all()


def test_tied_similarity_keeps_the_outside_below() -> None:
    suspicion, embeddings, _ = planted(200, 10)
    scores = density_of_least_similar(np.zeros(200), embeddings)
    assert (scores >= 0).sum() == 20
    tied = np.where(suspicion > 0, 1.0, 0.0)
    assert (density_of_least_similar(tied, embeddings) >= 0).sum() == 20


def test_a_bad_row_costs_that_row() -> None:
    suspicion, embeddings, _ = planted(200, 10)
    suspicion[5], embeddings[6], embeddings[150] = np.nan, np.nan, 0
    scores = density_of_least_similar(suspicion, embeddings)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [5, 6, 150]


def test_too_few_or_wrong_settings_are_refused() -> None:
    suspicion, embeddings, _ = planted(60, 3)
    with pytest.raises(NotEnoughDataError, match="least similar 10 percent: have 6, need at least 9"):
        density_of_least_similar(suspicion, embeddings)
    with pytest.raises(NotEnoughDataError):
        density_of_least_similar(suspicion[:0], embeddings[:0])
    for name, wrong in (("share", 0.0), ("share", 1.5), ("neighbours", 0), ("share", float("nan"))):
        with pytest.raises(ConfigError):
            replace(DensityConfig(), **{name: wrong})


def test_low_similarity_is_minus_the_cosine() -> None:
    assert low_similarity(np.array([0.5, -1.0])).tolist() == [-0.5, 1.0]
    scores = low_similarity(np.array([0.5, np.nan, 0.1]))
    assert scores[0] < scores[2]
    assert np.isnan(scores[1])
    with pytest.raises(NoSeparationError, match="equally similar") as caught:
        low_similarity(np.array([0.3, np.nan, 0.3]))
    assert caught.value.hint


def test_the_mean_of_ranks() -> None:
    first, second = np.array([1.0, 5.0, 3.0, 9.0]), np.array([10.0, 30.0, 30.0, np.nan])
    np.testing.assert_allclose(
        mean_of_ranks([first, second]), [(1 / 4 + 1 / 3) / 2, (3 / 4 + 2.5 / 3) / 2, (2 / 4 + 2.5 / 3) / 2, np.nan]
    )
    np.testing.assert_allclose(mean_of_ranks([first]), rank_normalise(first))
