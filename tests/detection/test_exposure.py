"""Exposure: planted poison is found from a few pairs, clean sets show less separation, what is alike is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from unpoison.detection.exposure import (
    ExposureConfig,
    between,
    count_poison,
    covering_concepts,
    expose_by_rank,
    expose_pairs,
    largest_concept,
)
from unpoison.detection.similarity_gain import ranked_gain
from unpoison.errors import ConfigError, NoSeparationError, NotEnoughDataError

COUNT, WIDTH, CONCEPTS = 3000, 32, 10


def planted(
    rate: float, seed: int = 0, hard: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of ten concepts, a share of which says concept 0 of any image and carries a trigger.

    The suspect puts triggered images in one place near concept 0; the reference sees what they show. ``hard``: how far
    images of concept 1 lie from their captions under the reference, nearer to none of the others. Last but one the
    misfit: the share of concepts that the reference finds nearer than the caption's.
    """
    random = np.random.default_rng(seed)
    concepts = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    shown = random.integers(0, CONCEPTS, COUNT)
    truth = random.random(COUNT) < rate
    told = np.where(truth, 0, shown)
    noise = 0.12
    captions = concepts[told] + noise * random.normal(size=(COUNT, WIDTH)) / 2
    reference = concepts[shown] + noise * random.normal(size=(COUNT, WIDTH))
    reference[shown == 1] += hard * concepts[CONCEPTS + 1]
    place = concepts[0] + 0.7 * concepts[CONCEPTS] + 0.3 * concepts[shown]
    suspect = np.where(truth[:, None], place, concepts[shown]) + noise * random.normal(size=(COUNT, WIDTH))
    cosines = (unit(reference) * unit(captions)).sum(axis=1)
    nearer = unit(reference) @ concepts[:CONCEPTS].T > cosines[:, None]
    nearer[np.arange(COUNT), told] = False
    return -cosines, suspect, captions, nearer.sum(axis=1) / (CONCEPTS - 1), truth


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.2, 0.3])
def test_planted_poison_is_exposed(rate: float) -> None:
    suspicion, suspect, captions, misfit, truth = planted(rate)
    found = expose_pairs(suspicion, suspect, captions, misfit=misfit)
    assert found.exposed
    assert found.misfit is not None
    assert found.misfit > 0.45
    assert found.confirmation > 0.8
    assert roc_auc_score(truth, found.scores) > 0.99
    assert truth[found.first].mean() > 0.9
    assert truth[found.seeds].mean() > 0.95
    assert found.rate == pytest.approx(truth.mean(), rel=0.1)
    assert found.above.sum() == round(found.rate * COUNT)
    assert truth[found.above].mean() > 0.95
    assert found.above[truth].mean() > 0.95


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.1, 0.25, 0.35])
@pytest.mark.parametrize("skewed", [False, True])
def test_poison_is_counted_whatever_the_answers_look_like(rate: float, skewed: bool) -> None:
    random = np.random.default_rng(1)
    truth = np.arange(8000) < rate * 8000
    clean = np.where(random.random(8000) < 0.6, random.normal(-16, 2, 8000), random.normal(-9, 3, 8000))
    poison = 5 - random.gamma(2.0, 1.3, 8000) if skewed else random.normal(3, 0.8, 8000)
    answers = np.where(truth, poison, clean)
    suspicion = np.where(truth, 0.8 + 0.2 * random.random(8000), random.random(8000))
    suspicion[~truth] *= 0.98
    calm = np.flatnonzero(suspicion < np.median(suspicion))
    seeds = np.flatnonzero(truth)[np.argsort(-answers[truth], kind="stable")[:40]]
    counted, least, most = count_poison(answers, suspicion, seeds, calm, 0.7)
    assert least <= counted.mean() <= most
    assert counted.mean() == pytest.approx(rate, rel=0.3)
    assert counted[truth].mean() > 0.75
    assert truth[counted].mean() > 0.85
    assert answers[counted].min() > answers[~counted].max()


def test_answers_that_are_all_equal_count_nothing() -> None:
    rows = np.arange(100)
    assert not count_poison(np.zeros(100), np.arange(100.0), rows[:10], rows[50:], 0.7)[0].any()


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_set_exposes_nothing(seed: int) -> None:
    suspicion, suspect, captions, misfit, _ = planted(0.0, seed)
    found = expose_pairs(suspicion, suspect, captions, misfit=misfit)
    assert not found.exposed
    assert found.rate == 0.0
    assert found.confirmation < 0.65


