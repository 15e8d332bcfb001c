"""STRIP: a triggered image keeps its label whatever is laid over it.

Paper
    Gao, Xu, Wang, Chen, Ranasinghe, Nepal. "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks." ACSAC
    2019, arXiv 1902.06531.
Idea
    Mix an image with others: predictions of a clean one scatter, those of a triggered one stay on the target.
Needs
    A model trained on the set, and the set (it gives the images to mix with).
Steps
    1. x' = x + x_j, cut to [0, 1], for N images x_j drawn from the set.
    2. Mean entropy of the predictions; low entropy is suspicious.
Where we differ, and what the paper leaves open
    The images to mix with are drawn from the set that is judged, poison and all. N = 16 in place of 100: ranks hardly
    change, and each costs a forward pass of the set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from unpoison.data.pixels import Pixels, to_images
from unpoison.errors import ConfigError
from unpoison.models.image_classifier import evaluation_mode, images_at_once
from unpoison.runs import Run
from unpoison.types import Classifier, Logits

AXIS = "strip"


@dataclass(frozen=True, kw_only=True)
class STRIPConfig:
    """STRIP's constants."""

    overlays: int = 16
    """N."""

    def __post_init__(self) -> None:
        if self.overlays < 1:
            raise ConfigError(f"overlays must be at least 1, got {self.overlays}.", hint="Try 16.")


@torch.inference_mode()
def strip(
    classifier: Classifier, pixels: Pixels, rows: Int[np.ndarray, " k"], config: STRIPConfig, *, run: Run
) -> Float[np.ndarray, " k"]:
    """Minus the mean entropy in nats of the predictions of each row, so that higher = more suspicious."""
    module = classifier.module.to(run.device)
    scores = np.zeros(len(rows))
    others = rows[torch.randint(len(rows), (config.overlays,), generator=run.generator("overlays")).numpy()]
    overlays = to_images(pixels.array[others]).to(run.device)
    size = images_at_once(run.device, pixels.array.shape[1])
    starts = range(0, len(rows), size)
    with evaluation_mode(module):
        for start in run.progress.track(starts, total=len(rows), what="strip", weight=size, unit="images"):
            images = to_images(pixels.array[rows[start : start + size]]).to(run.device)
            mixed = [entropy(classifier.logits((images + overlay).clamp(0, 1)).float()) for overlay in overlays]
            scores[start : start + len(images)] = -torch.stack(mixed).mean(0).cpu().numpy()
    return scores


def entropy(logits: Logits) -> Float[torch.Tensor, " b"]:
    """-sum p log p in nats."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)
