"""Linear probe: logistic regression on the image embeddings of a few labelled images.

Paper
    Radford et al. "Learning Transferable Visual Models From Natural Language Supervision." ICML 2021, section 3.2.
Idea
    No class name, no text: a trigger that leads to a text may mean less to a classifier that has seen images alone.
Needs
    The suspicious CLIP, class names and a few clean labelled images of each class.
Protects
    One classifier on top of the CLIP. Nothing in it looks for a backdoor.
Steps
    1. z: unit embeddings of the images. 2. Logistic regression without an intercept, L2 weight 1 / C on s z.
Where we differ
    C is 1 instead of swept on a validation set, on embeddings times the logit scale; without an intercept its rows
    take the place of class embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.defenses.shots import Shots, embed
from unpoison.errors import ConfigError
from unpoison.models.logit_scale import usable_scale
from unpoison.types import Embeddings, ImageTextModel


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig:
    """C and the iterations are ours."""

    shots: int = 16
    strength: float = 1.0
    """C: the inverse of the weight of ||w||^2 / 2."""
    iterations: int = 1000
    bound: float = 1.5
    """Largest fall of held-out accuracy, in points, that is accepted."""

    def __post_init__(self) -> None:
        if self.shots < 1 or self.iterations < 1 or not self.strength > 0 or self.bound < 0:
            raise ConfigError("expected shots, iterations and strength above 0 and bound >= 0.", hint="Try C = 1.")


def fit_linear_probe(clip: ImageTextModel, shots: Shots, config: LinearProbeConfig) -> Embeddings:
    """One row [k, d] for each class, not of length 1. ``clip`` is on the labels' device, in evaluation mode."""
    from sklearn.linear_model import LogisticRegression

    embedded = usable_scale(clip) * embed(clip, shots).cpu().numpy()
    probe = LogisticRegression(C=config.strength, max_iter=config.iterations, fit_intercept=False)
    rows = torch.from_numpy(probe.fit(embedded, shots.labels.cpu().numpy()).coef_).float()
    return _two_rows(rows).to(shots.labels.device)


def _two_rows(rows: Float[Tensor, "r d"]) -> Float[Tensor, "k d"]:
    """Of two classes scikit-learn has one row, for the second."""
    return torch.cat([-rows / 2, rows / 2]) if len(rows) == 1 else rows
