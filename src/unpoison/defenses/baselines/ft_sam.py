"""FT-SAM: fine-tuning that looks for flat minima, with larger steps away for larger weights.

Paper
    Zhu, Wei, Shen, Fan, Wu. "Enhancing Fine-Tuning based Backdoor Defense with Sharpness-Aware Minimization." ICCV
    2023, arXiv 2304.11823.
Idea
    Neurons of a backdoor have large weights, and plain fine-tuning hardly moves them. Demand a low loss on clean
    samples even after the worst change of the weights, where a weight may change in proportion to its size.
Needs
    The suspicious model and clean labelled samples: here the clean part of a split of its training set.
Protects
    The classifier's weights.
Steps
    1. g = gradient of the loss at w; eps = rho T_w^2 g / ||T_w g|| with T_w = diag(|w|).
    2. SGD with the gradient of the loss at w + eps.
Where we differ, and what the paper leaves open
    rho = 2 is ours. BatchNorm's statistics follow the first pass only. Steps and
    rate are ours, as in :mod:`unpoison.defenses.baselines.ft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.data.pixels import Pixels
from unpoison.defenses.repair import (
    AllWeightsConfig,
    CleanData,
    Repair,
    at_largest_rate,
    falling_rate,
    sgd,
    train_looks,
)
from unpoison.errors import ConfigError
from unpoison.models.batch_norm import frozen_statistics
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.types import Classifier


@dataclass(frozen=True, kw_only=True)
class FTSAMConfig(AllWeightsConfig):
    """FT-SAM's constants."""

    rho: float = 2.0
    """Radius of the worst change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise ConfigError(f"rho must be positive, got {self.rho}.", hint="Try 2.")


def repair_with_ft_sam(
    classifier: Classifier, pixels: Pixels, split: Split, config: FTSAMConfig, *, run: Run
) -> Repair:
    """Both steps on copies of ``classifier``. Raises NotEnoughDataError, DivergedError."""
    return at_largest_rate(config, lambda config: sharpness_aware(classifier, pixels, split, config, run))


def sharpness_aware(classifier: Classifier, pixels: Pixels, split: Split, config: FTSAMConfig, run: Run) -> Repair:
    """Both steps at one rate."""
    repaired = classifier.copy()
    data = CleanData.open(pixels, split, config.held_out, run)
    optimiser = sgd(repaired, config)
    weights = [weight for weight in repaired.module.parameters() if weight.requires_grad]

    def one_step(step: int, generator: torch.Generator) -> Tensor:
        images, labels = data.batch(config.batch_size, generator, run)
        falling_rate(optimiser, step, config)
        loss = F.cross_entropy(repaired.logits(images).float(), labels)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        changes = worst_change(weights, gradients, config.rho)  # (1)
        before = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, change in zip(weights, changes, strict=True):
                weight.add_(change)
        optimiser.zero_grad()
        with frozen_statistics(repaired.module):
            F.cross_entropy(repaired.logits(images).float(), labels).backward()
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        optimiser.step()  # (2)
        return loss

    return train_looks(repaired, optimiser, one_step, data, config, name="ft-sam", run=run)


def worst_change(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rho: float) -> list[Tensor]:
    """rho w^2 g / || |w| g || over all weights together; zero where a weight has no gradient."""
    known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    scaled = [w.detach().abs() * g for w, g in zip(weights, known, strict=True)]
    norm = torch.stack([value.square().sum() for value in scaled]).sum().sqrt().clamp_min(1e-12)
    return [rho * w.detach().abs() * value / norm for w, value in zip(weights, scaled, strict=True)]
