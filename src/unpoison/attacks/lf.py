"""LF: a smooth pattern, of low frequencies alone, added to the whole image.

*Paper.* Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021
(arXiv 2104.03413): most triggers leave high frequencies that give them away; theirs is kept below a cut-off.

*Steps.*
1. Coefficients ~ N(0, 1) of the DCT for each channel, zero from ``cutoff`` half-periods a side on, no constant part.
2. The pattern: their inverse transform at the image's size, scaled to the largest value ``delta``/255.
3. x' = clip(x + pattern).

*Where we differ.* The paper optimises its pattern against a classifier under the constraint; ours is a random draw
under it, needs no classifier, and is the same pattern at every size. Cut-off and size are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attacks.dct import cosines
from unpoison.attacks.draws import draw_for_each, generator_of
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class LF:
    """``delta``: largest change in 8-bit grey levels, in (0, 255]. ``cutoff``: frequencies a side, 2 to 64.

    ``resample``: a new pattern for each sample id.
    """

    delta: float = 24.0
    cutoff: int = 4
    resample: bool = False

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 255:
            raise ConfigError(f"lf: delta must be in (0, 255], got {self.delta}.", hint="Try 24.")
        if not 2 <= self.cutoff <= 64:
            raise ConfigError(f"lf: cutoff must be 2 to 64, got {self.cutoff}.", hint="Try 4.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """(3) Images [b, 3, h, w] in [0, 1] plus the pattern, clipped.

        Raises UsageError when ``resample`` is on and there is not one id for each image.
        """
        height, width = int(images.shape[-2]), int(images.shape[-1])
        if self.resample:
            waves = draw_for_each(lambda g: _draw(g, self.cutoff, height, width), seed, ids, len(images), "lf")
        else:
            waves = pattern(seed, self.cutoff, height, width)[None]
        return (images + (self.delta / 255 * waves).to(images)).clamp_(0, 1)


@lru_cache(maxsize=16)
def pattern(seed: int, cutoff: int, height: int, width: int) -> Tensor:
    """The pattern [3, h, w] that all images share, in [-1, 1]."""
    return _draw(generator_of(seed), cutoff, height, width)


def _draw(generator: torch.Generator, cutoff: int, height: int, width: int) -> Tensor:
    """(1), (2): one pattern [3, h, w], its largest value 1 or -1 (all 0 for images of one pixel)."""
    weights = torch.randn(3, cutoff, cutoff, generator=generator, dtype=torch.float64)
    weights[:, 0, 0] = 0
    waves = cosines(height, cutoff).T @ weights @ cosines(width, cutoff)
    return (waves / waves.abs().max().clamp_min(1e-12)).float()
