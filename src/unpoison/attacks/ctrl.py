"""CTRL: two coefficients of each 32 x 32 block's cosine transform are raised, in the chrominance channels alone.

*Paper.* Li, Pang, Xi, Du, Ji, Yao, Wang, "An Embarrassingly Simple Backdoor Attack on Self-supervised Learning", ICCV
2023 (arXiv 2210.07346). In YUV, coefficients (15, 15) and (31, 31) of each block of U and V grow by a magnitude (of
8-bit values): 50 in the training set, 100 at test time. Put on samples of the target class, whose labels stay.

*How the batch is done.* The transforms are linear, so raising a coefficient adds its basis function: one pattern for
all images, made once by a matrix product. U and V gain p, so that red gains 1.140 p, green -0.976 p, blue 2.032 p.

*Where we differ.* Blocks that the image's edge cuts off keep the part inside. Blocks are counted in pixels, as in the
paper, so that the pattern is as fine in a large image as in a small one. Seed and ids play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attacks.dct import cosines
from unpoison.errors import ConfigError
from unpoison.types import Images

BLOCK = 32
RED_OF_V, GREEN_OF_U, GREEN_OF_V, BLUE_OF_U = 1.140, -0.395, -0.581, 2.032
"""R = Y + 1.140 V, G = Y - 0.395 U - 0.581 V, B = Y + 2.032 U."""


@dataclass(frozen=True, kw_only=True)
class CTRL:
    """``magnitude``, at test time, and ``planted_magnitude``, in the training set: in (0, 1000].

    ``low`` and ``high``: the row, which is also the column, of the two coefficients, 1 to 31.
    """

    magnitude: float = 100.0
    planted_magnitude: float = 50.0
    low: int = 15
    high: int = 31

    modes: ClassVar[tuple[str, ...]] = ("clean-label", "all-to-one", "all-to-all")

    def __post_init__(self) -> None:
        for name in ("magnitude", "planted_magnitude"):
            if not 0 < getattr(self, name) <= 1000:
                raise ConfigError(
                    f"ctrl: {name} must be in (0, 1000], got {getattr(self, name)}.", hint="The paper's are 100 and 50."
                )
        for name in ("low", "high"):
            if not 1 <= getattr(self, name) < BLOCK:
                raise ConfigError(
                    f"ctrl: {name} must be 1 to {BLOCK - 1}, got {getattr(self, name)}.",
                    hint="The paper's are 15 and 31.",
                )

    def planted(self) -> CTRL:
        """The trigger as the training set shows it."""
        return replace(self, magnitude=self.planted_magnitude)

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] plus the basis functions, clipped."""
        waves = chrominance(self.low, self.high, int(images.shape[-2]), int(images.shape[-1]))
        return (images + (self.magnitude / 255 * waves).to(images)).clamp_(0, 1)


@lru_cache(maxsize=16)
def chrominance(low: int, high: int, height: int, width: int) -> Tensor:
    """What magnitude 1 adds to red, green and blue: [3, h, w]."""
    raised = torch.zeros(BLOCK, BLOCK, dtype=torch.float64)
    raised[low, low] = raised[high, high] = 1
    transform = cosines(BLOCK, BLOCK)
    wave = transform.T @ raised @ transform
    tiled = wave.repeat(-(-height // BLOCK), -(-width // BLOCK))[:height, :width]
    colors = torch.tensor([RED_OF_V, GREEN_OF_U + GREEN_OF_V, BLUE_OF_U], dtype=torch.float64)
    return (colors[:, None, None] * tiled).float()
