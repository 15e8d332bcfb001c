"""Spectral signatures: poison stands out along the direction in which a label's features vary most.

Paper
    Tran, Li, Madry. "Spectral Signatures in Backdoor Attacks." NeurIPS 2018, arXiv 1811.00636.
Idea
    Two groups with different means under one label make their difference the top singular direction.
Needs
    A model trained on the set, and the set.
Steps
    1. Per label: features before the head minus their mean.
    2. Score: projection on the top right singular vector (the paper squares it).
    3. The paper removes the 1.5 epsilon n highest of each label, epsilon being the poison's share that it assumes.
Where we differ, and what the paper leaves open
    We rank and remove nothing: epsilon is not known. The projection is not squared but signed, positive toward the
    longer tail of the label: the fewer samples are the poison, and they lie on one side. Scores of all labels share one
    unit, the features' own, so that a label that is spread by poison comes first.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

AXIS = "spectral_signature"


def spectral_signatures(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Signed distance from the label's mean along its top direction, higher = more suspicious; 0 without any spread."""
    scores = np.zeros(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        centered = features[rows].astype(np.float64)
        centered -= centered.mean(axis=0)  # (1)
        _, vectors = np.linalg.eigh(centered.T @ centered)  # the top right singular vector comes last
        projected = centered @ vectors[:, -1]  # (2)
        scores[rows] = projected if (projected**3).sum() >= 0 else -projected
    return scores
