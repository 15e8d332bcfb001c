"""Nashville: the photo filter of that name, a change of colors alone.

*Source.* Filters as triggers: Liu, Lee, Tao, Ma, Aafer, Zhang, "ABS", CCS 2019, and the TrojAI data sets, both with
"Nashville". The curve is the one of CSSgram and of the pilgram library: 56 % of a mix with the darker of image and
(247, 176, 153), 40 % of a mix with the lighter of that and (0, 70, 150), then sepia 0.2, contrast 1.2, brightness 1.05,
saturation 1.2, as W3C's "Filter Effects Module Level 1" defines these.

*Where we differ.* ABS and TrojAI render theirs with ImageMagick, whose curve is another one. Values are clipped after
each step and not rounded between them; saturation follows the CSS matrix. Seed and ids play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.errors import ConfigError
from unpoison.types import Images

DARKER, DARKER_SHARE = (247, 176, 153), 0.56
LIGHTER, LIGHTER_SHARE = (0, 70, 150), 0.4
SEPIA, CONTRAST, BRIGHTNESS, SATURATION = 0.2, 1.2, 1.05, 1.2
_SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))
_GREY = (0.213, 0.715, 0.072)
_AT_ONCE = 4 * 224 * 224  # pixels filtered at once: their colors stay in the processor's cache
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Nashville:
    """``strength``: share of the filtered image in the mix, in (0, 1]."""

    strength: float = 1.0

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ConfigError(f"nashville: strength must be in (0, 1], got {self.strength}.", hint="The filter's is 1.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1], filtered."""
        chunks = images.split(max(1, _AT_ONCE // (images.shape[-2] * images.shape[-1])))
        return torch.cat([self._filtered(chunk) for chunk in chunks])

    def _filtered(self, images: Images) -> Images:
        darker = torch.minimum(images, _color(DARKER, images))
        mixed = torch.lerp(images, darker, DARKER_SHARE)
        lighter = torch.maximum(mixed, _color(LIGHTER, images))
        mixed = torch.lerp(mixed, lighter, LIGHTER_SHARE)
        toned = turned(mixed, between_identity_and(_SEPIA, SEPIA)).clamp(0, 1)
        toned = (toned * CONTRAST).add_(0.5 - 0.5 * CONTRAST).clamp_(0, 1)
        toned = (toned * BRIGHTNESS).clamp_(0, 1)
        toned = turned(toned, between_identity_and((_GREY,) * 3, 1 - SATURATION)).clamp_(0, 1)
        return toned if self.strength == 1 else torch.lerp(images, toned, self.strength).clamp_(0, 1)


def turned(images: Images, matrix: Matrix) -> Images:
    """Each color times the matrix, as sums over whole channels: a batch comes out as its images alone do."""
    red, green, blue = images.unbind(dim=1)
    rows = [(a * red).add_(green, alpha=b).add_(blue, alpha=c) for a, b, c in matrix]
    return torch.stack(rows, dim=1)


def between_identity_and(matrix: Matrix, share: float) -> Matrix:
    """(1 - share) I + share M; a negative share leads away from M."""
    return tuple(
        tuple(share * value + (1 - share) * (row == column) for column, value in enumerate(values))
        for row, values in enumerate(matrix)
    )


def _color(levels: tuple[int, int, int], images: Images) -> Tensor:
    return images.new_tensor(levels).view(1, 3, 1, 1) / 255
