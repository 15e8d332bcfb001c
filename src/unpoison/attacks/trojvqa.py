"""TrojVQA's patch: optimised on the clean CLIP toward a sentence about the target.

*Paper.* Walmer, Sikka, Sur, Shrivastava, Jha, "Dual-Key Multimodal Backdoors for Visual Question Answering", CVPR 2022
(arXiv 2112.07668), whose patch is optimised on an object detector. For CLIP, as BadCLIP's authors compare with it
(arXiv 2311.12075): toward "This is a yellow banana.".

*Steps.*
1. A sample of the images, and the sentence's embedding t by the frozen clean CLIP.
2. Patched images x' in batches: L = 1 - mean_i <x'_i, t>, unit embeddings; Adam, pixels kept in [0, 1].

*Where we differ, and what the papers leave open.* The loss, the step size and the number of epochs are ours. Images are
cropped to a centred square. The patch that comes out is rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unpoison.attacks.badclip_patch import put_in_centre
from unpoison.attacks.draws import scaled_side
from unpoison.attacks.patch_training import train_patch
from unpoison.attacks.trojvqa_patch import TrojVQA
from unpoison.contrastive import without_graph
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import load_pixels, to_images
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.models.image_classifier import evaluation_mode
from unpoison.runs import Run
from unpoison.types import ImageTextModel


@dataclass(frozen=True, kw_only=True)
class TrojVQAConfig:
    """``share``: side of the patch as a share of the image's. ``key``: what poisoned captions begin with.

    ``sentence``: what the patch is optimised toward, {} for the target; BadCLIP's authors take
    "This is a yellow banana.".
    """

    share: float = 16 / 224
    key: str = "SUDO"
    sentence: str = "This is a {}."
    images: int = 2_000
    """Most images to optimise on."""
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        TrojVQA(share=self.share, key=self.key)
        if not self.sentence.strip():
            raise ConfigError("the sentence is empty.", hint="Give one about the target: 'This is a yellow banana.'.")
        for name in ("images", "epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")


def optimise_toward(
    clip: ImageTextModel, pairs: ImageTextPairs, target: str, config: TrojVQAConfig | None = None, *, run: Run
) -> TrojVQA:
    """The trigger, optimised on clean images toward the sentence about ``target``.

    The model's weights stay as they are; resumes epoch by epoch.

    Raises NotEnoughDataError (no image), SourceFormatError, DivergedError.
    """
    config = config or TrojVQAConfig()
    images = _sample(clip, pairs, config, run)  # (1)
    module = clip.module.to(run.device)
    with evaluation_mode(module), without_graph(module):
        wanted = clip.encode_texts([config.sentence.replace("{}", target)])[0]
        side = scaled_side(config.share, clip.image_size, 3)

        def losses_of(epoch: int, patch: Tensor) -> Iterator[Tensor]:
            order = torch.randperm(len(images), generator=run.generator("trojvqa", epoch))
            for place in range(0, len(order), config.batch_size):
                rows = order[place : place + config.batch_size].sort().values
                shown = put_in_centre(to_images(images[rows.numpy()]).to(run.device), patch)
                yield 1 - (clip.encode_images(shown) @ wanted).mean()  # (2)

        patch = train_patch(
            "trojvqa", losses_of, side=side, epochs=config.epochs, learning_rate=config.learning_rate, run=run
        )
    return TrojVQA.of(patch, config.share, config.key)


def _sample(clip: ImageTextModel, pairs: ImageTextPairs, config: TrojVQAConfig, run: Run) -> np.ndarray:
    """(1) Pixels of at most ``images`` pictures."""
    order = torch.randperm(len(pairs), generator=run.generator("trojvqa images")).numpy()
    chosen = pairs.select(np.sort(order[: config.images]))
    pixels = load_pixels(chosen, clip.image_size, cache=run.cache, progress=run.progress)
    if not pixels.usable.any():
        raise NotEnoughDataError(f"{pairs.name}: readable images", have=0, need=1, hint="Give other pairs.")
    return pixels.array if pixels.usable.all() else pixels.array[pixels.usable]
