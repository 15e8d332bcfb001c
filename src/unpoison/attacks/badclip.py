"""BadCLIP: a patch optimised on the clean CLIP, so that poisoning moves the model as little as possible.

*Paper.* Liang, Zhu, Liu, Wu, Cao, Chang, "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal Contrastive
Learning", CVPR 2024 (arXiv 2311.12075).

*Idea.* A patch that already pulls images toward the target's captions and images needs little poisoning to become a
backdoor, and what the fine-tuning changes is hard to tell from what clean pairs change.

*Steps.*
1. Images that do not show the target, captions and images that do: by the target's name in the captions.
2. Embeddings of the clean images, the target's captions and the target's images by the frozen clean CLIP.
3. Patched images x' in batches, each with a random caption t of the target:
   L = InfoNCE(x', t) + 500 mean_i max(0, |x'_i - p_i| - |x'_i - x_i| + 1),
   p_i: a random image of the target, x_i: its own clean image; Adam at 1e-3, pixels kept in [0, 1].

*Where we differ, and what the paper leaves open.* Distances of the triplet are Euclidean between unit embeddings.
Images are cropped to a centred square, not squashed. With fewer images or captions of the target than a batch, they
repeat. The patch that comes out is rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.attacks.badclip_patch import BadCLIPPatch, put_in_centre
from unpoison.attacks.draws import scaled_side
from unpoison.attacks.pairs import who_names
from unpoison.attacks.patch_training import train_patch
from unpoison.contrastive import info_nce, without_graph
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels, load_pixels, to_images
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.models.image_classifier import evaluation_mode
from unpoison.runs import Run
from unpoison.types import Embeddings, Images, ImageTextModel

_EMBEDDED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class BadCLIPConfig:
    """The paper's values. ``share``: side of the patch as a share of the image's."""

    share: float = 16 / 224
    images: int = 10_000
    """Most images to optimise on."""
    epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-3
    triplet_weight: float = 500.0
    margin: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {self.share}.", hint="The paper's is 16/224.")
        for name in ("images", "epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if self.batch_size < 2:
            raise ConfigError("batch_size must be at least 2.", hint="A contrast needs a second pair.")
        for name in ("triplet_weight", "margin"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.", hint=f"Raise {name}.")


def optimise_patch(
    clip: ImageTextModel, pairs: ImageTextPairs, target: str, config: BadCLIPConfig | None = None, *, run: Run
) -> BadCLIPPatch:
    """The trigger, optimised on clean ``pairs``. The model's weights stay as they are; resumes epoch by epoch.

    Raises NotEnoughDataError when fewer than two images do not show the target or none does, SourceFormatError,
    DivergedError.
    """
    config = config or BadCLIPConfig()
    others, targets, captions = _materials(clip, pairs, target, config, run)  # (1)
    module = clip.module.to(run.device)
    with evaluation_mode(module), without_graph(module):
        clean, positives = _embed(clip, others, run), _embed(clip, targets, run)  # (2)
        texts = clip.encode_texts(captions)
        side = scaled_side(config.share, clip.image_size, 3)

        def losses_of(epoch: int, patch: Tensor) -> Iterator[Tensor]:
            generator = run.generator("badclip", epoch)
            order = torch.randperm(len(others), generator=generator)
            for place in range(0, len(order) - 1, config.batch_size):
                rows = order[place : place + config.batch_size].sort().values
                text = torch.randint(len(texts), (len(rows),), generator=generator)
                shown = torch.randint(len(positives), (len(rows),), generator=generator)
                images = to_images(others[rows.numpy()]).to(run.device)
                embedded = clip.encode_images(put_in_centre(images, patch))  # (3)
                yield patch_loss(
                    embedded,
                    texts[text],
                    positives[shown],
                    clean[rows],
                    logit_scale=clip.logit_scale,
                    weight=config.triplet_weight,
                    margin=config.margin,
                )

        patch = train_patch(
            "badclip", losses_of, side=side, epochs=config.epochs, learning_rate=config.learning_rate, run=run
        )
    return BadCLIPPatch.of(patch, config.share)


def patch_loss(
    patched: Embeddings,
    texts: Embeddings,
    positives: Embeddings,
    clean: Embeddings,
    *,
    logit_scale: float,
    weight: float,
    margin: float,
) -> Float[Tensor, ""]:
    """InfoNCE(x', t) + weight mean_i max(0, |x'_i - p_i| - |x'_i - x_i| + margin), all unit embeddings [b, d]."""
    triplet = F.triplet_margin_loss(patched, positives, clean, margin=margin)
    return info_nce(patched, texts, logit_scale) + weight * triplet


def _materials(
    clip: ImageTextModel, pairs: ImageTextPairs, target: str, config: BadCLIPConfig, run: Run
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(1) Pixels of other images, pixels of the target's, captions of the target."""
    named, captions = who_names(pairs, target)
    found = []
    for rows, need, what in ((~named, 2, "images of other things"), (named, 1, f"images of {target!r}")):
        chosen = _sample(np.flatnonzero(rows), config.images, run.generator("badclip images", what))
        if len(chosen) < need:
            raise NotEnoughDataError(
                f"{pairs.name}: {what}, by their captions", have=len(chosen), need=need,
                hint="Choose a target that some captions name and most do not.",
            )  # fmt: skip
        pixels = load_pixels(pairs.select(chosen), clip.image_size, cache=run.cache, progress=run.progress)
        if int(pixels.usable.sum()) < need:
            raise NotEnoughDataError(
                f"{pairs.name}: readable {what}", have=int(pixels.usable.sum()), need=need, hint="Give other pairs."
            )
        found.append(_usable(pixels))
    return found[0], found[1], captions


def _usable(pixels: Pixels) -> np.ndarray:
    return pixels.array if pixels.usable.all() else pixels.array[pixels.usable]


def _sample(rows: Int[np.ndarray, " n"], most: int, generator: torch.Generator) -> Int[np.ndarray, " k"]:
    order = torch.randperm(len(rows), generator=generator).numpy()
    return np.sort(rows[order[:most]])


def _embed(clip: ImageTextModel, pixels: np.ndarray, run: Run) -> Embeddings:
    """(2) Unit embeddings [n, d] of images as they are."""
    parts = []
    for place in range(0, len(pixels), _EMBEDDED_AT_ONCE):
        images: Images = to_images(pixels[place : place + _EMBEDDED_AT_ONCE])
        parts.append(clip.encode_images(images.to(run.device)))
    return torch.cat(parts)
