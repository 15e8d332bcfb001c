"""Drift: the alignment is the best there is, and undoes a rotation exactly."""

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group

from unpoison.evaluation.drift import aligned_cosine, best_rotation, mean_cosine


def units(count: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_mean_cosine_is_that_of_a_loop() -> None:
    old, new = 3 * units(20, 6, 0), units(20, 6, 1)
    expected = np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(old, new, strict=True)])
    assert mean_cosine(old, new) == pytest.approx(expected)
    assert mean_cosine(old, -old) == pytest.approx(-1)


def test_a_rotation_is_undone() -> None:
    old = units(40, 6, 0)
    turn = ortho_group.rvs(6, random_state=3)
    assert mean_cosine(old, old @ turn) < 0.9
    assert aligned_cosine(old, old @ turn) == pytest.approx(1)
    assert best_rotation(old, old @ turn) == pytest.approx(turn.T)


def test_the_alignment_is_scipys_and_none_is_better() -> None:
    old, new = units(30, 5, 0), units(30, 5, 1)
    rotation = best_rotation(old, new)
    assert rotation @ rotation.T == pytest.approx(np.eye(5), abs=1e-12)
    reference, scale = orthogonal_procrustes(new, old)
    assert rotation == pytest.approx(reference)
    best = aligned_cosine(old, new)
    assert best == pytest.approx(scale / 30)  # the sum of the singular values, for unit rows
    others = [mean_cosine(old, new @ ortho_group.rvs(5, random_state=seed)) for seed in range(50)]
    assert mean_cosine(old, new) <= best
    assert max(others) <= best


def test_float32_embeddings_are_measured_in_double() -> None:
    old = units(50, 8, 0).astype(np.float32)
    assert mean_cosine(old, old) == pytest.approx(1, abs=1e-12)
