"""Spectral signatures: poison stands out along the direction in which a label's features vary most.

Paper
    Tran, Li, Madry. "Spectral Signatures in Backdoor Attacks." NeurIPS 2018, arXiv 1811.00636.
Idea
    Two groups with different means under one label make their difference the top singular direction.
Needs
    A model trained on the set, and the set.
Steps
    1. Per label: features before the head minus their mean.
    2. Score: squared projection on the top right singular vector.
    3. The paper removes the 1.5 epsilon n highest of each label, epsilon being the poison's share that it assumes.
Where we differ, and what the paper leaves open
    We rank and remove nothing: epsilon is not known. Scores are divided by the label's mean score, so that they compare
    across labels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

AXIS = "spectral_signature"


def spectral_signatures(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Scores >= 0 with mean 1 in each label, higher = more suspicious; 0 where all features of a label are one."""
    scores = np.zeros(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        centered = features[rows].astype(np.float64)
        centered -= centered.mean(axis=0)  # (1)
        _, vectors = np.linalg.eigh(centered.T @ centered)  # the top right singular vector comes last
        projected = (centered @ vectors[:, -1]) ** 2  # (2)
        if projected.mean() > 0:
            scores[rows] = projected / projected.mean()
    return scores
