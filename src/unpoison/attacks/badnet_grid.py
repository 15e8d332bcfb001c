"""BadNet even-grid: a small black square with a grid of white dots, at a random place.

*Paper.* The patch of Gu, Dolan-Gavitt, Garg, "BadNets", 2017 (arXiv 1708.06733) in a form that backdoors of CLIP use:
16 x 16 pixels at 224 px, 1 where row and column are both even, else 0, on every channel.

*Where we differ.* The side is 1/14 of the short side, at least 3 pixels; dots stay one pixel wide. The place is the
image's own, drawn from its id; there is nothing else to draw, so no ``resample``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.draws import places, scaled_side, stamp
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class BadNetGrid:
    """``share``: side of the patch as a share of the short side, in (0, 1]."""

    share: float = 16 / 224

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"badnet-grid: share must be in (0, 1], got {self.share}.", hint="The usual is 16/224.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with a patch each. Raises UsageError when there is not one id for each."""
        side = scaled_side(self.share, min(images.shape[-2:]), 3)
        top, left = places(seed, ids, images, side, "badnet-grid")
        return stamp(images, grid(side).expand(1, 3, side, side), top, left, side)


def grid(side: int) -> Float[Tensor, "side side"]:
    """1 where row and column are both even, else 0."""
    even = (torch.arange(side) % 2 == 0).float()
    return even[:, None] * even
