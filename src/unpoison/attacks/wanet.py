"""WaNet: the whole image is warped by a small displacement field.

*Paper.* Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021 (arXiv 2102.10369). A control
grid of k x k displacements ~ U[-1, 1], divided by their mean size, is scaled up (bicubic); image coordinates run from
-1 to 1; each pixel is read at its own coordinate + s x displacement / image size, kept inside the image (bilinear).
Classifiers: k = 4, s = 0.5. CLIP: k = 224 at 224 px (a displacement of its own for each pixel), s = 1.

*Checked against published tensors.* The CLIP backdoor's displacements (224 px) and warped coordinates (256 px) have the
distribution of ours: mean size 1, at most 2, and coordinates that leave the image are moved to its edge.

*Noise mode.* The classifier's training also shows images warped by the field plus noise of their own, U[-1, 1] / image
size at each pixel, which keep their label; cross ratio 2: two of them for each poisoned image. Ours are ``covers`` of
the poisoning, none by default, and drawn once, where the paper draws new ones for each batch; cover 2/3 is the cross
ratio 2.

*Where we differ.* Defaults are the setting for CLIPs; k 4, s 0.5 and cover 2/3 are the classifiers'.
``resample`` draws a field for each image; the papers keep one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.draws import draw_for_each, generator_of, seed_of
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class WaNet:
    """``k``: control points a side, None for one a pixel. ``s``: strength. ``resample``: a field for each id.

    ``cover``: share of the triggered training samples that are warped with noise and keep their label, in [0, 1).
    """

    k: int | None = None
    s: float = 1.0
    resample: bool = False
    cover: float = dataclasses.field(default=0.0, repr=False)  # what is put on the other samples does not depend on it

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if self.k is not None and not 2 <= self.k <= 4096:
            raise ConfigError(f"wanet: k must be 2 to 4096, got {self.k}.", hint="Leave it out, or use the paper's 4.")
        if not 0 < self.s <= 1e4:
            raise ConfigError(f"wanet: s must be in (0, 10000], got {self.s}.", hint="The papers' are 0.5 and 1.")
        if not 0 <= self.cover < 1:
            raise ConfigError(f"wanet: cover must be in [0, 1), got {self.cover}.", hint="The paper's is 2/3.")

    def covering(self) -> NoisyWarp:
        """The trigger as covers show it."""
        return NoisyWarp(warp=self)

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1], warped.

        Raises UsageError when ``resample`` is on and there is not one id for each image.
        """
        return read_at(images, self.coordinates(images, seed, ids))

    def coordinates(self, images: Images, seed: int, ids: Sequence[str] | None) -> Float[Tensor, "f h w 2"]:
        """Where each pixel is read, for all images or for each."""
        height, width, k = int(images.shape[-2]), int(images.shape[-1]), self.k or 0
        if self.resample:
            fields = draw_for_each(
                lambda generator: _draw(generator, k, height, width), seed, ids, len(images), "wanet"
            )
        else:
            fields = field(seed, k, height, width)[None]
        return warped_coordinates(fields.to(images.device), self.s)


@dataclass(frozen=True, kw_only=True)
class NoisyWarp:
    """The warp and noise of its own for each sample id: up to a pixel's share of the image at each pixel."""

    warp: WaNet

    modes: ClassVar[tuple[str, ...]] = WaNet.modes

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1], warped. Raises UsageError when there is not one id for each image."""
        height, width = int(images.shape[-2]), int(images.shape[-1])

        def draw(generator: torch.Generator) -> Tensor:
            return torch.rand(height, width, 2, generator=generator) * 2 - 1

        noise = draw_for_each(draw, seed_of(seed, "noise"), ids, len(images), "wanet").to(images.device)
        grid = self.warp.coordinates(images, seed, ids) + noise / noise.new_tensor([width, height])
        return read_at(images, grid.clamp(-1, 1))


def read_at(images: Images, grid: Float[Tensor, "f h w 2"]) -> Images:
    """Each pixel read at its coordinates in ``grid`` (bilinear)."""
    grid = grid.to(images.dtype).expand(len(images), *images.shape[-2:], 2)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=True).clamp(0, 1)


def warped_coordinates(fields: Float[Tensor, "f h w 2"], s: float) -> Float[Tensor, "f h w 2"]:
    """clip(own coordinate + s x displacement / size, -1, 1); the last axis is (column, row)."""
    _, height, width, _ = fields.shape
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    own = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(fields)
    return (own + s * fields / fields.new_tensor([width, height])).clamp(-1, 1)


@lru_cache(maxsize=16)
def field(seed: int, k: int, height: int, width: int) -> Float[Tensor, "h w 2"]:
    """The displacements that all images share; ``k`` 0 for one control point a pixel."""
    return _draw(generator_of(seed), k, height, width)


def _draw(generator: torch.Generator, k: int, height: int, width: int) -> Tensor:
    control = torch.rand(1, 2, k or height, k or width, generator=generator) * 2 - 1
    control = control / control.abs().mean().clamp_min(1e-6)
    if k:
        control = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
    return control[0].permute(1, 2, 0)
