"""How well images and captions match under a CLIP: those that belong together, and strangers."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int

from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels, to_images
from unpoison.defenses.telling import encode_images, encode_texts
from unpoison.errors import DivergedError, NoSeparationError
from unpoison.runs import Run
from unpoison.types import Images, ImageTextModel


def mean_cosine(clip: ImageTextModel, images: Images, texts: tuple[str, ...]) -> float:
    """Of matching rows. Raises DivergedError where it is not finite."""
    with torch.no_grad():
        value = float((encode_images(clip, images) * clip.encode_texts(texts)).sum(dim=1).mean())
    if not np.isfinite(value):
        raise DivergedError("unlearning", step=0, loss=value)
    return value


def mismatched_cosine(
    clip: ImageTextModel, pairs: ImageTextPairs, pixels: Pixels, rows: Int[np.ndarray, " k"], most: int, run: Run
) -> float:
    """c: mean cosine of up to ``most`` clean images with the captions of others among them that read differently.

    Raises NoSeparationError where none do.
    """
    chosen = rows[torch.randperm(len(rows), generator=run.generator("mismatched")).numpy()[:most]]
    captions = [texts[0] for texts in pairs.captions(chosen)]
    images = encode_images(clip, to_images(pixels.array[chosen]).to(run.device))
    cosines = images @ encode_texts(clip, captions).T
    numbers = torch.from_numpy(np.unique(captions, return_inverse=True)[1]).to(cosines.device)
    other = numbers[:, None] != numbers[None, :]
    if not bool(other.any()):
        raise NoSeparationError(
            f"All captions of the least suspicious pairs of {pairs.name} are the same.",
            hint="Give pairs whose captions say what their images show.",
        )
    return float(cosines[other].mean())
