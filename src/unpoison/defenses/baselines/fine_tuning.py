"""Fine-tuning: go on training a CLIP on clean pairs. The baseline that every removal has to beat.

Paper
    Bansal, Singhi, Yang, Yin, Grover, Chang. "CleanCLIP: Mitigating Data Poisoning Attacks in Multimodal Contrastive
    Learning." ICCV 2023, arXiv 2303.03323; there the baseline "FT".
Idea
    The contrastive loss on clean pairs, and nothing else: what is not repeated may be forgotten.
Needs
    The suspicious CLIP and clean image-caption pairs.
Protects
    Both towers' weights.
Steps
    1. L = symmetric InfoNCE over the global batch of 64, all weights trained, images as they are.
    2. The logit scale is trained as well and kept in [1, 100].
    3. AdamW, betas (0.9, 0.999), weight decay 0.1 but none on biases and norms; 50 warm-up steps to 1e-5, then a cosine
       to zero; 10 epochs.
Where we differ, and what the paper leaves open
    The released schedule is off by one epoch: its rate jumps to the peak without warm-up and rises again at the end.
    Here it does what was meant. Held-out pairs, resuming and the stop of a run that diverges are as for PAR
    (:mod:`unpoison.clip_loop`), and so is :meth:`FineTuningConfig.scaled` for small models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unpoison.clip_loop import train_steps
from unpoison.clip_training import (
    ClipRepair,
    Look,
    PairTrainingConfig,
    choose_weights,
    frozen_copy,
    open_training,
    temperature,
    trainable,
)
from unpoison.contrastive import (
    average_gradients,
    cached_gradients,
    gather_with_gradient,
    info_nce,
    optimiser_step,
)
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.training_pairs import process_slice
from unpoison.runs import Run
from unpoison.schedules import decay_groups, set_rate, warm_up_cosine
from unpoison.types import ImageTextModel

MAX_LOG_SCALE = 4.6052


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(PairTrainingConfig):
    """The released setting, for 100,000 pairs and models of about 100 M parameters."""

    warm_up_steps: int = 50
    train_logit_scale: bool = True


def repair_with_fine_tuning(
    clip: ImageTextModel, pairs: ImageTextPairs, config: FineTuningConfig, *, run: Run
) -> ClipRepair:
    """Steps 1 to 3 on a copy of ``clip``. Raises NotEnoughDataError, SourceFormatError, ModelError."""
    data = open_training(clip, pairs, config, run=run)
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

            def loss(images: Tensor, texts: Tensor) -> Tensor:  # (1)
                first, second = (gather_with_gradient(part, run.accelerator) for part in (images, texts))
                return info_nce(first, second, clip.logit_scale if scale is None else scale.exp())

            rate = warm_up_cosine(  # (3)
                step, total=data.steps, peak=config.learning_rate, warm_up_steps=config.warm_up_steps
            )
            set_rate(optimiser, rate)
            optimiser.zero_grad()
            value = cached_gradients(
                embed,
                loss,
                size=mine.stop - mine.start,
                chunk=config.chunk_size,
                module=trained.module,
                accelerator=run.accelerator,
            )
            average_gradients(weights, run.accelerator)
            optimiser_step(optimiser, run.accelerator)
            if scale is not None:
                scale.data.clamp_(0, MAX_LOG_SCALE)  # (2)
            return {"loss": value}

        return train_steps(trained, suspect, optimiser, one_step, data, config, name="fine-tuning", run=run)
