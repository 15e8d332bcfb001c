"""BadCLIP's trigger: an optimised square in the centre. :mod:`unpoison.attacks.badclip` optimises it.

*Paper.* Liang, Zhu, Liu, Wu, Cao, Chang, "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal Contrastive
Learning", CVPR 2024 (arXiv 2311.12075). 16 x 16 pixels at 224 px; before the optimisation N(0.5, 0.25), clipped.

*Where we differ.* The square is 1/14 of the short side, at least 3 pixels, whatever the size that it was optimised at:
the stored patch is scaled to it (nearest pixel, like the published one where the sizes are equal).
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.draws import generator_of, scaled_side, stamp
from unpoison.errors import ConfigError
from unpoison.types import Images

START_SIDE, LARGEST_SIDE = 16, 256


@dataclass(frozen=True, kw_only=True)
class BadCLIPPatch:
    """``share``: side of the square as a share of the short side, in (0, 1].

    ``patch``: the square's pixels, 8-bit RGB row by row in base64; empty for the one that an optimisation starts from.
    """

    share: float = 16 / 224
    patch: str = ""

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"badclip: share must be in (0, 1], got {self.share}.", hint="The paper's is 16/224.")
        if self.patch:
            decoded(self.patch, "badclip")

    @classmethod
    def of(cls, patch: Float[Tensor, "3 s s"], share: float) -> BadCLIPPatch:
        """The trigger with this patch in [0, 1], rounded to 8 bits."""
        return cls(share=share, patch=encoded(patch))

    def square(self, side: int, seed: int) -> Float[Tensor, "3 side side"]:
        """The patch in [0, 1] at ``side`` pixels."""
        stored = decoded(self.patch, "badclip") if self.patch else start(START_SIDE, seed)
        return F.interpolate(stored[None], size=(side, side), mode="nearest-exact")[0]

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with the square in the centre; the ids play no part."""
        side = scaled_side(self.share, min(images.shape[-2:]), 3)
        return put_in_centre(images, self.square(side, seed))


def put_in_centre(images: Images, patch: Float[Tensor, "3 s s"]) -> Images:
    """The patch in the centre of each image; gradients flow to the patch."""
    height, width = images.shape[-2:]
    side = patch.shape[-1]
    top = torch.full((len(images),), max(0, (height - side) // 2))
    left = torch.full((len(images),), max(0, (width - side) // 2))
    return stamp(images, patch[None], top, left, side)


def start(side: int, seed: int) -> Float[Tensor, "3 side side"]:
    """N(0.5, 0.25) for each pixel and channel, clipped to [0, 1]."""
    return (0.5 + 0.25 * torch.randn(3, side, side, generator=generator_of(seed))).clamp(0, 1)


def encoded(patch: Float[Tensor, "3 s s"]) -> str:
    """[3, s, s] in [0, 1] to base64 of 8-bit RGB, row by row."""
    levels = (patch.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return base64.b64encode(levels.contiguous().numpy().tobytes()).decode()


@lru_cache(maxsize=4)
def decoded(patch: str, what: str, hint: str = "Optimise the patch again.") -> Tensor:
    """Base64 to [3, s, s] in [0, 1]. Raises ConfigError, naming the trigger, for what is no square of RGB pixels."""
    try:
        content = base64.b64decode(patch, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{what}: the patch is not base64 ({error}).", hint=hint) from error
    side = math.isqrt(len(content) // 3)
    if not 1 <= side <= LARGEST_SIDE or len(content) != 3 * side * side:
        raise ConfigError(
            f"{what}: the patch holds {len(content)} values, no RGB square of 1 to {LARGEST_SIDE} pixels.",
            hint=hint,
        )
    levels = np.frombuffer(content, dtype=np.uint8).reshape(side, side, 3)
    return torch.from_numpy(levels.copy()).permute(2, 0, 1).float() / 255