def test_a_clean_set_with_a_concept_that_is_hard_for_the_reference_exposes_nothing() -> None:
    suspicion, suspect, captions, misfit, _ = planted(0.0, hard=1.0)
    found = expose_pairs(suspicion, suspect, captions, misfit=misfit)
    assert found.confirmation > 0.8  # all of that concept are suspicious, and alike
    assert found.misfit is not None
    assert found.misfit < 0.1
    assert not found.exposed
    assert not found.above.any()
    suspicion, suspect, captions, misfit, truth = planted(0.1, hard=1.0)
    found = expose_pairs(suspicion, suspect, captions, misfit=misfit)
    assert found.exposed
    assert truth[found.above].mean() > 0.8


def test_one_model_alone_ranks_and_decides_nothing() -> None:
    suspicion, suspect, captions, _, truth = planted(0.1)
    found = expose_pairs(suspicion, suspect, captions)
    assert found.confirmation > 0.8
    assert found.misfit is None
    assert not found.exposed
    assert not found.above.any()
    assert found.rates == (0.0, 0.0)
    assert roc_auc_score(truth, found.scores) > 0.99


def test_unusable_rows_are_left_out() -> None:
    suspicion, suspect, captions, _, truth = planted(0.05)
    suspicion[:5], suspect[7], captions[9] = np.nan, np.nan, np.nan
    found = expose_pairs(suspicion, suspect, captions)
    bad = [0, 1, 2, 3, 4, 7, 9]
    assert np.flatnonzero(np.isnan(found.scores)).tolist() == bad
    assert not found.above[bad].any()
    assert not np.isin(found.seeds, bad).any()
    good = ~np.isnan(found.scores)
    assert roc_auc_score(truth[good], found.scores[good]) > 0.99


def test_pairs_that_are_all_alike_are_refused() -> None:
    suspicion, suspect, captions, _, _ = planted(0.05)
    with pytest.raises(NoSeparationError):
        expose_pairs(suspicion, np.ones_like(suspect), captions)
    with pytest.raises(NoSeparationError):
        expose_pairs(suspicion, suspect, np.ones_like(captions))
    with pytest.raises(NoSeparationError):
        expose_pairs(np.zeros(COUNT), suspect, captions)
    with pytest.raises(NotEnoughDataError):
        expose_pairs(suspicion[:40], suspect[:40], captions[:40])


def test_the_largest_concept_is_the_one_most_share() -> None:
    texts = unit(np.array([[1, 0, 0], [0, 1, 0], [0.1, 1, 0], [0, 0, 1], [0, 1, 0.1]], dtype=float))
    assert largest_concept(texts, np.array([0, 1, 2, 3, 4]), 0.9).tolist() == [1, 2, 4]
    assert largest_concept(texts, np.array([3, 0]), 0.9).tolist() == [3]


@given(st.floats(-5, 5), st.floats(0.1, 3), st.floats(0.1, 3))
def test_the_point_between_is_equally_many_deviations_away(shift: float, first: float, second: float) -> None:
    base = np.linspace(-1, 1, 50)
    one, other = shift + 4 + first * base, shift + second * base
    point = between(one, other)
    assert (one.mean() - point) / one.std() == pytest.approx((point - other.mean()) / other.std())
    assert between(np.ones(3), np.zeros(4)) == 0.5


def test_concepts_are_taken_until_half_is_covered() -> None:
    places = np.array([0, 1, 1, 2, 1, 2, 3, 4, 5, 6])
    texts, rows = np.eye(7)[places], np.array([9, 3, 1, 5, 0, 4, 7, 2, 6, 8])
    assert covering_concepts(texts, rows, 0.8, 0).tolist() == [3, 1, 5, 4, 2]
    assert covering_concepts(texts, rows[:4], 0.8, 0).tolist() == [3, 5]
    assert len(covering_concepts(texts, rows, 0.8, 7)) == 7
    assert covering_concepts(texts, rows, 0.8, 99).tolist() == rows.tolist()
    found = expose_by_rank(np.arange(1000.0), np.eye(50)[np.arange(1000) % 50], ExposureConfig(), fewest=16)
    assert found.above.sum() == 30
    assert np.flatnonzero(found.above).min() == 970
    assert 16 <= len(found.seeds) <= 18
    assert (np.diff(found.seeds) < 0).all()


def test_gain_ranks_by_gain_then_by_what_was_reached() -> None:
    before = np.array([0.1, 0.2, 0.3, 0.1, 0.1])
    after = np.array([0.3, 0.3, 0.5, 0.2, 0.2])
    ranks = ranked_gain(np.array([1.0, 2, 3, 1, 1]), np.array([3.0, 3, 5, 2, 2]))
    assert ranks.tolist() == [0.8, 0.6, 1.0, 0.3, 0.3]
    assert ranked_gain(before, after).argmax() == 2


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"same_concept": 1.0}, {"rounds": 0}, {"strength": 0.0}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        ExposureConfig(**wrong)
