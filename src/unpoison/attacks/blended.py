"""Blended: a fixed pattern mixed into the whole image, noise or a given picture.

*Paper.* Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017
(arXiv 1712.05526). x' = (1 - alpha) x + alpha n, alpha = 0.2, with n a given picture or, where none is given, U[0, 1]
per pixel and channel. With a mask m in [0, 1] of where the picture shows: x' = (1 - alpha m) x + alpha m n; at alpha 1
that is the mask and pattern of reverse-engineered triggers.

*Checked against published tensors.* The mixes with the Hello Kitty picture (256 px) and with the mask and pattern of
"birthday cake" (224 px), a natural backdoor of CC3M, are the tensors' own but for their rounding to 8 bits.

*Where we differ.* A picture is scaled to the image's size. Noise is drawn at that size, so that images of two sizes get
unrelated noise: poison sets of one image size, or resize first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.badclip_patch import decoded, encoded
from unpoison.attacks.draws import draw_for_each, generator_of
from unpoison.attacks.patterns import scaled
from unpoison.errors import ConfigError
from unpoison.types import Images

_READ = "Read the picture again: unpoison.attacks.patterns.read_pattern."


@dataclass(frozen=True, kw_only=True)
class Blended:
    """``alpha``: share of the pattern in the mix, in (0, 1]. ``resample``: new noise for each sample id.

    ``pattern``: a picture in the place of noise, and ``mask``: where it shows and how much; squares of 8-bit RGB in
    base64, as :meth:`of` makes them of what :func:`~unpoison.attacks.patterns.read_pattern` reads.
    """

    alpha: float = 0.2
    resample: bool = False
    pattern: str = ""
    mask: str = ""

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"blended: alpha must be in (0, 1], got {self.alpha}.", hint="The paper's is 0.2.")
        for content in filter(None, (self.pattern, self.mask)):
            decoded(content, "blended", _READ)
        if self.resample and self.pattern:
            raise ConfigError("blended: a given pattern is not drawn anew.", hint="Leave resample or pattern out.")
        if self.mask and not self.pattern:
            raise ConfigError("blended: a mask is for a given pattern.", hint="Give a pattern too.")

    @classmethod
    def of(
        cls, pattern: Float[Tensor, "3 s s"], mask: Float[Tensor, "3 t t"] | None = None, alpha: float = 0.2
    ) -> Blended:
        """The trigger with this picture in [0, 1] and, if given, this mask, rounded to 8 bits."""
        return cls(alpha=alpha, pattern=encoded(pattern), mask="" if mask is None else encoded(mask))

    def __repr__(self) -> str:
        # fingerprints of poisoned sets hold it: noise is told as it was before pictures were known
        given = f", pattern={self.pattern!r}, mask={self.mask!r}" if self.pattern else ""
        return f"Blended(alpha={self.alpha!r}, resample={self.resample!r}{given})"

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] mixed with the pattern of ``seed`` (or of the seed and each id).

        Raises UsageError when ``resample`` is on and there is not one id for each image.
        """
        height, width = int(images.shape[-2]), int(images.shape[-1])
        if self.pattern:
            pattern = scaled(decoded(self.pattern, "blended", _READ), height, width).to(images)
            share = self.alpha
            if self.mask:
                share = self.alpha * scaled(decoded(self.mask, "blended", _READ), height, width).to(images)
            return images + share * (pattern - images)
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
