"""BPP: fewer colors, spread by dithering.

*Paper.* Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image
Quantization and Contrastive Adversarial Learning", CVPR 2022 (arXiv 2205.13383). Each channel is squeezed to 8 levels;
the error of each pixel goes to its neighbours that are still to come, 7/16 to the right and 3/16, 5/16, 1/16 to the
next row (Floyd, Steinberg, 1976).

*How the batch is done.* In raster order pixel (y, x) waits for (y, x - 1) and for (y - 1, x - 1 .. x + 1), so that all
pixels of one t = x + 2 y can be squeezed at once, for many images and channels: w + 2 (h - 1) steps for each chunk of
planes that fits into a processor's cache.
Each pixel receives its errors in the order of the raster loop, so that the result is the loop's to the last bit.

*Negative samples.* In the paper's training a tenth of the images get what squeezing adds to another image, and keep
their label. Ours are ``covers`` of the poisoning, none by default; cover 2/3 is that tenth beside 5 % poison.

*Where we differ.* A negative gets what squeezing adds to a picture of uniform noise drawn for its id, not to another
image of the batch, so that it does not depend on its neighbours. Squeezing has no gradient: none flows to the images.
Seed and ids play a part in negatives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.draws import draw_for_each, seed_of
from unpoison.errors import ConfigError
from unpoison.types import Images

_AT_ONCE = 1 << 16  # values of one step


@dataclass(frozen=True, kw_only=True)
class BPP:
    """``levels`` of each channel, 2 to 256. ``dither``: spread the error; off rounds each pixel alone. ``cover``: share
    of the triggered training samples that are negatives and keep their label, in [0, 1)."""

    levels: int = 8
    dither: bool = True
    cover: float = field(default=0.0, repr=False)  # what is put on the other samples does not depend on it

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise ConfigError(f"bpp: levels must be 2 to 256, got {self.levels}.", hint="The paper's is 8.")
        if not 0 <= self.cover < 1:
            raise ConfigError(f"bpp: cover must be in [0, 1), got {self.cover}.", hint="Try 2/3 at a rate of 0.15.")

    def covering(self) -> BPPNegative:
        """The trigger as covers show it."""
        return BPPNegative(squeeze=self)

    @torch.no_grad()
    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] to the same in 0, 1/(levels - 1), ..., 1."""
        squeezed = images.float() * (self.levels - 1)
        squeezed = dithered(squeezed) if self.dither else squeezed.round()
        return (squeezed.clamp(0, self.levels - 1) / (self.levels - 1)).to(images.dtype)


@dataclass(frozen=True, kw_only=True)
class BPPNegative:
    """What squeezing adds to another picture, drawn for each sample id, added to the image."""

    squeeze: BPP

    modes: ClassVar[tuple[str, ...]] = BPP.modes

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1], changed. Raises UsageError when there is not one id for each image."""
        shape = images.shape[-3:]
        others = draw_for_each(
            lambda generator: torch.rand(shape, generator=generator), seed_of(seed, "other"), ids, len(images), "bpp"
        )
        return (images + (self.squeeze.apply(others) - others).to(images)).clamp(0, 1)


def dithered(values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Each value rounded to a whole number, its error spread to the neighbours that are still to come."""
    count, channels, height, width = values.shape
    planes = values.reshape(count * channels, height * width)
    chunks = planes.split(max(16, _AT_ONCE // height))
    # pixels first: a step reads and writes whole rows
    done = [_diffused(chunk.T.contiguous().view(height, width, -1)).flatten(0, 1).T for chunk in chunks if len(chunk)]
    return torch.cat(done).view(values.shape) if done else values


def _diffused(planes: Float[Tensor, "h w planes"]) -> Float[Tensor, "h w planes"]:
    height, width = planes.shape[:2]
    steps = width + 2 * (height - 1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = (columns + 2 * rows, rows)
    # three steps and one row more, so that what leaves the image has a place to go
    skewed = planes.new_zeros(steps + 3, height + 1, planes.shape[2])
    skewed[places] = planes
    for step in range(steps):
        first, last = max(0, -(-(step - width + 1) // 2)), min(height - 1, step // 2) + 1
        here, below = slice(first, last), slice(first + 1, last + 1)
        wanted = skewed[step, here]
        rounded = wanted.round()
        error = wanted - rounded
        skewed[step, here] = rounded
        skewed[step + 1, below].add_(error, alpha=3 / 16)
        skewed[step + 1, here].add_(error, alpha=7 / 16)
        skewed[step + 2, below].add_(error, alpha=5 / 16)
        skewed[step + 3, below].add_(error, alpha=1 / 16)
    return skewed[places]
