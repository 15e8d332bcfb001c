"""BadNet-Stripes: a small square of vertical stripes in random colors, at a random place.

*Paper.* Singh, Croce, Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP", CVPR 2026
(arXiv 2412.00727). 16 x 16 pixels at 224 px (32 at 336), stripes of one pixel; each column and channel is 0 or 1.

*Where we differ.* The side is 1/14 of the short side, at least 3 pixels: 24 at 336 px, where share 32/336 is the
paper's; stripes stay one pixel wide. One pattern unless ``resample`` is on; the place is the image's own either way,
drawn from its id.
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
class BadNetStripes:
    """``share``: side of the patch as a share of the short side, in (0, 1]. ``resample``: new stripes for each id."""

    share: float = 16 / 224
    resample: bool = False

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"badnet-stripes: share must be in (0, 1], got {self.share}.", hint="The paper's is 16/224."
            )

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with a patch each. Raises UsageError when there is not one id for each."""
        side = scaled_side(self.share, min(images.shape[-2:]), 3)
        top, left = places(seed, ids, images, side, "badnet-stripes")

        def draw(generator: torch.Generator) -> Tensor:
            columns = torch.randint(2, (3, 1, side), generator=generator).float()
            return columns.expand(3, side, side)

        if self.resample:
            patches = draw_for_each(draw, seed, ids, len(images), "badnet-stripes")
        else:
            patches = draw(generator_of(seed))[None]
        return stamp(images, patches, top, left, side)
