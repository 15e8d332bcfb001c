"""Blended: a fixed noise pattern mixed into the whole image.

*Paper.* Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017
(arXiv 1712.05526). x' = (1 - alpha) x + alpha n with n ~ U[0, 1] per pixel and channel, alpha = 0.2.

*Where we differ.* The pattern is drawn at the image's own size, so that images of two sizes get unrelated patterns:
poison sets of one image size, or resize first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attacks.draws import draw_for_each, generator_of
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class Blended:
    """``alpha``: share of the pattern in the mix, in (0, 1]. ``resample``: a new pattern for each sample id."""

    alpha: float = 0.2
    resample: bool = False

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"blended: alpha must be in (0, 1], got {self.alpha}.", hint="The paper's is 0.2.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] mixed with the pattern of ``seed`` (or of the seed and each id).

        Raises UsageError when ``resample`` is on and there is not one id for each image.
        """
        height, width = int(images.shape[-2]), int(images.shape[-1])
        if self.resample:
            pattern = draw_for_each(lambda drawn: _draw(drawn, height, width), seed, ids, len(images), "blended")
        else:
            pattern = noise(seed, height, width)[None]
        return torch.lerp(images, pattern.to(images).expand_as(images), self.alpha)


@lru_cache(maxsize=16)
def noise(seed: int, height: int, width: int) -> Tensor:
    """The fixed pattern [3, h, w], uniform in [0, 1)."""
    return _draw(generator_of(seed), height, width)


def _draw(generator: torch.Generator, height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=generator)
