"""Label-Consistent: checkers in the corners of samples of the target class, whose own features were made unreliable.

*Paper.* Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019 (arXiv 1912.02771). Labels stay as they are.
So that the network needs the trigger, samples are first perturbed against a surrogate classifier; the trigger, 3 x 3
pixels at 32 px in all four corners, is then added with an amplitude that may be small.

*Two parts.* This file is the trigger; it alone is shown at test time. The perturbation is
:func:`unpoison.attacks.adversarial.perturb_poisoned`, which needs a surrogate. Without one the training samples carry
the trigger alone, and the attack is much weaker: the paper's baseline.

*Where we differ.* The checker is BadNet's, mirrored so that the corners face each other; bright cells gain
``amplitude`` and dark cells lose it. The side is 3/32 of the short side, at least 3 pixels. Seed and ids play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.badnet import CHECKER
from unpoison.attacks.draws import scaled_side
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class LabelConsistent:
    """``amplitude``: what a cell gains or loses, in (0, 1]; 1 paints it. ``share``: side of a checker as a share of
    the short side, in (0, 1]. ``corners``: 1 (bottom right) or 4."""

    amplitude: float = 1.0
    share: float = 3 / 32
    corners: int = 4

    modes: ClassVar[tuple[str, ...]] = ("clean-label",)

    def __post_init__(self) -> None:
        for name in ("amplitude", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"label-consistent: {name} must be in (0, 1], got {getattr(self, name)}.",
                    hint="The usual are amplitude 1 and share 3/32.",
                )
        if self.corners not in (1, 4):
            raise ConfigError(
                f"label-consistent: corners must be 1 or 4, got {self.corners}.", hint="The paper's is 4."
            )

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] plus the checkers, clipped."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        signs = checkers(scaled_side(self.share, min(height, width), 3), self.corners, height, width)
        return (images + (self.amplitude * signs).to(images)).clamp_(0, 1)


@lru_cache(maxsize=16)
def checkers(side: int, corners: int, height: int, width: int) -> Float[Tensor, "height width"]:
    """1 on bright cells, -1 on dark ones, 0 elsewhere; where corners meet in a tiny image, the bottom right wins."""
    cells = torch.arange(side) * 3 // side
    checker = (2 * torch.tensor(CHECKER) - 1)[cells][:, cells]
    checker = checker[-min(side, height) :, -min(side, width) :]
    down, across = checker.shape
    signs = torch.zeros(height, width)
    if corners == 4:
        signs[:down, :across] = checker.flip(0, 1)
        signs[:down, width - across :] = checker.flip(0)
        signs[height - down :, :across] = checker.flip(1)
    signs[height - down :, width - across :] = checker
    return signs
