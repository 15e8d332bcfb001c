"""The images that triggers are looked for on: the user's, or made-up ones where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from unpoison.data.pixels import load_pixels, to_images
from unpoison.data.shapes import make_shapes
from unpoison.data.sources import LabelledImages
from unpoison.errors import NotEnoughDataError
from unpoison.runs import Run
from unpoison.types import Images

FEWEST_IMAGES = 64
_MOST_BYTES = 2 * 1024**3
_NOISE_CELLS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeImages:
    """``images`` [n, 3, h, w] in [0, 1] on the run's device; ``labels`` [n] are the given ones, None without any.

    ``source`` says where they come from; ``made_up``: nobody photographed them.
    """

    images: Images
    labels: Int[Tensor, " n"] | None
    source: str
    made_up: bool


def gather_images(
    source: LabelledImages | None, class_names: Sequence[str], size: int, count: int, *, run: Run
) -> ProbeImages:
    """``count`` random usable images of ``source`` at ``size`` pixels, or made-up ones; fewer where they are so large
    that they would take more than 2 GiB.

    Labels count only where the source's class names are the model's. Raises NotEnoughDataError, SourceFormatError.
    """
    count = max(FEWEST_IMAGES, min(count, _MOST_BYTES // (12 * size**2)))
    if source is None:
        return _made_up(size, count, run)
    rows = np.random.default_rng(run.seed_of("probe images")).permutation(len(source))[:count]
    chosen = source.select(np.sort(rows))
    pixels = load_pixels(chosen, size, cache=run.cache, progress=run.progress)
    usable = np.flatnonzero(pixels.usable)
    if len(usable) < FEWEST_IMAGES:
        hint = "Give a source of more images, or none: pictures are made up then."
        raise NotEnoughDataError(f"usable images in {source.name}", have=len(usable), need=FEWEST_IMAGES, hint=hint)
    known = not class_names or tuple(source.class_names) == tuple(class_names)
    labels = torch.from_numpy(chosen.labels[usable]).to(run.device) if known else None
    images = to_images(pixels.array[usable]).to(run.device)
    return ProbeImages(images=images, labels=labels, source=f"{len(usable)} images of {source.name}", made_up=False)


def _made_up(size: int, count: int, run: Run) -> ProbeImages:
    """Half pictures of the shapes world, half colored noise of several grains."""
    shapes = to_images(make_shapes(count - count // 2, size=size, seed=run.seed_of("shapes") % 2**31).images)
    generator = run.generator("noise")
    parts = []
    for place, cells in enumerate(_NOISE_CELLS):
        number = len(range(place, count // 2, len(_NOISE_CELLS)))
        grains = torch.rand(number, 3, cells, cells, generator=generator)
        smooth = F.interpolate(grains, size=(size, size), mode="bicubic", align_corners=False)
        parts.append((smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1))
    images = torch.cat([shapes, *parts]).to(run.device)
    return ProbeImages(
        images=images, labels=None, source=f"{len(images)} made-up pictures (shapes and colored noise)", made_up=True
    )
