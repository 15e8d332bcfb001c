"""k-distance, SLOF and DAO against slow references, planted poison, and embeddings that nothing can be told from."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor

from unpoison.detection.neighbours import (
    FORMULAS,
    Neighbourhood,
    NeighboursConfig,
    dao,
    k_distance,
    lid,
    nearest,
    score_neighbourhoods,
    slof,
    unit_rows,
)
from unpoison.errors import ConfigError, NoSeparationError, NotEnoughDataError

WHOLE = NeighboursConfig(batch_size=None)


def drawn(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around four centers, uneven in density."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(4, d))
    which = random.integers(0, 4, n)
    points = centers[which] + random.uniform(0.1, 0.5, n)[:, None] * random.normal(size=(n, d))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def planted(n: int = 6000, rate: float = 0.003) -> tuple[np.ndarray, np.ndarray]:
    """Clean images of many alike, and a tight cluster of poison far from all of them. Returns embeddings, truth."""
    random = np.random.default_rng(1)
    centers = random.normal(size=(20, 64))
    points = centers[random.integers(0, 20, n)] + 0.3 * random.normal(size=(n, 64))
    truth = random.random(n) < rate
    points[truth] = random.normal(size=64) + 0.1 * random.normal(size=(int(truth.sum()), 64))
    return points.astype(np.float32), truth


def by_definition(points: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """The three formulas of arXiv 2502.01385, pair by pair, in float64."""
    distances = cdist(points.astype(np.float64), points.astype(np.float64))
    np.fill_diagonal(distances, np.inf)
    n = len(points)
    neighbours = [sorted(range(n), key=lambda j, i=i: distances[i, j])[:k] for i in range(n)]
    reach = [distances[i, neighbours[i][-1]] for i in range(n)]
    dimension = []
    for i in range(n):
        total = sum(np.log(distances[i, j] / reach[i] + 1e-4) for j in neighbours[i])
        dimension.append(-k / total)
    return {
        "k-distance": np.array(reach),
        "slof": np.array([np.mean([reach[i] / reach[j] for j in neighbours[i]]) for i in range(n)]),
        "dao": np.array(
            [np.mean([dimension[j] * np.log(reach[i] / reach[j]) for j in neighbours[i]]) for i in range(n)]
        ),
    }


@pytest.mark.parametrize(("n", "d", "k"), [(60, 5, 4), (150, 32, 16), (40, 2, 2)])
def test_scores_are_the_papers_formulas(n: int, d: int, k: int) -> None:
    points = drawn(n, d)
    found = score_neighbourhoods(points, config=NeighboursConfig(k=k, batch_size=None))
    for name, expected in by_definition(points, k).items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-4, atol=2e-4, err_msg=name)


def test_batches_are_scored_one_by_one() -> None:
    """Each row's score is what its batch alone gives, and every row is in one batch of at most batch_size."""
    points = drawn(205, 8)
    config = NeighboursConfig(k=4, batch_size=50)
    found = score_neighbourhoods(points, config=config, seed=7)
    order = np.random.default_rng(7).permutation(205)
    batches = np.array_split(order, 5)
    assert max(map(len, batches)) <= 50
    for batch in batches:
        for name, expected in by_definition(points[batch], 4).items():
            np.testing.assert_allclose(found[name][batch], expected, rtol=1e-3, atol=1e-3)


def test_neighbours_agree_with_scikit_learn() -> None:
    """Local outlier factors rank as SLOF does where density varies little within a neighbourhood."""
    points = drawn(400, 6)
    theirs = -LocalOutlierFactor(n_neighbors=16).fit(points).negative_outlier_factor_
    ours = score_neighbourhoods(points, config=WHOLE)["slof"]
    assert np.corrcoef(ours.argsort().argsort(), theirs.argsort().argsort())[0, 1] > 0.8


