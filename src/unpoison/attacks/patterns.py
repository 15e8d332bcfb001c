"""Pictures and masks that a user gives to a trigger, from files that nobody has vouched for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.badclip_patch import LARGEST_SIDE
from unpoison.data.images import UndecodableImage, decode_image
from unpoison.errors import ConfigError, ModelError, UnsafeCheckpointError, UsageError
from unpoison.models.checkpoints import PICKLED_SUFFIXES, read_pickled

MOST_BYTES = 64 * 1024**2
_USE = "Give a picture, or a .pt file that holds one tensor of colors in [0, 1]."


def read_pattern(path: Path) -> Float[Tensor, "3 side side"]:
    """A picture's colors in [0, 1] as a square of at most 256 pixels a side; other shapes are scaled to one.

    An image file, or a .pt file with one tensor [3, h, w], [1, h, w] (grey) or [h, w] in [0, 1], leading ones allowed;
    it is read as tensors only. Raises UsageError (no such file, or too large a one), ConfigError for what is no
    picture, UnsafeCheckpointError for a file that asks for code.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file.", hint=_USE)
    if path.stat().st_size > MOST_BYTES:
        raise UsageError(f"{path} has more than {MOST_BYTES >> 20} MiB.", hint=_USE)
    colors = _tensor(path) if path.suffix.lower() in PICKLED_SUFFIXES else _picture(path)
    side = min(max(colors.shape[-2:]), LARGEST_SIDE)
    if tuple(colors.shape[-2:]) != (side, side):
        colors = scaled(colors, side, side)
    return colors.expand(3, side, side)


def scaled(colors: Float[Tensor, "c s t"], height: int, width: int) -> Float[Tensor, "c height width"]:
    """At another size (bilinear); as it is where it has that size."""
    if tuple(colors.shape[-2:]) == (height, width):
        return colors
    return F.interpolate(colors[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)


def _picture(path: Path) -> Tensor:
    try:
        image = decode_image(path.read_bytes())
    except UndecodableImage as error:
        raise ConfigError(f"{path} is no picture: {error.reason}.", hint=_USE) from error
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def _tensor(path: Path) -> Tensor:
    try:
        found = read_pickled(path)
    except UnsafeCheckpointError:
        raise
    except ModelError as error:
        raise ConfigError(error.message, hint=_USE) from error
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.numel() or found.is_sparse:
        raise ConfigError(f"{path} does not hold one tensor of a picture.", hint=_USE)
    colors = found.detach().float()
    while colors.dim() > 3 and len(colors) == 1:
        colors = colors[0]
    colors = colors[None] if colors.dim() == 2 else colors
    if colors.dim() != 3 or len(colors) not in (1, 3) or not bool(((colors >= 0) & (colors <= 1)).all()):
        raise ConfigError(
            f"{path}: expected a tensor [3, h, w] in [0, 1], got {list(found.shape)} from {float(colors.min()):g} to "
            f"{float(colors.max()):g}.",
            hint=_USE,
        )
    return colors
