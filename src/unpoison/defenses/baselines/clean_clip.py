"""CleanCLIP: keep each tower busy with its own views, so that a trigger and a caption need not stay together.

Paper
    Bansal, Singhi, Yang, Yin, Grover, Chang. "CleanCLIP: Mitigating Data Poisoning Attacks in Multimodal Contrastive
    Learning." ICCV 2023, arXiv 2303.03323.
Idea
    A backdoor ties a trigger to a caption through the contrastive loss. Fine-tuning on clean pairs with self-supervised
    losses within each tower, each embedding near that of an augmented view, moves the towers apart from each other's
    shortcuts.
Needs
    The suspicious CLIP and clean image-caption pairs.
Protects
    Both towers' weights.
Steps
    1. Views: AutoAugment of the image, EDA of the caption.
    2. L = InfoNCE(image, text) + 1/2 [InfoNCE(image, augmented image) + InfoNCE(text, augmented text)], all symmetric
       and over the global batch of 64, at one logit scale, which is trained and kept in [1, 100].
    3. AdamW, betas (0.9, 0.999), weight decay 0.1 but none on biases and norms; 50 warm-up steps to 1e-5 (RN50; 3e-6 to
       5e-6 for ViT-B/32), then a cosine to zero; 10 epochs.
Where we differ, and what the paper leaves open
    The released schedule is off by one epoch (no warm-up, a rise at the end), its EDA captions are drawn once, before
    training; here the rate does what was meant, and both views are drawn anew at each step. AutoAugment's searched
    pairs of operations are replaced by uniformly drawn ones (:mod:`unpoison.data.auto_augment`), EDA's thesaurus by the
    caption's own words (:mod:`unpoison.data.eda`). Held-out pairs, resuming and the stop of a run that diverges are as
    for PAR (:mod:`unpoison.clip_loop`), and so is :meth:`CleanClipConfig.scaled` for small models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
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
from unpoison.contrastive import (
    average_gradients,
    cached_gradients,
    gather_with_gradient,
    info_nce,
    optimiser_step,
)
from unpoison.data.auto_augment import DRAWS, auto_augment
from unpoison.data.eda import edit_captions
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.training_pairs import process_slice
from unpoison.defenses.baselines.fine_tuning import MAX_LOG_SCALE, FineTuningConfig
from unpoison.errors import ConfigError
from unpoison.runs import Run
from unpoison.schedules import decay_groups, set_rate, warm_up_cosine
from unpoison.types import Embeddings, ImageTextModel


@dataclass(frozen=True, kw_only=True)
class CleanClipConfig(FineTuningConfig):
    """The released setting, for 100,000 pairs and an RN50."""

    self_supervision: float = 1.0
    """Weight of the bracket's half in step 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.self_supervision < 0:
            raise ConfigError("self_supervision cannot be negative.", hint="0 is plain fine-tuning.")


def repair_with_clean_clip(
    clip: ImageTextModel, pairs: ImageTextPairs, config: CleanClipConfig, *, run: Run
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
            draws = torch.rand(len(batch), DRAWS, generator=run.generator("image views", step))
            random = np.random.default_rng(run.seed_of("caption views", step))
            edited = edit_captions([data.texts[number] for number in batch.captions], random)  # (1)
            terms: dict[str, Tensor] = {}

            def embed(start: int, stop: int) -> list[Tensor]:
                rows = slice(mine.start + start, mine.start + stop)
                images = data.images(batch.rows[rows]).to(run.device)
                with run.accelerator.autocast():
                    return [
                        trained.encode_images(images),
                        data.encode(trained, batch.captions[rows]),
                        trained.encode_images(auto_augment(images, draws[rows])),  # (1)
                        trained.encode_texts(edited[rows]),
                    ]

            def loss(*embedded: Tensor) -> Tensor:
                images, texts, image_views, text_views = (
                    gather_with_gradient(part, run.accelerator) for part in embedded
                )
                factor = clip.logit_scale if scale is None else scale.exp()
                weight = config.self_supervision
                value, figures = clean_clip_loss(images, texts, image_views, text_views, factor, weight)
                terms.update(figures)
                return value

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
                scale.data.clamp_(0, MAX_LOG_SCALE)
            return terms | {"loss": value}

        return train_steps(trained, suspect, optimiser, one_step, data, config, name="clean-clip", run=run)


def clean_clip_loss(
    images: Embeddings,
    texts: Embeddings,
    image_views: Embeddings,
    text_views: Embeddings,
    logit_scale: float | Tensor,
    self_supervision: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Step 2 on unit embeddings [b, d] of one global batch, and its terms by name without a graph."""
    across = info_nce(images, texts, logit_scale)
    within_images = info_nce(images, image_views, logit_scale)
    within_texts = info_nce(texts, text_views, logit_scale)
    terms = {"contrastive_loss": across, "image_view_loss": within_images, "text_view_loss": within_texts}
    value = across + self_supervision * (within_images + within_texts) / 2
    return value, {name: term.detach() for name, term in terms.items()}
