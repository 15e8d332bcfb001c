"""Activation clustering: poison and clean samples of one label form two clusters in feature space.

Paper
    Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava. "Detecting Backdoor Attacks on Deep Neural
    Networks by Activation Clustering." SafeAI 2019, arXiv 1811.03728.
Idea
    A poisoned sample has its label because of the trigger, a clean one because of its object: their activations before
    the head differ though their label is the same.
Needs
    A model trained on the set, and the set.
Steps
    1. Per label: features before the head, reduced to 10 dimensions by independent component analysis.
    2. k-means with two clusters.
    3. A label is suspicious where the clusters are far apart (silhouette) and one is small.
Where we differ, and what the paper leaves open
    Principal components in place of independent ones: the same subspace up to a linear map, and it always converges.
    The paper decides per cluster. Our score of a sample is graded, so that samples of all labels compare: how much
    nearer it is to the small cluster's center, in [-1, 1], times the label's silhouette, times how far the small
    cluster is from one half. The silhouette of a large label is that of at most 1,000 samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from unpoison.errors import ConfigError

AXIS = "activation_clustering"
_SILHOUETTE_SAMPLES = 1000
_NARROW = 1024  # features up to which their covariance is the quicker way


@dataclass(frozen=True, kw_only=True)
class ActivationClusteringConfig:
    """The paper's constants: 10 components; smaller clusters than 35 percent are suspicious."""

    components: int = 10
    small: float = 0.35
    """Share of a label under which its smaller cluster is suspicious."""
    silhouette: float = 0.15
    """Least silhouette at which two clusters count as two."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.components < 1 or not 0 < self.small <= 0.5:
            raise ConfigError("expected components >= 1 and small in (0, 0.5].", hint="Try 10 and 0.35.")


@dataclass(frozen=True, kw_only=True)
class LabelClusters:
    """What step 3 looks at: the silhouette in [-1, 1] and the smaller cluster's share of the label."""

    label: int
    silhouette: float
    share: float
    suspicious: bool


def activation_clustering(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], config: ActivationClusteringConfig
) -> tuple[Float[np.ndarray, " n"], list[LabelClusters]]:
    """Scores in [-1, 1], higher = more suspicious, and the verdict on each label. Labels of under 4 samples score 0."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score

    scores, verdicts = np.zeros(len(labels)), []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 4 or np.ptp(features[rows], axis=0).max() == 0:
            continue
        count = min(config.components, features.shape[1], len(rows))
        solver = "covariance_eigh" if features.shape[1] <= _NARROW else "auto"
        components = PCA(count, svd_solver=solver, random_state=config.seed)
        reduced = components.fit_transform(features[rows].astype(np.float64))  # (1)
        options: dict[str, Any] = {"n_init": 4, "random_state": config.seed}
        means = KMeans(2, **options).fit(reduced)  # (2)
        parts = np.asarray(means.predict(reduced))
        sizes = np.bincount(parts, minlength=2)
        if sizes.min() == 0:
            continue
        minor = int(sizes.argmin())
        share = float(sizes[minor] / len(rows))
        drawn = silhouette_rows(parts, config.seed)
        apart = float(silhouette_score(reduced[drawn], parts[drawn])) if sizes.min() > 1 else 0.0
        distances = means.transform(reduced)
        nearer = (distances[:, 1 - minor] - distances[:, minor]) / distances.sum(axis=1).clip(1e-12)
        scores[rows] = nearer * max(apart, 0.0) * (1 - 2 * share)
        suspicious = apart >= config.silhouette and share < config.small  # (3)
        verdicts.append(LabelClusters(label=int(label), silhouette=apart, share=share, suspicious=suspicious))
    return scores, verdicts


def silhouette_rows(parts: Int[np.ndarray, " k"], seed: int) -> Int[np.ndarray, " m"]:
    """The rows, at most 1,000 drawn evenly, that the silhouette of two clusters is measured on.

    A draw that misses the smaller cluster is made again with half of it from each, or all that there is of the smaller.
    """
    order = np.random.RandomState(seed).permutation(len(parts))  # the draw of scikit-learn's sample_size
    drawn = order[:_SILHOUETTE_SAMPLES]
    if len(np.unique(parts[drawn])) > 1:
        return drawn
    minor = int(np.bincount(parts, minlength=2).argmin())
    few = order[parts[order] == minor][: _SILHOUETTE_SAMPLES // 2]
    return np.concatenate([few, order[parts[order] != minor][: _SILHOUETTE_SAMPLES - len(few)]])
