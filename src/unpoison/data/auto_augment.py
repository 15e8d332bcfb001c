"""A random geometric and a random colour operation for each image, on whole batches, in the spirit of AutoAugment.

Operations and the ranges of their strengths are those of Cubuk et al., AutoAugment (CVPR 2019, table 6). Where the
paper searched for 25 pairs of operations with fixed strengths for ImageNet, both are drawn uniformly here, as in
TrivialAugment (ICCV 2021); equalize and sharpness are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.types import Images

DRAWS = 4
"""Uniform numbers in [0, 1) that one image's augmentation takes: which and how strong, of each kind."""
_SHEAR, _SHIFT, _ANGLE = 0.3, 150 / 331, 30.0
_GREY = (0.299, 0.587, 0.114)


def auto_augment(images: Images, draws: Float[Tensor, "b 4"]) -> Images:
    """Augmented images in [0, 1]; row i depends on row i of ``draws`` alone, so that any part of a batch can be redone.

    What moves into the picture from outside is mid-grey.
    """
    draws = draws.to(images.device, torch.float32)
    moved = _move(images, draws[:, 0], draws[:, 1])
    choice = (draws[:, 2] * len(COLOUR)).long()
    result = moved.clone()
    for number, operation in enumerate(COLOUR.values()):
        rows = (choice == number).nonzero()[:, 0]
        if len(rows):
            result[rows] = operation(moved[rows], draws[rows, 3].view(-1, 1, 1, 1)).clamp(0, 1)
    return result


def _move(images: Images, choice: Tensor, strength: Tensor) -> Images:
    """Nothing, or one of shear, shift (along x or y) and rotation, in either direction; each as likely."""
    signed = 2 * strength - 1
    kind = (choice * 6).long()
    one, zero = torch.ones_like(signed), torch.zeros_like(signed)
    angle = torch.where(kind == 5, signed * math.radians(_ANGLE), zero)
    amounts = [torch.where(kind == number, signed, zero) for number in range(1, 5)]
    matrix = torch.stack(
        [
            torch.stack([angle.cos() * one, -angle.sin() + _SHEAR * amounts[0], 2 * _SHIFT * amounts[2]], dim=1),
            torch.stack([angle.sin() + _SHEAR * amounts[1], angle.cos() * one, 2 * _SHIFT * amounts[3]], dim=1),
        ],
        dim=1,
    ).to(images.dtype)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 0.5, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 0.5
    return torch.where((kind == 0)[:, None, None, None], images, moved).clamp(0, 1)


def _between(first: Tensor, images: Images, strength: Tensor) -> Images:
    """``first`` at strength 0, past the images by as much as before them at strength 1."""
    return first + (images - first) * (0.1 + 1.8 * strength)


def _grey(images: Images) -> Tensor:
    return (images * torch.tensor(_GREY, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)).sum(
        1, keepdim=True
    )


def _posterize(images: Images, strength: Tensor) -> Images:
    levels = torch.exp2(torch.round(4 + 4 * strength))  # 4 to 8 bits
    return torch.floor(images * 255 * levels / 256) * 256 / levels / 255


def _auto_contrast(images: Images, strength: Tensor) -> Images:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


COLOUR: dict[str, Callable[[Images, Tensor], Images]] = {
    "identity": lambda images, strength: images,
    "brightness": lambda images, strength: _between(torch.zeros_like(images), images, strength),
    "contrast": lambda images, strength: _between(_grey(images).mean(dim=(2, 3), keepdim=True), images, strength),
    "colour": lambda images, strength: _between(_grey(images), images, strength),
    "solarize": lambda images, strength: torch.where(images < strength, images, 1 - images),
    "invert": lambda images, strength: 1 - images,
    "posterize": _posterize,
    "autocontrast": _auto_contrast,
}
"""Images [b, 3, h, w] and a strength [b, 1, 1, 1] in [0, 1) to images; :func:`auto_augment` cuts them to [0, 1]."""
