"""k-distance, SLOF and DAO: a poisoned image lies far from its neighbours in the embeddings of a poisoned CLIP.

Paper
    Huang, Erfani, Li, Ma, Bailey. "Detecting Backdoor Samples in Contrastive Language Image Pretraining." ICLR 2025,
    arXiv 2502.01385. SLOF: Schubert, Zimek, Kriegel, 2014. DAO: Anderberg, Bailey, Campello, Houle, Marques,
    Radovanović, Zimek, "Dimensionality-Aware Outlier Detection", SDM 2024, arXiv 2401.05453.
Idea
    A CLIP learns the trigger apart from everything else. Among a random few thousand images there are at most a few
    poisoned ones, so that each lies alone, far from its nearest neighbours.
Needs
    Image embeddings of the CLIP that was trained on the pairs. No captions, no clean data, no labels.
Steps
    1. Random batches; within each the k nearest neighbours of every image, Euclidean, without itself.
    2. k-distance: d_k(i), the distance to the k-th neighbour.
    3. SLOF: mean over the neighbours j of d_k(i) / d_k(j), which is 1 inside a region of even density.
    4. DAO: mean over the neighbours j of LID(j) log(d_k(i) / d_k(j)). LID(j) is the local intrinsic dimension, by
       maximum likelihood -k / sum_m log(d_m(j) / d_k(j) + 1e-4).
Where we differ, and what the paper leaves open
    The published code skips the first neighbour of i, shifts numbers of neighbours by one, and counts a point as its
    own neighbour in d_k(j) and LID(j): here all three leave out the point itself and nothing else.
    The batch is the paper's training batch; here a parameter, 2,048. Over all rows at once poison is a cluster of its
    own with neighbours enough, and scores low: ``batch_size=None`` is for sets in which it is rarer than k.
    Distances under 1e-6 count as 1e-6, so that duplicates divide nothing by zero. A point whose k neighbours are all
    duplicates has LID 0; LID is at most 1e4, where all neighbours are equally far.
    ``index="approximate"`` looks through a part of the rows: an inverted file (IVF), not a graph (HNSW), because a
    seed then gives the same neighbours on any number of threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from unpoison.errors import ConfigError, NoSeparationError, NotEnoughDataError
from unpoison.runs import Progress, Silent

Vectors = Float[np.ndarray, "n d"]
Scores = Float[np.ndarray, " n"]

_OFFSET = 1e-4  # of the paper's LID: keeps the logarithm of a distance of 0 finite
_LEAST = 1e-6  # float32 tells unit vectors no finer apart
_AT_ONCE = 4096  # rows whose neighbours are searched between two signs of progress
_TRAINED = 39  # rows that faiss wants for each cell of an inverted file


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig:
    """The paper's k; the batch is ours."""

    k: int = 16
    batch_size: int | None = 2048
    """Rows among which neighbours are looked for, drawn at random; None for all rows at once."""
    index: Literal["exact", "approximate"] = "exact"
    probes: int = 32
    """Cells of the inverted file that an approximate search looks into."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.probes < 1:
            raise ConfigError(
                f"expected k and probes of at least 1, got {self.k} and {self.probes}.", hint="The paper's k is 16."
            )
        if self.batch_size is not None and self.batch_size < 2 * (self.k + 1):
            raise ConfigError(
                f"expected a batch_size of at least 2 (k + 1) = {2 * (self.k + 1)}, got {self.batch_size}.",
                hint="Raise batch_size or lower k.",
            )

    def most_poison(self, total: int) -> float:
        """The share of poison from which on, in a batch of ``total`` rows, it is its own k neighbours and ranks low."""
        return self.k / min(self.batch_size or total, total)


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbourhood:
    """The ``k`` nearest other rows of each row of a batch, nearest first: Euclidean distances and row numbers."""

    distances: Float[np.ndarray, "m k"]
    rows: Int[np.ndarray, "m k"]


def k_distance(near: Neighbourhood) -> Float[np.ndarray, " m"]:
    """d_k(i), in [1e-6, 2] for unit vectors."""
    return near.distances[:, -1].clip(_LEAST)


def slof(near: Neighbourhood) -> Float[np.ndarray, " m"]:
    """mean_j d_k(i) / d_k(j), above 0; about 1 where density is even."""
    reach = k_distance(near)
    return (reach[:, None] / reach[near.rows]).mean(axis=1)


def lid(near: Neighbourhood) -> Float[np.ndarray, " m"]:
    """-k / sum_m log(d_m / d_k + 1e-4), in [0, 1e4]: Amsaleg et al. 2015, as the paper has it."""
    reach = near.distances[:, -1]
    ratios = near.distances / reach.clip(_LEAST)[:, None]
    decay = -np.log(ratios + _OFFSET).mean(axis=1)
    return np.where(reach < _LEAST, 0.0, 1 / decay.clip(_OFFSET))


def dao(near: Neighbourhood) -> Float[np.ndarray, " m"]:
    """mean_j LID(j) log(d_k(i) / d_k(j)); about 0 where density is even."""
    logs = np.log(k_distance(near))
    return (lid(near)[near.rows] * (logs[:, None] - logs[near.rows])).mean(axis=1)


Formula = Callable[[Neighbourhood], Float[np.ndarray, " m"]]
FORMULAS: Mapping[str, Formula] = {"k-distance": k_distance, "slof": slof, "dao": dao}


def score_neighbourhoods(
    embeddings: Vectors,
    formulas: Mapping[str, Formula] = FORMULAS,
    config: NeighboursConfig | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """Each formula's scores of all rows from one search, higher = more suspicious.

    Rows are scaled to length 1; those that cannot be (a value that is no finite number, all zeros) score NaN and are
    nobody's neighbour. ``seed`` draws the batches and the cells of an approximate search.
    Raises NotEnoughDataError for fewer than k + 1 usable rows, NoSeparationError where these are all equal.
    """
    config, progress = config or NeighboursConfig(), progress or Silent()
    units, usable = unit_rows(embeddings)
    kept = np.flatnonzero(usable)
    if len(kept) <= config.k:
        raise NotEnoughDataError(
            "usable embeddings", have=len(kept), need=config.k + 1, hint=f"Give more rows, or lower k = {config.k}."
        )
    if (units[kept] == units[kept[0]]).all():
        raise NoSeparationError(
            f"All {len(kept):,} embeddings are equal: no row is further from the others than any other.",
            hint="Give a model that tells these images apart.",
        )
    scores = {name: np.full(len(embeddings), np.nan) for name in formulas}
    found = _neighbourhoods(units, kept, config, seed)
    width = min(config.batch_size or _AT_ONCE, _AT_ONCE)
    for rows, near in progress.track(found, total=len(kept), what="neighbours", weight=width, unit="rows"):  # (1)
        if near is not None:
            for name, formula in formulas.items():  # (2) to (4)
                scores[name][rows] = formula(near)
    return scores


def unit_rows(embeddings: Vectors) -> tuple[Float32[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
    """Rows scaled to length 1, and which could be; the others are NaN. However large or small the values are."""
    units = np.array(embeddings, dtype=np.float32)
    usable = np.ones(len(units), dtype=bool)
    for start in range(0, len(units), _AT_ONCE):
        block = np.asarray(embeddings[start : start + _AT_ONCE], dtype=np.float64)
        largest = np.abs(block).max(axis=1, initial=0.0)
        good = np.isfinite(block).all(axis=1) & (largest > 0)
        block = block[good] / largest[good, None]
        part = slice(start, start + len(good))
        usable[part] = good
        units[part][good] = block / np.linalg.norm(block, axis=1, keepdims=True)
        units[part][~good] = np.nan
    return units, usable


def nearest(
    units: Float32[np.ndarray, "m d"],
    k: int,
    *,
    index: Literal["exact", "approximate"] = "exact",
    probes: int = 32,
    seed: int = 0,
) -> Iterator[Neighbourhood]:
    """The k nearest other rows of all of ``units`` (more than k), in blocks of 4,096 rows in their order."""
    faiss = _faiss()
    exact: Any = faiss.IndexFlatL2(units.shape[1])
    searched = exact
    if index == "approximate":
        searched = _inverted_file(faiss, units, probes, seed)
    exact.add(units)
    for start in range(0, len(units), _AT_ONCE):
        wanted = units[start : start + _AT_ONCE]
        _, rows = searched.search(wanted, k + 1)
        short = np.flatnonzero((rows < 0).any(axis=1))  # the probed cells held fewer
        if len(short):
            rows[short] = exact.search(wanted[short], k + 1)[1]
        yield _without_self(units, start, rows)


def _neighbourhoods(
    units: np.ndarray, kept: np.ndarray, config: NeighboursConfig, seed: int
) -> Iterator[tuple[np.ndarray, Neighbourhood | None]]:
    """Batch by batch the rows and their neighbours; while a large batch is searched, rows with None."""
    random = np.random.default_rng(seed)
    size = config.batch_size or len(kept)
    order = random.permutation(kept) if size < len(kept) else kept
    for batch in np.array_split(order, -(-len(kept) // size)):
        blocks = []
        search = nearest(units[batch], config.k, index=config.index, probes=config.probes, seed=seed)
        for block in search:
            blocks.append(block)
            if len(blocks) * _AT_ONCE < len(batch):
                yield batch[:0], None
        distances = np.concatenate([block.distances for block in blocks])
        rows = np.concatenate([block.rows for block in blocks])
        yield batch, Neighbourhood(distances=distances, rows=rows)


def _without_self(units: np.ndarray, start: int, rows: np.ndarray) -> Neighbourhood:
    """The row itself left out, or the furthest where duplicates pushed it out; distances anew, from differences.

    faiss takes them from inner products, which is off by some 5e-4 for near-duplicates.
    """
    own = rows == np.arange(start, start + len(rows))[:, None]
    own[~own.any(axis=1), -1] = True
    rows = rows[~own].reshape(len(rows), -1)
    distances = np.empty(rows.shape)
    for place in range(rows.shape[1]):
        difference = units[start : start + len(rows)] - units[rows[:, place]]
        distances[:, place] = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    order = np.argsort(distances, axis=1, kind="stable")
    return Neighbourhood(
        distances=np.take_along_axis(distances, order, axis=1), rows=np.take_along_axis(rows, order, axis=1)
    )


def _inverted_file(faiss: Any, units: np.ndarray, probes: int, seed: int) -> Any:
    """The rows in about 4 sqrt(n) cells around k-means centers, as faiss advises; fewer where rows are few."""
    cells = max(1, min(round(4 * len(units) ** 0.5), len(units) // _TRAINED))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(units.shape[1]), units.shape[1], cells)
    index.cp.seed = seed % 2**31
    index.nprobe = min(probes, cells)
    index.train(units)
    index.add(units)
    return index


def _faiss() -> ModuleType:
    """faiss, loaded when it is needed. It and torch bring an OpenMP each: on macOS two pools of threads can crash."""
    import faiss

    if sys.platform == "darwin":
        faiss.omp_set_num_threads(1)
    return faiss
