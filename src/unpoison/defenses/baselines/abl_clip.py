"""ABL for CLIP: the pairs that a model is surest of are poison; train on the rest and pull these apart.

Papers
    Li, Lyu, Koren, Lyu, Li, Ma. "Anti-Backdoor Learning: Training Clean Models on Poisoned Data." NeurIPS 2021, arXiv
    2110.11571; brought to CLIP in the released code of Bansal et al., "CleanCLIP", ICCV 2023, arXiv 2303.03323.
Idea
    Poison is learnt first and best. So the pairs with the highest cosine of image and caption are flagged, and what
    they taught is unlearnt while the rest is repeated.
Needs
    The suspicious CLIP and its training pairs, poison included.
Protects
    Both towers' weights.
Steps
    1. Flag the 2 percent of pairs with the highest cosine under the suspicious model.
    2. L = InfoNCE(rest) + w mean (cos(flagged) + u)^2 with u = 0: flagged pairs become strangers.
    3. AdamW, 50 warm-up steps, then a cosine to zero.
Where we differ, and what the papers leave open
    The released default is u = -1, which pulls the flagged pairs together; 0 is what their text means. They flag while
    a model is trained from the start; here it is trained already. Rate, batch and epochs are those of fine-tuning
    (:mod:`unpoison.defenses.baselines.fine_tuning`), and so are held-out pairs and the end of a run that diverges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.clip_loop import train_steps
from unpoison.clip_training import (
    ClipRepair,
    Look,
    choose_weights,
    frozen_copy,
    open_training,
    temperature,
    trainable,
)
from unpoison.contrastive import average_gradients, cached_gradients, gather_with_gradient, info_nce, optimiser_step
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import load_pixels, to_images
from unpoison.data.training_pairs import process_slice
from unpoison.defenses.baselines.fine_tuning import MAX_LOG_SCALE, FineTuningConfig
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.models.logit_scale import usable_scale
from unpoison.runs import Run
from unpoison.schedules import decay_groups, set_rate, warm_up_cosine
from unpoison.types import Embeddings, ImageTextModel

_FEWEST = 2


@dataclass(frozen=True, kw_only=True)
class ABLClipConfig(FineTuningConfig):
    """``flagged_share``, ``opposite`` (u) and ``unlearn_weight`` (w) are the released ones but for u."""

    flagged_share: float = 0.02
    opposite: float = 0.0
    """u: 0 makes strangers of flagged pairs, 1 opposites; -1, the released default, keeps them together."""
    unlearn_weight: float = 1.0
    unlearn_batch: int = 32
    """Flagged pairs a step. Ours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.flagged_share < 0.5 or not -1 <= self.opposite <= 1:
            raise ConfigError(
                "expected flagged_share in (0, 0.5) and opposite in [-1, 1], "
                f"got {self.flagged_share} and {self.opposite}.",
                hint="Try 0.02 and 0.",
            )
        if self.unlearn_weight < 0 or self.unlearn_batch < 1:
            raise ConfigError("unlearn_weight cannot be negative, unlearn_batch is at least 1.", hint="Try 1 and 32.")


def repair_with_abl_clip(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    cosines: Float[np.ndarray, " n"],
    config: ABLClipConfig,
    *,
    run: Run,
) -> ClipRepair:
    """Steps 1 to 3 on a copy of ``clip``; ``cosines`` in [-1, 1] are its own of each pair, NaN for unusable ones.

    Raises NotEnoughDataError, SourceFormatError, ModelError.
    """
    flagged = flag(cosines, config.flagged_share)  # (1)
    rest = np.setdiff1d(np.flatnonzero(~np.isnan(cosines)), flagged)
    data = open_training(clip, pairs.select(rest), config, run=run)
    doubted = pairs.select(flagged)
    pixels = load_pixels(doubted, clip.image_size, cache=run.cache, progress=run.progress)
    captions = [texts[0] for texts in doubted.captions(range(len(flagged)))]
    suspect = frozen_copy(clip, run)
    mine = process_slice(data.batch_size, run)
    with trainable(clip, run) as trained:
        named = [*trained.tower("image"), *trained.tower("text")]
        scale = temperature(trained) if config.train_logit_scale else None
        weights = choose_weights(trained, named if scale is None else [*named, ("logit_scale", scale)])
        groups = decay_groups((("", value) for value in weights), config.weight_decay)
        optimiser = torch.optim.AdamW(groups, config.learning_rate, betas=config.betas, eps=config.epsilon)

        def one_step(step: int, looks: list[Look]) -> dict[str, Tensor]:
            batch = data.batch(step, run)

            def embed(start: int, stop: int) -> list[Tensor]:
                rows = slice(mine.start + start, mine.start + stop)
                with run.accelerator.autocast():
                    images = trained.encode_images(data.images(batch.rows[rows]).to(run.device))
                    return [images, data.encode(trained, batch.captions[rows])]

            def loss(images: Tensor, texts: Tensor) -> Tensor:
                first, second = (gather_with_gradient(part, run.accelerator) for part in (images, texts))
                return info_nce(first, second, usable_scale(clip) if scale is None else scale.exp())

            rate = warm_up_cosine(  # (3)
                step, total=data.steps, peak=config.learning_rate, warm_up_steps=config.warm_up_steps
            )
            set_rate(optimiser, rate)
            optimiser.zero_grad()
            value = cached_gradients(  # (2)
                embed,
                loss,
                size=mine.stop - mine.start,
                chunk=config.chunk_size,
                module=trained.module,
                accelerator=run.accelerator,
            )
            generator = run.generator("flagged", step)
            drawn = torch.randint(len(flagged), (config.unlearn_batch,), generator=generator).numpy()
            with run.accelerator.autocast():
                images = trained.encode_images(to_images(pixels.array[drawn]).to(run.device))
                texts = trained.encode_texts([captions[row] for row in drawn])
            apart = unlearn_loss(images, texts, config.opposite)
            run.accelerator.backward(config.unlearn_weight * apart)
            average_gradients(weights, run.accelerator)
            optimiser_step(optimiser, run.accelerator)
            if scale is not None:
                scale.data.clamp_(0, MAX_LOG_SCALE)
            return {"loss": value + config.unlearn_weight * apart.detach(), "unlearn_loss": apart.detach()}

        return train_steps(trained, suspect, optimiser, one_step, data, config, name="abl-clip", run=run)


def flag(cosines: Float[np.ndarray, " n"], share: float) -> Int[np.ndarray, " k"]:
    """Step 1: the rows of the highest cosines, ascending. Raises NotEnoughDataError for fewer than two."""
    usable = np.flatnonzero(~np.isnan(cosines))
    count = int(share * len(usable))
    if count < _FEWEST:
        raise NotEnoughDataError(
            "pairs to unlearn", have=count, need=_FEWEST, hint="Give more pairs or a larger flagged_share."
        )
    return np.sort(usable[np.argsort(-cosines[usable], kind="stable")[:count]])


def unlearn_loss(images: Embeddings, texts: Float[Tensor, "b d"], opposite: float) -> Float[Tensor, ""]:
    """Step 2's mean (cos + u)^2 on unit embeddings [b, d]."""
    return ((images.float() * texts.float()).sum(dim=1) + opposite).square().mean()
