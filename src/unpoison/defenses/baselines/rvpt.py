"""RVPT: learn prompts inside a frozen ViT that keep classes apart while its features are pushed from where they were.

Paper
    Zhang et al. "Defending Multimodal Backdoored Models by Repulsive Visual Prompt Tuning." NeurIPS 2025, arXiv
    2412.20392.
Idea
    A backdoor needs features that the classes do not: learn deep visual prompts for the classes alone, and repel the
    class tokens of each prompted block from the ones without prompts, so that only what the classes need is left.
Needs
    The suspicious CLIP with a ViT, class names and a few clean labelled images of each class.
Protects
    One zero-shot classifier: the CLIP with these prompts and these class names.
Steps
    1. Prompts P_b [n, w] for the blocks b = 3..L - 1 (from 0), drawn from N(0, 0.02); both towers stay frozen.
    2. L = CE(s z(x; P) h, y) + alpha mean_b cos(c_b(x; P), c_b(x)): h the class embeddings over templates, c_b the
       class token behind block b, with and without the prompts; alpha = 2.
    3. SGD 0.002 with momentum 0.9 and a cosine, batches of 32, 50 epochs of 16 shots; crops and mirror images.
Where we differ, and what the paper leaves open
    Blocks from a quarter of the tower on, where 3 is of twelve: with six blocks, from the second. The number of prompts
    stays 50. ``learning_rate`` and ``epochs`` are the paper's; a small CLIP's logit scale is held between 1 and 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.data.transforms import random_crop, random_flip
from unpoison.defenses.shots import Shots
from unpoison.errors import ConfigError, DivergedError
from unpoison.models.clip_transformers import half_where_fast
from unpoison.models.logit_scale import usable_scale
from unpoison.models.visual_prompts import class_tokens, width_of, with_visual_prompts
from unpoison.runs import Run
from unpoison.schedules import cosine, set_rate
from unpoison.types import ImageTextModel

_PUBLISHED_BLOCKS = 12


@dataclass(frozen=True, kw_only=True)
class RVPTConfig:
    """The paper's values."""

    shots: int = 16
    prompts: int = 50
    """n: tokens in each prompted block."""
    first_block: int = 3
    """Of twelve blocks, the first with prompts; other depths in proportion."""
    repulsion: float = 2.0
    """alpha."""
    deviation: float = 0.02
    """Of the normal distribution that prompts are drawn from."""
    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 0.002
    momentum: float = 0.9
    crop: int = 4
    """Padding of the random crops at 32 pixels; larger images in proportion."""
    bound: float = 1.5
    """Largest fall of held-out accuracy, in points, that is accepted."""

    def __post_init__(self) -> None:
        for name in ("shots", "prompts", "epochs", "batch_size", "learning_rate", "deviation"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if not 0 <= self.first_block < _PUBLISHED_BLOCKS or not 0 <= self.momentum < 1:
            raise ConfigError("expected first_block in 0..11 and momentum in [0, 1).", hint="Try the defaults.")
        if min(self.repulsion, self.crop, self.bound) < 0:
            raise ConfigError("repulsion, crop and bound cannot be negative.", hint="Use 0 for none.")


def learn_visual_prompts(
    clip: ImageTextModel, shots: Shots, classes: Float[Tensor, "k d"], config: RVPTConfig, *, run: Run
) -> Float[Tensor, "l n w"]:
    """Steps 1 to 3: the prompts, for :func:`unpoison.models.visual_prompts.with_visual_prompts`.

    ``clip`` is on the run's device, in evaluation mode. Raises UnsupportedModelError for an image tower that is no ViT,
    DivergedError.
    """
    generator = run.generator("visual prompts")
    depth = len(clip.image_blocks())
    count = max(1, depth - round(config.first_block * depth / _PUBLISHED_BLOCKS))
    drawn = config.deviation * torch.randn(count, config.prompts, width_of(clip), generator=generator)
    prompted, prompts = with_visual_prompts(clip, drawn)  # (1)
    prompted.module.eval().requires_grad_(False)
    prompts.tokens.requires_grad_(True)
    optimiser = torch.optim.SGD([prompts.tokens], config.learning_rate, momentum=config.momentum)
    batches = -(-len(shots.labels) // config.batch_size)
    total, scale = config.epochs * batches, usable_scale(clip)
    order = torch.arange(len(shots.labels))
    for step in run.progress.track(range(total), total=total, what="learning visual prompts", unit="steps"):
        if step % batches == 0:
            order = torch.randperm(len(shots.labels), generator=generator)
        rows = order[step % batches * config.batch_size :][: config.batch_size].to(shots.labels.device)
        images = shots.images(rows)
        padding = round(config.crop * images.shape[-1] / 32)
        images = random_flip(random_crop(images, padding, generator), generator)
        with torch.no_grad(), class_tokens(clip, count) as before:
            clip.encode_images(images)
        with class_tokens(prompted, count) as after, half_where_fast(run.device):
            embedded = prompted.encode_images(images)
        logits = scale * embedded.float() @ classes.T
        loss = F.cross_entropy(logits, shots.labels[rows]) + config.repulsion * mean_cosine(after, before)  # (2)
        if not bool(loss.isfinite()):
            raise DivergedError("rvpt", step=step, loss=float(loss.detach()))
        set_rate(optimiser, cosine(step / total, begin=config.learning_rate))  # (3)
        optimiser.zero_grad()
        loss.backward(inputs=[prompts.tokens])
        optimiser.step()
    return prompts.tokens.detach()


def mean_cosine(after: Sequence[Float[Tensor, "b w"]], before: Sequence[Float[Tensor, "b w"]]) -> Float[Tensor, ""]:
    """mean over blocks and images of cos(c(x; P), c(x)), in [-1, 1]."""
    return F.cosine_similarity(torch.stack(list(after)).float(), torch.stack(list(before)).float(), dim=2).mean()