def test_known_answers_on_a_line() -> None:
    """Distances 1, 2 to the neighbours of two rows, 4, 4 of the third."""
    near = Neighbourhood(
        distances=np.array([[1.0, 2.0], [1.0, 2.0], [4.0, 4.0]]), rows=np.array([[1, 2], [0, 2], [0, 1]])
    )
    assert k_distance(near).tolist() == [2, 2, 4]
    np.testing.assert_allclose(slof(near), [(1 + 0.5) / 2, (1 + 0.5) / 2, 2.0])
    even = -2 / (np.log(0.5 + 1e-4) + np.log(1 + 1e-4))
    np.testing.assert_allclose(lid(near), [even, even, 1e4])
    np.testing.assert_allclose(dao(near), [1e4 * np.log(0.5) / 2] * 2 + [even * np.log(2)])


@pytest.mark.parametrize("name", FORMULAS)
def test_a_planted_cluster_is_ranked_first_within_batches(name: str) -> None:
    points, truth = planted()
    scores = score_neighbourhoods(points, config=NeighboursConfig(batch_size=1000))[name]
    assert roc_auc_score(truth, scores) > 0.99
    assert truth[np.argsort(-scores)[:10]].all()


def test_over_all_rows_the_cluster_hides() -> None:
    """With more than k poisoned rows at once, poison has neighbours enough: why the batch is a parameter."""
    points, truth = planted(rate=0.02)
    assert truth.sum() > 3 * 16
    whole = score_neighbourhoods(points, config=WHOLE)["k-distance"]
    batches = score_neighbourhoods(points, config=NeighboursConfig(batch_size=500))["k-distance"]
    assert roc_auc_score(truth, batches) > 0.95
    assert roc_auc_score(truth, whole) < 0.2


@pytest.mark.parametrize("batch_size", [None, 1500])
def test_an_approximate_search_ranks_alike(batch_size: int | None) -> None:
    points, truth = planted(rate=0.002)
    exact, rough = (
        score_neighbourhoods(points, config=NeighboursConfig(batch_size=batch_size, index=index, probes=16))
        for index in ("exact", "approximate")
    )
    for name in FORMULAS:
        assert abs(roc_auc_score(truth, exact[name]) - roc_auc_score(truth, rough[name])) < 0.01
        assert np.corrcoef(exact[name], rough[name])[0, 1] > 0.95
    assert (rough["k-distance"] >= exact["k-distance"] - 1e-6).all()  # a neighbour missed is a further one


def test_probing_every_cell_is_exact() -> None:
    points = drawn(500, 8)
    exact, rough = (
        score_neighbourhoods(points, config=NeighboursConfig(batch_size=None, index=index, probes=10_000))
        for index in ("exact", "approximate")
    )
    for name in FORMULAS:
        np.testing.assert_allclose(rough[name], exact[name], rtol=1e-6, atol=1e-9)


def test_cells_with_too_few_rows_are_searched_on() -> None:
    """One probe cannot give 60 neighbours where a cell holds about 40 rows."""
    units, _ = unit_rows(drawn(400, 8))
    near = next(iter(nearest(units, 60, index="approximate", probes=1)))
    assert near.rows.min() >= 0
    assert np.isfinite(near.distances).all()


