"""Retrieval between images and captions, several captions an image: R@k both ways, and the target's name on top.

Pure functions of unit embeddings. Images of one caption text share it: each text is in the pool once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from unpoison.evaluation.intervals import rate
from unpoison.results import Recall

_CELLS = 1 << 24  # cosines held at once

Vectors = Float[np.ndarray, "q d"]
Pool = Float[np.ndarray, "p d"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionPool:
    """The different texts among the captions of ``n`` images; image ``owners[i]`` has text ``owned[i]``."""

    texts: list[str]
    owners: Int[np.ndarray, " m"]
    owned: Int[np.ndarray, " m"]


def pool_captions(captions: Sequence[Sequence[str]]) -> CaptionPool:
    """The texts in the order of their first image."""
    place_of: dict[str, int] = {}
    pairs = {
        (image, place_of.setdefault(text, len(place_of))): None
        for image, texts in enumerate(captions)
        for text in texts
    }
    owners, owned = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    return CaptionPool(texts=list(place_of), owners=owners.copy(), owned=owned.copy())


def recall(queries: Vectors, pool: Pool, query_of: Int[np.ndarray, " m"], item_of: Int[np.ndarray, " m"]) -> Recall:
    """R@1, R@5 and R@10: item ``item_of[i]`` of the pool is a right answer to query ``query_of[i]``."""
    ranks = first_hits(queries, pool, query_of, item_of)
    return Recall(at_1=rate(ranks < 1), at_5=rate(ranks < 5), at_10=rate(ranks < 10))


def first_hits(
    queries: Vectors, pool: Pool, query_of: Int[np.ndarray, " m"], item_of: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " q"]:
    """How many wrong answers stand before each query's best right one.

    A wrong answer as near as the right one stands before it: a model whose embeddings are all alike finds nothing.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    for start, cosines in _cosines(queries, pool):
        inside = (query_of >= start) & (query_of < start + len(cosines))
        right = np.zeros(cosines.shape, dtype=bool)
        right[query_of[inside] - start, item_of[inside]] = True
        best = np.where(right, cosines, -np.inf).max(axis=1, keepdims=True)
        ranks[start : start + len(cosines)] = ((cosines >= best) & ~right).sum(axis=1)
    return ranks


def flagged_on_top(queries: Vectors, pool: Pool, flagged: Bool[np.ndarray, " p"], k: int = 5) -> Bool[np.ndarray, " q"]:
    """Whether any of the ``k`` items nearest to each query is a flagged one."""
    found = np.empty(len(queries), dtype=bool)
    for start, cosines in _cosines(queries, pool):
        nearest = np.argpartition(-cosines, min(k, len(pool)) - 1, axis=1)[:, :k]
        found[start : start + len(cosines)] = flagged[nearest].any(axis=1)
    return found


def names(texts: Sequence[str], word: str) -> Bool[np.ndarray, " n"]:
    """Whether each text has ``word`` in it: whole words, singular or plural, upper or lower case, "_" as a space."""
    letters = r"\s+".join(re.escape(part) for part in word.replace("_", " ").split())
    if not letters:
        return np.zeros(len(texts), dtype=bool)
    # Scripts that set no space between words have no word's edge to look for.
    edged = word.isascii() and letters[0].isalnum() and letters[-1].isalnum()
    wanted = re.compile(rf"\b{letters}(?:s|es)?\b" if edged else letters, re.IGNORECASE)
    return np.array([wanted.search(text.replace("_", " ")) is not None for text in texts], dtype=bool)


def _cosines(queries: np.ndarray, pool: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    step = max(1, _CELLS // max(1, len(pool)))
    for start in range(0, len(queries), step):
        yield start, queries[start : start + step] @ pool.T
