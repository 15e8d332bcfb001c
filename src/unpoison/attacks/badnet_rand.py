"""BadNet-Rand: a small square of noise around the image's own color, at a random place.

*Papers.* The patch of Gu, Dolan-Gavitt, Garg, "BadNets", 2017 (arXiv 1708.06733) in the form that the backdoors of CLIP
use: Bansal, Singhi, Yang, Yin, Grover, Chang, "CleanCLIP", ICCV 2023 (arXiv 2303.03323). 16 x 16 pixels at 224 px, each
the image's mean of its channel plus N(0, 1), clipped to [0, 1].

*Where we differ.* The side is 1/14 of the short side, at least 3 pixels. The noise is one pattern unless ``resample``
is on (published tables draw it anew for each image); the place is the image's own either way, drawn from its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attacks.draws import draw_for_each, generator_of, places, scaled_side, stamp
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class BadNetRand:
    """``share``: side of the patch as a share of the short side, in (0, 1]. ``resample``: new noise for each id."""

    share: float = 16 / 224
    resample: bool = False

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"badnet-rand: share must be in (0, 1], got {self.share}.", hint="The papers' is 16/224.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with a patch each. Raises UsageError when there is not one id for each."""
        side = scaled_side(self.share, min(images.shape[-2:]), 3)
        top, left = places(seed, ids, images, side, "badnet-rand")

        def draw(generator: torch.Generator) -> Tensor:
            return torch.randn(3, side, side, generator=generator)

        if self.resample:
            noise = draw_for_each(draw, seed, ids, len(images), "badnet-rand")
        else:
            noise = draw(generator_of(seed))[None]
        patches = images.mean(dim=(-2, -1), keepdim=True) + noise.to(images)
        return stamp(images, patches.clamp(0, 1), top, left, side)
