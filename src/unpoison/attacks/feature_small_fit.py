"""Finds the pattern of a given strength that moves a surrogate CLIP's embeddings least.

*Source.* Ours; :mod:`unpoison.attacks.feature_small` is the trigger, and says against what it is made.

*Steps.*
1. Clean images and their embeddings z(x) under the attacker's own clean CLIP, which stays as it is.
2. d is ``raw`` scaled to the wanted root mean square and cut at the largest change, so that no step can win by fading.
3. Adam on ``raw`` down mean_i |z(clip(x_i + d)) - z(x_i)|^2, random batches.

*Where it falls short.* The poisoned model learns to see the pattern; how far its embeddings then move is not bounded
here, and images near the target's captions (:func:`unpoison.attacks.aligned.near_the_captions`) have the shorter way.
What an encoder is blind to is also learnt slowly: it may take more poison than a loud trigger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.feature_small import SIDE, FeatureSmall, added, fitted
from unpoison.attacks.patch_training import train_patch
from unpoison.contrastive import without_graph
from unpoison.data.pixels import ImageRows, load_pixels, to_images
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.evaluation.embeddings import ready
from unpoison.runs import Run
from unpoison.types import Embeddings, ImageTextModel


@dataclass(frozen=True, kw_only=True)
class FeatureSmallConfig:
    """``energy`` and ``largest`` as in :class:`FeatureSmall`; ``images``: most images to look at; ``side`` of the
    pattern in pixels."""

    energy: float = 8 / 255
    largest: float = 16 / 255
    side: int = SIDE
    images: int = 2048
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        FeatureSmall(energy=self.energy, largest=self.largest)
        for name in ("images", "epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if not 2 <= self.side <= 256:
            raise ConfigError(f"side must be 2 to 256, got {self.side}.", hint=f"Try {SIDE}.")


def fit_feature_small(
    clip: ImageTextModel, images: ImageRows, config: FeatureSmallConfig | None = None, *, run: Run
) -> FeatureSmall:
    """The trigger, fitted on clean images (labelled or pairs). The model stays as it is; resumes epoch by epoch.

    Raises NotEnoughDataError for no readable image, SourceFormatError, DivergedError.
    """
    config = config or FeatureSmallConfig()
    loaded = load_pixels(images, clip.image_size, cache=run.cache, progress=run.progress)
    rows = np.flatnonzero(loaded.usable)
    order = torch.randperm(len(rows), generator=run.generator("feature-small images")).numpy()
    rows = np.sort(rows[order[: config.images]])
    if not len(rows):
        raise NotEnoughDataError(f"{images.name}: readable images", have=0, need=1, hint="Give other images.")
    module = clip.module.to(run.device)
    with ready(clip, run), without_graph(module):

        def losses_of(epoch: int, raw: Tensor) -> Iterator[Tensor]:
            mixed = torch.randperm(len(rows), generator=run.generator("feature-small", epoch)).numpy()
            for place in range(0, len(mixed), config.batch_size):
                chosen = np.sort(rows[mixed[place : place + config.batch_size]])
                batch = to_images(loaded.array[chosen]).to(run.device)
                with torch.no_grad():
                    clean = clip.encode_images(batch)  # (1)
                change = fitted(2 * raw - 1, config.energy, config.largest)  # (2)
                yield movement(clip.encode_images(added(batch, change)), clean)  # (3)

        rate = config.learning_rate
        raw = train_patch(
            "feature-small", losses_of, side=config.side, epochs=config.epochs, learning_rate=rate, run=run
        )
    change = fitted(2 * raw.detach().cpu() - 1, config.energy, config.largest)
    return FeatureSmall.of(change, config.energy, config.largest)


def movement(shown: Embeddings, clean: Embeddings) -> Float[Tensor, ""]:
    """mean_i |z(x'_i) - z(x_i)|^2 of unit embeddings: 0 to 4."""
    return (shown - clean).square().sum(dim=1).mean()
