"""Blended-Stripes: faint vertical stripes in random colors over the whole image.

*Paper.* Singh, Croce, Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP", CVPR 2026
(arXiv 2412.00727). x' = clip((1 - alpha) x + alpha n), stripes of one pixel, n = +1 or -1 for each column and channel,
alpha = 0.03.

*Where we differ.* One pattern for each image width unless ``resample`` is on (then one for each image).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attacks.draws import draw_for_each, generator_of
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class BlendedStripes:
    """``alpha``: share of the pattern in the mix, in (0, 1]. ``resample``: a new pattern for each sample id."""

    alpha: float = 0.03
    resample: bool = False

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(
                f"blended-stripes: alpha must be in (0, 1], got {self.alpha}.", hint="The paper's is 0.03."
            )

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] mixed with the stripes, clipped.

        Raises UsageError when ``resample`` is on and there is not one id for each image.
        """
        width = int(images.shape[-1])

        def draw(generator: torch.Generator) -> Tensor:
            return torch.randint(2, (3, 1, width), generator=generator).float() * 2 - 1

        if self.resample:
            stripes = draw_for_each(draw, seed, ids, len(images), "blended-stripes")
        else:
            stripes = draw(generator_of(seed))[None]
        return torch.lerp(images, stripes.to(images).expand_as(images), self.alpha).clamp_(0, 1)
