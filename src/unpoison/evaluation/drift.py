"""How far a model's embeddings have moved from a suspect's: mean cosine, as they are and after the best rotation."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Old = Float[np.ndarray, "n d"]
New = Float[np.ndarray, "n d"]


def mean_cosine(old: Old, new: New) -> float:
    """Mean over rows of cos(old_i, new_i)."""
    return float((_unit(old) * _unit(new)).sum(axis=1).mean())


def best_rotation(old: Old, new: New) -> Float[np.ndarray, "d d"]:
    """The orthogonal R with the least ||new R - old||: U V^T of the singular value decomposition of new^T old.

    Source: Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966. Reflections
    are allowed. For unit rows the same R has the highest mean cosine.
    """
    left, _, right = np.linalg.svd(_unit(new).T @ _unit(old))
    return left @ right


def aligned_cosine(old: Old, new: New) -> float:
    """Mean cosine after :func:`best_rotation` of ``new``, fitted on the same rows."""
    return mean_cosine(old, _unit(new) @ best_rotation(old, new))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
