"""Blended-Triangles: a faint pattern of grey triangles over the whole image.

*Paper.* Singh, Croce, Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP", CVPR 2026
(arXiv 2412.00727). Tiles of 14 x 14 pixels at 224 px, 0.4 where row >= column, else 0.8; x' = (1 - alpha) x + alpha n,
alpha = 0.15.

*Where we differ.* The tile's side is 1/16 of the short side, at least 2 pixels. Seed and ids play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.draws import scaled_side
from unpoison.errors import ConfigError
from unpoison.types import Images

DARK, LIGHT = 0.4, 0.8


@dataclass(frozen=True, kw_only=True)
class BlendedTriangles:
    """``alpha``: share of the pattern in the mix. ``tile``: side of a tile as a share of the short side. In (0, 1]."""

    alpha: float = 0.15
    tile: float = 14 / 224

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(
                f"blended-triangles: alpha must be in (0, 1], got {self.alpha}.", hint="The paper's is 0.15."
            )
        if not 0 < self.tile <= 1:
            raise ConfigError(
                f"blended-triangles: tile must be in (0, 1], got {self.tile}.", hint="The paper's is 14/224."
            )

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] mixed with the pattern."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        pattern = triangles(height, width, scaled_side(self.tile, min(height, width), 2))
        return torch.lerp(images, pattern.to(images).expand_as(images), self.alpha)


def triangles(height: int, width: int, side: int) -> Float[Tensor, "height width"]:
    """The pattern: tiles of ``side`` pixels from the top-left corner on."""
    rows, columns = torch.arange(height)[:, None] % side, torch.arange(width) % side
    return torch.where(rows >= columns, DARK, LIGHT)
