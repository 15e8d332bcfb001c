"""WaNet: the whole image is warped by a small displacement field.

*Paper.* Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021 (arXiv 2102.10369). A control
grid of k x k displacements ~ U[-1, 1], divided by their mean size, is scaled up (bicubic); image coordinates run from
-1 to 1; each pixel is read at its own coordinate + s x displacement / image size, kept inside the image (bilinear).
Classifiers: k = 4, s = 0.5. CLIP: k = 224 at 224 px (a displacement of its own for each pixel), s = 1.

*Checked against published tensors.* The CLIP backdoor's displacements (224 px) and warped coordinates (256 px) have the
distribution of ours: mean size 1, at most 2, and coordinates that leave the image are moved to its edge.

*Where we differ.* No noise mode: the classifier's training trick (cross ratio 2: samples warped by other fields keep
their label) needs control of training, not only of data.
``resample`` draws a field for each image; the papers keep one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.draws import draw_for_each, generator_of
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class WaNet:
    """``k``: control points a side, None for one a pixel. ``s``: strength. ``resample``: a field for each id."""

    k: int | None = None
    s: float = 1.0
    resample: bool = False

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if self.k is not None and not 2 <= self.k <= 4096:
            raise ConfigError(f"wanet: k must be 2 to 4096, got {self.k}.", hint="Leave it out, or use the paper's 4.")
        if not 0 < self.s <= 1e4:
            raise ConfigError(f"wanet: s must be in (0, 10000], got {self.s}.", hint="The papers' are 0.5 and 1.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1], warped.

        Raises UsageError when ``resample`` is on and there is not one id for each image.
        """
        height, width, k = int(images.shape[-2]), int(images.shape[-1]), self.k or 0
        if self.resample:
            fields = draw_for_each(
                lambda generator: _draw(generator, k, height, width), seed, ids, len(images), "wanet"
            )
        else:
            fields = field(seed, k, height, width)[None]
        grid = warped_coordinates(fields.to(images.device), self.s).to(images.dtype)
        grid = grid.expand(len(images), height, width, 2)
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
