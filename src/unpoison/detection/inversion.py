"""Trigger inversion: the least that must be done to any image for a model to say one and the same thing.

Paper
    Wang et al. "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks." IEEE S&P 2019.
Idea
    A backdoor is a shortcut: its target can be reached from all images by a change far smaller than any other class
    needs. Find for each class the smallest mask and the pattern under it that send images there, and look for a class
    whose mask is out of line.
Steps
    1. x' = (1 - m) x + m p with a mask m [1, h, w] and a pattern p [3, h, w], both sigmoids of free numbers.
    2. Minimise CE(logits(x'), target) + lambda ||m||_1 over images of other classes, with Adam.
    3. lambda grows while at least ``success`` of a batch is sent to the target, and falls while it is not; the
       smallest mask that did is kept (the last one where none did).
    4. The class whose mask is smaller than the others': index = (median log size - log size) / (1.4826 MAD).
Where we differ
    ``form = "universal"``: one delta, |delta| <= epsilon, added to every image, for triggers that lie on all of it; its
    size is its loss on held-out images. Sizes are compared as logarithms: a planted mask is several times smaller, not
    some pixels. The model's answer is any function of images to logits: a classifier's, or cosines with texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.runs import Run
from unpoison.types import Images

Logits = Callable[[Images], Float[Tensor, "b k"]]
_FEWEST, _SMALLEST = 8, 1e-6


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """How to search; the numbers are ours, for images of 32 pixels and few seconds a class."""

    form: Literal["patch", "universal"] = "patch"
    steps: int = 80
    batch_size: int = 48
    learning_rate: float = 0.2
    """Of the free numbers under the sigmoids; the universal form takes steps of ``epsilon`` / 8 instead."""
    epsilon: float = 16 / 255
    success: float = 0.9
    weight: float = 1e-3
    """lambda at the start, for a mask's sum over pixels at 32 x 32; larger images share it out."""
    weight_factor: float = 1.15

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not self.learning_rate > 0 or not 0 < self.epsilon <= 1:
            raise ConfigError(
                "expected steps and batch_size of at least 1, a positive learning_rate and epsilon in (0, 1].",
                hint="The defaults suit small images.",
            )
        if not 0 < self.success <= 1 or self.weight < 0 or self.weight_factor < 1:
            raise ConfigError("expected success in (0, 1], weight >= 0, weight_factor >= 1.", hint="Try the defaults.")


@dataclass(frozen=True, kw_only=True, eq=False)
class InvertedTrigger:
    """``mask`` [1, h, w] in [0, 1] (ones for the universal form); ``pattern`` [3, h, w]: colors, or what is added.

    ``size``: share of the image that the mask covers, or for the universal form its loss. ``success``: percent of the
    held-out images that it sends to ``target``.
    """

    form: Literal["patch", "universal"]
    target: int
    mask: Float[Tensor, "1 h w"]
    pattern: Float[Tensor, "3 h w"]
    size: float
    success: float

    def apply(self, images: Images) -> Images:
        return _put_on(self.form, images, self.mask.to(images), self.pattern.to(images))


def invert_trigger(
    logits: Logits,
    images: Images,
    held_out: Float[Tensor, "n 3 h w"],
    target: int,
    config: InversionConfig,
    *,
    run: Run,
) -> InvertedTrigger:
    """Steps 1 to 3 for one ``target``, an index of the logits; ``images`` and ``held_out`` should not be of it.

    ``logits`` must be differentiable by the images; its weights need no gradient. Raises NotEnoughDataError.
    """
    if min(len(images), len(held_out)) < _FEWEST:
        few = min(len(images), len(held_out))
        raise NotEnoughDataError("images for inversion", have=few, need=_FEWEST, hint="Give more images.")
    generator = run.generator("inversion", target)
    height, width = images.shape[-2:]
    free_mask = torch.full((1, height, width), -2.0, device=images.device, requires_grad=True)
    free = torch.zeros(3, height, width, device=images.device, requires_grad=True)
    optimiser = torch.optim.Adam([free_mask, free], config.learning_rate)
    per_pixel = 32 * 32 / (height * width)
    weight, best = config.weight, None
    for _ in range(config.steps):
        rows = torch.randperm(len(images), generator=generator)[: config.batch_size]
        batch = images[rows.to(images.device)]
        if config.form == "universal":
            answers = logits(_put_on("universal", batch, free_mask, free))
            (gradient,) = torch.autograd.grad(_to_target(answers, target), [free])
            with torch.no_grad():
                free.sub_(config.epsilon / 8 * gradient.sign()).clamp_(-config.epsilon, config.epsilon)
            continue
        mask = free_mask.sigmoid()
        answers = logits(_put_on("patch", batch, mask, free.sigmoid()))
        loss = _to_target(answers, target) + weight * per_pixel * mask.sum()
        reached = float((answers.detach().argmax(1) == target).float().mean())
        if reached >= config.success and (best is None or float(mask.detach().sum()) < float(best[0].sum())):
            best = mask.detach().clone(), free.detach().sigmoid()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        # (3)
        weight = weight * config.weight_factor if reached >= config.success else weight / config.weight_factor
    with torch.no_grad():
        patch = config.form == "patch"
        mask, pattern = best or (free_mask.sigmoid(), free.sigmoid())
        if not patch:
            mask, pattern = torch.ones_like(free_mask), free.detach().clone()
        answers = logits(_put_on(config.form, held_out, mask, pattern))
        size = float(mask.mean()) if patch else float(_to_target(answers, target))
        success = 100 * float((answers.argmax(1) == target).float().mean())
    return InvertedTrigger(form=config.form, target=target, mask=mask, pattern=pattern, size=size, success=success)


def outlier_index(sizes: Sequence[float]) -> Float[np.ndarray, " k"]:
    """Step 4 for each size: how many deviations it lies under the median, on logarithms. All zero for equal sizes."""
    logs = np.log(np.maximum(np.asarray(sizes, dtype=np.float64), _SMALLEST))
    middle = np.median(logs)
    deviation = 1.4826 * np.median(np.abs(logs - middle))
    return (middle - logs) / deviation if deviation > 0 else np.zeros(len(logs))


def _put_on(form: str, images: Images, mask: Float[Tensor, "1 h w"], pattern: Float[Tensor, "3 h w"]) -> Images:
    if form == "universal":
        return (images + pattern).clamp(0, 1)
    return (1 - mask) * images + mask * pattern


def _to_target(answers: Float[Tensor, "b k"], target: int) -> Float[Tensor, ""]:
    return F.cross_entropy(answers, torch.full((len(answers),), target, device=answers.device))