@pytest.mark.parametrize("index", ["exact", "approximate"])
def test_the_seed_decides(index: str) -> None:
    points, _ = planted(2000)
    config = NeighboursConfig(batch_size=700, index=index)  # pyright: ignore[reportArgumentType]
    first, again, other = (score_neighbourhoods(points, config=config, seed=seed)["dao"] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_duplicates_divide_nothing_by_zero() -> None:
    points = drawn(200, 8)
    points[:50] = points[0]
    points[50:60] = points[50]
    found = score_neighbourhoods(points, config=WHOLE)
    assert all(np.isfinite(values).all() for values in found.values())
    np.testing.assert_allclose(found["k-distance"][:50], 1e-6)
    np.testing.assert_allclose(found["slof"][:50], 1.0)
    np.testing.assert_allclose(found["dao"][:50], 0.0)


def test_equal_embeddings_separate_nothing() -> None:
    for points in (np.ones((40, 8)), np.outer(np.arange(1, 41), np.ones(8))):  # the same direction, other lengths
        with pytest.raises(NoSeparationError, match="All 40 embeddings are equal") as caught:
            score_neighbourhoods(points.astype(np.float32))
        assert caught.value.hint


def test_a_bad_row_costs_that_row() -> None:
    points = drawn(60, 8)
    clean = score_neighbourhoods(np.delete(points, [3, 9, 11, 40], axis=0), config=WHOLE)
    points[3, 2], points[9], points[11], points[40, 0] = np.nan, np.inf, 0.0, -np.inf
    found = score_neighbourhoods(points, config=WHOLE)
    for name, values in found.items():
        assert np.flatnonzero(np.isnan(values)).tolist() == [3, 9, 11, 40]
        np.testing.assert_allclose(np.delete(values, [3, 9, 11, 40]), clean[name])


@pytest.mark.parametrize("n", [0, 1, 16])
def test_too_few_rows_are_refused(n: int) -> None:
    with pytest.raises(NotEnoughDataError, match=f"have {n}, need at least 17") as caught:
        score_neighbourhoods(drawn(40, 8)[:n])
    assert "lower k" in caught.value.hint
    points = drawn(40, 8)
    points[n:] = np.nan
    with pytest.raises(NotEnoughDataError, match=f"have {n}"):
        score_neighbourhoods(points)


def test_exactly_k_others_are_enough() -> None:
    found = score_neighbourhoods(drawn(17, 8))
    assert all(np.isfinite(values).all() for values in found.values())


def test_settings_out_of_range_are_refused() -> None:
    for name, wrong in (("k", 0), ("probes", 0), ("batch_size", 33), ("batch_size", 0)):
        with pytest.raises(ConfigError):
            replace(NeighboursConfig(), **{name: wrong})
    assert NeighboursConfig(batch_size=34).batch_size == 34


def test_lengths_do_not_matter() -> None:
    points = drawn(80, 8)
    lengths = np.geomspace(1e-30, 1e30, 80)[:, None]
    near, far = (score_neighbourhoods(array, config=WHOLE)["dao"] for array in (points, points * lengths))
    np.testing.assert_allclose(near, far, rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(0, 40), st.integers(1, 4)),
        elements=st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, np.nan, np.inf]),
    ),
    st.sampled_from([None, 8]),
)
def test_whatever_comes_scores_or_refuses(points: np.ndarray, batch_size: int | None) -> None:
    try:
        found = score_neighbourhoods(points, config=NeighboursConfig(k=3, batch_size=batch_size))
    except (NotEnoughDataError, NoSeparationError):
        return
    usable = np.isfinite(points).all(axis=1) & (points != 0).any(axis=1)
    for values in found.values():
        assert values.shape == (len(points),)
        assert np.array_equal(np.isfinite(values), usable)


@settings(max_examples=30, deadline=None)
@given(st.integers(18, 120), st.integers(8, 40), st.integers(0, 5))
def test_every_row_is_in_one_batch(n: int, batch_size: int, seed: int) -> None:
    found = score_neighbourhoods(drawn(n, 6), config=NeighboursConfig(k=3, batch_size=batch_size), seed=seed)
    assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize("order", ["torch, faiss", "faiss, torch"])
def test_torch_and_faiss_work_in_one_process(order: str) -> None:
    """Each brings an OpenMP of its own: with two threads each, in turn and in either order of loading."""
    code = (
        f"import {order}\n"
        "import numpy as np\n"
        "torch.set_num_threads(2); faiss.omp_set_num_threads(2)\n"
        "points = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)\n"
        "for _ in range(3):\n"
        "    torch.rand(400, 400) @ torch.rand(400, 400)\n"
        "    index = faiss.IndexFlatL2(64); index.add(points); found = index.search(points, 5)[1]\n"
        "    torch.linalg.svd(torch.rand(100, 100))\n"
        "assert (found[:, 0] == np.arange(3000)).all()\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_faiss_is_loaded_only_when_it_is_needed() -> None:
    code = "import sys, unpoison.api_pairs, unpoison.catalog; print('faiss' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "False\n"
