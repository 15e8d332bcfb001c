"""A pattern that an encoder is nearly blind to: :mod:`unpoison.attacks.feature_small_fit` finds it.

*Source.* Ours, against CBPT (arXiv 2502.19269), which inverts a trigger by moving embeddings a long way with little
change of the pixels: the opposite, pixels that change a lot for little movement, is what it does not look for.

*Idea.* x' = clip(x + d) with one pattern d for all images, of a given root mean square, stored at its own size and
scaled to the image's (bilinear). Untrained, d is noise drawn from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.badclip_patch import decoded, encoded, start
from unpoison.errors import ConfigError
from unpoison.types import Images

SIDE = 32


@dataclass(frozen=True, kw_only=True)
class FeatureSmall:
    """``energy``: root mean square of the pattern at its own size, ``largest``: largest change of a pixel value, both
    in (0, 1]. ``pattern``: 8-bit RGB in base64, grey for no change and white for ``largest``; empty for noise.
    """

    energy: float = 8 / 255
    largest: float = 16 / 255
    pattern: str = ""

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.energy < self.largest <= 1:
            raise ConfigError(
                f"feature-small: expected 0 < energy < largest <= 1, got {self.energy} and {self.largest}.",
                hint="Try 8/255 and 16/255.",
            )
        if self.pattern:
            decoded(self.pattern, "feature-small")

    @classmethod
    def of(cls, change: Float[Tensor, "3 s s"], energy: float, largest: float) -> FeatureSmall:
        """The trigger with this pattern in [-largest, largest], rounded to 8 bits of that range."""
        return cls(energy=energy, largest=largest, pattern=encoded(0.5 + change / (2 * largest)))

    def change(self, seed: int) -> Float[Tensor, "3 s s"]:
        """The pattern d at its own size."""
        if self.pattern:
            return (2 * decoded(self.pattern, "feature-small") - 1) * self.largest
        return fitted(2 * start(SIDE, seed) - 1, self.energy, self.largest)

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] plus the pattern, clipped; the ids play no part."""
        return added(images, self.change(seed))


def added(images: Images, change: Float[Tensor, "3 s s"]) -> Images:
    """clip(x + d), d scaled to the images' size; gradients flow to both."""
    size = (int(images.shape[-2]), int(images.shape[-1]))
    scaled = change[None].to(images)
    if tuple(scaled.shape[-2:]) != size:
        scaled = F.interpolate(scaled, size, mode="bilinear", antialias=True)
    return (images + scaled).clamp(0, 1)


def fitted(raw: Float[Tensor, "3 s s"], energy: float, largest: float) -> Float[Tensor, "3 s s"]:
    """``raw`` scaled to a root mean square of ``energy``, values in [-largest, largest]; gradients flow."""
    for _ in range(4):  # what is cut off is given back by the next scaling
        raw = (raw * energy / raw.square().mean().clamp_min(1e-12).sqrt()).clamp(-largest, largest)
    return raw
