"""Training augmentation on whole batches: one gather per batch, an explicit generator, nothing per image."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from unpoison.errors import ConfigError
from unpoison.types import Images


def random_crop(
    images: Images, padding: int, generator: torch.Generator, *, fill: Literal["reflect", "zero"] = "reflect"
) -> Images:
    """Each image shifted by up to ``padding`` pixels each way; the margin is mirrored or black.

    Shifts are uniform over the (2 padding + 1)^2 windows and drawn on the generator's device, so that the same seed
    gives the same crops wherever the images live. Raises ConfigError for a padding that the images cannot mirror.
    """
    batch, _, height, width = images.shape
    if padding < 0 or (fill == "reflect" and padding >= min(height, width)):
        raise ConfigError(
            f"expected a crop padding from 0 to {min(height, width) - 1} for {height}x{width} images, got {padding}.",
            hint="Lower the padding, or fill with zeros.",
        )
    if padding == 0 or batch == 0:
        return images
    shifts = torch.randint(2 * padding + 1, (2, batch), generator=generator, device=generator.device)
    return crop_at(images, shifts[0], shifts[1], padding, fill=fill)


def crop_at(
    images: Images,
    top: Int[Tensor, " b"],
    left: Int[Tensor, " b"],
    padding: int,
    *,
    fill: Literal["reflect", "zero"] = "reflect",
) -> Images:
    """Each image's window that begins at (``top``, ``left``) of the image with ``padding`` pixels added all around."""
    batch, _, height, width = images.shape
    margins = (padding,) * 4
    padded = functional.pad(images, margins, mode="reflect") if fill == "reflect" else functional.pad(images, margins)
    rows = top.to(images.device)[:, None] + torch.arange(height, device=images.device)
    columns = left.to(images.device)[:, None] + torch.arange(width, device=images.device)
    samples = torch.arange(batch, device=images.device)[:, None, None]
    # Channels last in the index, so that one gather moves whole pixels.
    windows = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2)


def random_flip(images: Images, generator: torch.Generator) -> Images:
    """Each image mirrored left to right with probability one half."""
    flipped = torch.rand(images.shape[0], generator=generator, device=generator.device) < 0.5
    return torch.where(flipped.to(images.device)[:, None, None, None], images.flip(-1), images)


def brighten(images: Images, noise: Float[Tensor, "b 3 h w"], noisy: Bool[Tensor, " b"]) -> Images:
    """min(x + max(n, 0), 1) where ``noisy``: the sample is cut before it is added, so that it only brightens."""
    added = (images + noise.clamp(0, 1)).clamp(0, 1)
    return torch.where(noisy.to(images.device)[:, None, None, None], added, images)


def erase_square(
    images: Images,
    top: Int[Tensor, " b"],
    left: Int[Tensor, " b"],
    side: Int[Tensor, " b"],
    fill: tuple[float, float, float],
) -> Images:
    """``side`` x ``side`` pixels from (``top``, ``left``) in the colour ``fill``; side 0 leaves the image as it is."""
    top, left, side = (value.to(images.device)[:, None] for value in (top, left, side))
    rows, columns = (torch.arange(extent, device=images.device)[None, :] for extent in images.shape[-2:])
    inside_rows = (rows >= top) & (rows < top + side)
    inside_columns = (columns >= left) & (columns < left + side)
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    colour = torch.tensor(fill, dtype=images.dtype, device=images.device)[None, :, None, None]
    return torch.where(inside, colour, images)
