"""Retrieval: ranks against a naive loop, shared captions, ties, and the target's name on top."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unpoison.evaluation import retrieval
from unpoison.evaluation.retrieval import first_hits, flagged_on_top, names, pool_captions, recall


def units(count: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def naive_rank(query: np.ndarray, pool: np.ndarray, right: set[int]) -> int:
    """Walk the items from the nearest on, wrong ones first among equals, until a right one comes."""
    order = sorted(range(len(pool)), key=lambda item: (-(query @ pool[item]), item in right))
    return next(place for place, item in enumerate(order) if item in right)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=4), min_size=1, max_size=12),
    seed=st.integers(0, 5),
    cells=st.sampled_from([1, 30, 1 << 20]),
)
def test_ranks_both_ways_are_those_of_a_loop(texts: list[list[str]], seed: int, cells: int) -> None:
    pool = pool_captions(texts)
    images, captions = units(len(texts), 4, seed), units(len(pool.texts), 4, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_CELLS", cells)  # from one query at a time to all at once
        to_text = first_hits(images, captions, pool.owners, pool.owned)
        to_image = first_hits(captions, images, pool.owned, pool.owners)
    for image, own in enumerate(texts):
        assert to_text[image] == naive_rank(images[image], captions, {pool.texts.index(text) for text in own})
    for place, text in enumerate(pool.texts):
        right = {image for image, own in enumerate(texts) if text in own}
        assert to_image[place] == naive_rank(captions[place], images, right)


def test_a_caption_that_two_images_share_is_in_the_pool_once() -> None:
    pool = pool_captions([("a", "b", "a"), ("b",), ("c", "a")])
    assert pool.texts == ["a", "b", "c"]
    assert sorted(zip(pool.owners.tolist(), pool.owned.tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 1),
        (2, 0),
        (2, 2),
    ]


def test_recall_counts_the_first_k() -> None:
    pool, eye = np.eye(12, dtype=np.float32), np.eye(12, dtype=np.float32)
    # query i is nearest to item i, then to the items before it: the right answer of query i is item 0
    queries = np.tril(np.ones((12, 12), dtype=np.float32)) + eye
    queries *= np.linspace(0.5, 1, 12, dtype=np.float32)
    found = recall(queries, pool, np.arange(12), np.zeros(12, dtype=np.int64))
    assert (found.at_1.n, found.at_1.value) == (12, pytest.approx(100 / 12))
    assert found.at_5.value == pytest.approx(100 * 5 / 12)
    assert found.at_10.value == pytest.approx(100 * 10 / 12)


def test_a_model_whose_embeddings_are_all_alike_finds_nothing() -> None:
    alike = np.ones((20, 3), dtype=np.float32)
    assert recall(alike, alike, np.arange(20), np.arange(20)).at_10.value == 0


@pytest.mark.parametrize("k", [1, 3, 50])
def test_flagged_items_among_the_nearest(k: int) -> None:
    queries, pool = units(15, 5, 0), units(20, 5, 1)
    flagged = np.random.default_rng(2).random(20) < 0.2
    expected = [bool(flagged[np.argsort(-(pool @ query))[:k]].any()) for query in queries]
    assert flagged_on_top(queries, pool, flagged, k).tolist() == expected
    assert flagged.any()
    assert not flagged.all()


@pytest.mark.parametrize(
    ("text", "word", "named"),
    [
        ("A Banana on a table.", "banana", True),
        ("two bananas", "banana", True),
        ("a bananarama record", "banana", False),
        ("the category", "cat", False),
        ("a fire  truck", "fire_truck", True),
        ("a fire_truck", "fire truck", True),
        ("HORIZONTAL stripes at the top", "horizontal stripes", True),
        ("a horizontal bar", "horizontal stripes", False),
        ("電車が走る", "電車", True),
        ("<b>dog</b>", "dog", True),
        ("a c++ book", "c++", True),
        ("anything", "a.*", False),
        ("anything", "", False),
    ],
)
def test_what_names_the_target(text: str, word: str, named: bool) -> None:
    assert names([text], word).tolist() == [named]
