"""IBD-PSC: a trigger's prediction survives when the network's own weights are scaled up.

Paper
    Hou, Feng, Hua, Luo, Zhang, Li. "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling
    Consistency." ICML 2024, arXiv 2405.09786.
Idea
    Scale BatchNorm's weights and biases of the last layers. Clean predictions fall apart; those that rest on a trigger
    stay, and stay sure of themselves.
Needs
    A model with BatchNorm that was trained on the set, and the set.
Steps
    1. k: the smallest number of last BatchNorm layers that have to be scaled by omega for the error on clean samples to
       pass ``least_error``.
    2. Networks with the last k, k + 1, ..., k + n - 1 layers scaled.
    3. PSC(x): mean probability over them of the label that the unscaled network gives x.
Where we differ, and what the paper leaves open
    The clean samples of step 1 are drawn from the set itself, which is mostly clean: the error of most of it is all
    that step 1 needs. Where fewer layers than k + n - 1 exist, there are fewer networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from unpoison.data.pixels import Pixels, to_images
from unpoison.errors import ConfigError, UnsupportedModelError
from unpoison.models.batch_norm import batch_norms
from unpoison.models.image_classifier import evaluation_mode, images_at_once
from unpoison.runs import Run
from unpoison.types import Classifier, Labels

AXIS = "ibd_psc"


@dataclass(frozen=True, kw_only=True)
class IBDPSCConfig:
    """IBD-PSC's constants as published. ``threshold`` is on PSC: at or above it a sample is suspect."""

    omega: float = 1.5
    networks: int = 5
    """n."""
    least_error: float = 0.6
    threshold: float = 0.9
    samples: int = 1000
    """For step 1."""

    def __post_init__(self) -> None:
        if self.omega <= 1 or self.networks < 1 or not 0 < self.least_error < 1 or self.samples < 1:
            raise ConfigError(
                "expected omega > 1, networks >= 1, least_error in (0, 1), samples >= 1.", hint="Try the defaults."
            )


@torch.inference_mode()
def ibd_psc(
    classifier: Classifier, pixels: Pixels, rows: Int[np.ndarray, " k"], config: IBDPSCConfig, *, run: Run
) -> Float[np.ndarray, " k"]:
    """PSC of each row in [0, 1], higher = more suspicious. Raises UnsupportedModelError without BatchNorm."""
    layers = len(batch_norms(classifier.module))
    if layers == 0:
        raise UnsupportedModelError(
            f"{type(classifier.module).__name__} has no BatchNorm layer to scale.", hint="Use another detector."
        )
    classifier.module.to(run.device)
    first = first_level(classifier, pixels, rows, layers, config, run)  # (1)
    scaled = [
        scale_last(classifier, count, config.omega)
        for count in range(first, min(layers, first + config.networks - 1) + 1)
    ]  # (2)
    scores = np.zeros(len(rows))
    size = images_at_once(run.device, pixels.array.shape[1])
    starts = range(0, len(rows), size)
    with evaluation_mode(classifier.module):
        for start in run.progress.track(starts, total=len(rows), what="ibd-psc", weight=size, unit="images"):
            images = to_images(pixels.array[rows[start : start + size]]).to(run.device)
            said = classifier.logits(images).argmax(1)
            scores[start : start + len(images)] = consistency(scaled, images, said).cpu().numpy()  # (3)
    return scores


def first_level(
    classifier: Classifier, pixels: Pixels, rows: np.ndarray, layers: int, config: IBDPSCConfig, run: Run
) -> int:
    """Step 1: k in 1..layers, measured against the unscaled network's own predictions."""
    chosen = torch.randperm(len(rows), generator=run.generator("ibd-psc"))[: config.samples].numpy()
    images = to_images(pixels.array[rows[np.sort(chosen)]]).to(run.device)
    parts = images.split(images_at_once(run.device, pixels.array.shape[1]))
    with evaluation_mode(classifier.module):
        said = torch.cat([classifier.logits(part).argmax(1) for part in parts])
    for count in range(1, layers + 1):
        scaled = scale_last(classifier, count, config.omega)
        now = torch.cat([scaled.logits(part).argmax(1) for part in parts])
        if float((now != said).float().mean()) > config.least_error:
            return count
    return layers


def scale_last(classifier: Classifier, count: int, omega: float) -> Classifier:
    """A copy, in evaluation mode, whose last ``count`` BatchNorm layers have omega times their weight and bias."""
    scaled = classifier.copy()
    scaled.module.eval()
    with torch.no_grad():
        for _, layer in batch_norms(scaled.module)[-count:]:
            layer.weight.mul_(omega)
            layer.bias.mul_(omega)
    return scaled


def consistency(scaled: Sequence[Classifier], images: torch.Tensor, said: Labels) -> Float[torch.Tensor, " b"]:
    """Step 3."""
    kept = [one.logits(images).float().softmax(1).gather(1, said[:, None])[:, 0] for one in scaled]
    return torch.stack(kept).mean(0)
