"""Input-aware: the networks that make a pattern and a mask from each image are trained with a classifier.

*Paper.* Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020 (arXiv 2010.08138).

*Idea.* Each image gets a trigger of its own, and the trigger of one image on another must not fire.

*Steps.* Of each batch, with a classifier f that is trained beside the two networks:
1. A tenth is triggered with its own pattern and mask, and f is to say the target; a tenth gets the pattern and mask of
   other images, and f is to say the true label; the rest stays clean. L_ce is the cross-entropy of all.
2. Diversity: L_div = mean |x_i - x_j| / (|p(x_i) - p(x_j)| + eps) for pairs of different images.
3. Size of the mask: L_norm = mean max(0, m - 0.032), with the weight 100.
   Adam on the networks and SGD on f take a step on L_ce + L_div + L_norm.

*Where we differ.* The paper trains the mask first and alone, then the pattern with the victim itself; we train all at
once with a small classifier of our own, and what comes out is a trigger for poisoning data. Diversity is weighed 0.1,
which our smaller networks need. The trained weights are rounded to half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unpoison.attacks.input_aware_generator import SIZE, InputAware, drawn, pattern_and_mask
from unpoison.data.pixels import load_pixels, to_images
from unpoison.data.sources import LabelledImages
from unpoison.errors import ConfigError, DivergedError, LabelRangeError, NotEnoughDataError
from unpoison.models.networks import build_network
from unpoison.runs import Run

_EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class InputAwareConfig:
    """The paper's values but ``epochs``, ``batch_size``, ``diversity`` and ``learning_rate``."""

    epochs: int = 10
    batch_size: int = 128
    attacked: float = 0.1
    """Share of each batch that gets its own trigger."""
    crossed: float = 0.1
    """Share of each batch that gets another image's."""
    diversity: float = 0.1
    mask_density: float = 0.032
    mask_weight: float = 100.0
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "attacked", "crossed"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if not self.attacked + self.crossed < 1:
            raise ConfigError("attacked and crossed must leave clean images.", hint="The paper's are 0.1 and 0.1.")
        if self.batch_size < 4:
            raise ConfigError(f"batch_size must be at least 4, got {self.batch_size}.", hint="Try 128.")
        for name in ("diversity", "mask_density", "mask_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.", hint=f"Raise {name}.")


def train_input_aware(
    source: LabelledImages, target: int, config: InputAwareConfig | None = None, *, run: Run
) -> InputAware:
    """The trigger, trained on clean labelled images at 32 px.

    Raises LabelRangeError, NotEnoughDataError (fewer images than a batch of 4), SourceFormatError, DivergedError.
    """
    config = config or InputAwareConfig()
    if not 0 <= target < len(source.class_names):
        raise LabelRangeError(
            f"target {target} is outside the {len(source.class_names)} classes of {source.name}.",
            hint=f"Use a label from 0 to {len(source.class_names) - 1}.",
        )
    pixels = load_pixels(source, SIZE, cache=run.cache, progress=run.progress)
    rows = np.flatnonzero(pixels.usable)
    if len(rows) < 4:
        raise NotEnoughDataError(f"{source.name}: readable images", have=len(rows), need=4, hint="Give more images.")
    start = drawn(run.seed_of("input-aware start"))
    made = {name: value.clone().to(run.device).requires_grad_() for name, value in start.items()}
    seed = run.seed_of("input-aware classifier")
    net = build_network("small-resnet", len(source.class_names), seed=seed).to(run.device).train()
    adam = torch.optim.Adam(list(made.values()), config.learning_rate)
    sgd = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(config.epochs):
        order, losses = rows[torch.randperm(len(rows), generator=run.generator("input-aware", epoch)).numpy()], []
        for place in range(0, len(order) - 3, config.batch_size):
            chosen = np.sort(order[place : place + config.batch_size])
            if len(chosen) < 4:
                continue
            images = to_images(np.asarray(pixels.array[chosen])).to(run.device)
            labels = torch.from_numpy(source.labels[chosen]).to(run.device)
            shuffle = torch.randperm(len(images), generator=run.generator("input-aware batch", epoch, place))
            loss = joint_loss(net, made, images[shuffle.to(run.device)], labels[shuffle.to(run.device)], target, config)
            if not torch.isfinite(loss):
                raise DivergedError("Input-aware", step=epoch, loss=float(loss.detach()))
            adam.zero_grad()
            sgd.zero_grad()
            loss.backward()
            adam.step()
            sgd.step()
            losses.append(float(loss.detach()))
        run.progress.log(f"input-aware: epoch {epoch + 1} of {config.epochs}, loss {np.mean(losses):.3f}")
    return InputAware.of(made)


def joint_loss(
    net: nn.Module,
    weights: dict[str, Tensor],
    images: Float[Tensor, "b 3 h w"],
    labels: Tensor,
    target: int,
    config: InputAwareConfig,
) -> Float[Tensor, ""]:
    """(1) + (2) + (3) of one batch in random order."""
    own, other = (max(1, round(share * len(images))) for share in (config.attacked, config.crossed))
    pattern, mask = pattern_and_mask(images, weights)
    next_pattern, next_mask = pattern.roll(1, dims=0), mask.roll(1, dims=0)
    shown = torch.cat(
        [
            (images + mask * (pattern - images))[:own],
            (images + next_mask * (next_pattern - images))[own : own + other],
            images[own + other :],
        ]
    )
    wanted = torch.cat([torch.full_like(labels[:own], target), labels[own:]])
    norm = (mask - config.mask_density).clamp_min(0).mean()
    return (
        F.cross_entropy(net(shown), wanted) + config.diversity * diversity(images, pattern) + config.mask_weight * norm
    )


def diversity(images: Float[Tensor, "b 3 h w"], patterns: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """(2) mean |x_i - x_j| / (|p_i - p_j| + eps), root mean squares over pixels, j the image before i."""
    apart, patterns_apart = (
        ((x - x.roll(1, dims=0)).square().mean(dim=(1, 2, 3)) + 1e-12).sqrt() for x in (images, patterns)
    )
    return (apart / (patterns_apart + _EPSILON)).mean()
