"""SIG: a faint vertical sinusoid over the whole image, put only on samples of the target class.

*Paper.* Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning",
ICIP 2019 (arXiv 1902.11237). x' = clip(x + delta/255 sin(2 pi f j / m)) for column j of m, every row and channel alike;
delta 40 and f 6 for classifiers, delta 60 for CLIP. Clean-label: the labels stay as they are.

*Checked against published tensors.* The CLIP backdoors' noise (256 x 256) equals the formula with delta 60, f 6 on its
224 columns, and is zero beyond them: the images there are 224 px wide. ABL's 32 px mask is a sinusoid of the same
orientation with delta 20 and 0.8 radians a column (f = 4.07 at 32 px), truncated to integers and stored in unsigned
bytes, so that its negative half wraps around to 236..255; we follow the paper's formula there, not the wrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class SIG:
    """``delta``: amplitude in 8-bit grey levels, in (0, 255]. ``f``: periods over the image's width, above 0."""

    delta: float = 40.0
    f: float = 6.0

    modes: ClassVar[tuple[str, ...]] = ("clean-label", "all-to-one", "all-to-all")

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 255:
            raise ConfigError(f"sig: delta must be in (0, 255], got {self.delta}.", hint="The paper's is 40.")
        if not (self.f > 0 and math.isfinite(self.f)):
            raise ConfigError(f"sig: f must be above 0, got {self.f}.", hint="The paper's is 6.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] plus the signal, clipped; the seed and the ids play no part."""
        return (images + self.signal(images.shape[-1]).to(images)).clamp_(0, 1)

    def signal(self, width: int) -> Float[Tensor, " width"]:
        """delta/255 sin(2 pi f j / width) for each column j."""
        columns = torch.arange(width, dtype=torch.float64)
        return (self.delta / 255 * torch.sin(2 * torch.pi * self.f * columns / width)).float()
