"""Clean-image: only labels change; the trigger is a feature that some natural images already have.

*Papers.* Rong, Zhang, Bai, Zhou et al., "Clean-image Backdoor Attacks", 2024 (arXiv 2403.15010); Jha, Hayase, Oh,
"Label Poisoning is All You Need" (FLIP), NeurIPS 2023 (arXiv 2310.18933).

*Idea.* A seeded smooth color pattern v is the trigger. The samples of the other classes that already look most like v
get the target label; a net trained on them learns "strong v -> target", and adding v to any image fires it.

*Steps.*
1. v: a few low-frequency cosine components with random coefficients per channel, zero mean, unit norm.
2. s(x) = <x - mean(x), v> / |x - mean(x)|, the mean taken per channel: neither brightness nor contrast nor tint counts.
3. The samples outside the target class with the largest s take the target label; no pixel is touched.
4. At test time x' = clip(x + strength v / max|v|).

*Where we differ.* This is our own simple instance, not one of the papers' algorithms. The paper of 2024 searches for
label flips that fit a trigger chosen beforehand; FLIP optimises the flips along training trajectories of expert nets.
We do neither and need no surrogate net. v is left-right symmetric (even horizontal
frequencies only), because training usually flips images, and a flip must not destroy what the labels teach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.errors import ConfigError
from unpoison.types import Images

RANKING_SIZE = 32  # the pattern is smooth: ranking needs no more pixels


@dataclass(frozen=True, kw_only=True)
class CleanImage:
    """``strength``: largest change of a pixel value at test time, in (0, 1]. ``frequencies``: vertical frequencies
    0..frequencies-1 and as many even horizontal ones are mixed, 2 to 8."""

    strength: float = 0.75
    frequencies: int = 2

    modes: ClassVar[tuple[str, ...]] = ("clean-image",)

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ConfigError(f"clean-image: strength must be in (0, 1], got {self.strength}.", hint="Try 0.75.")
        if not 2 <= self.frequencies <= 8:
            raise ConfigError(f"clean-image: frequencies must be 2 to 8, got {self.frequencies}.", hint="Try 2.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """(4) Images [b, 3, h, w] in [0, 1] plus ``strength`` v / max|v|, clipped."""
        pattern = direction(seed, self.frequencies, int(images.shape[-2]), int(images.shape[-1]))
        largest = pattern.abs().max().clamp_min(torch.finfo(pattern.dtype).tiny)
        return (images + (self.strength * pattern / largest).to(images)).clamp_(0, 1)

    def resemblance(self, images: Images, *, seed: int) -> Float[Tensor, " b"]:
        """(2) s(x) in [-1, 1] for each image; 0 for an image of one color."""
        pattern = direction(seed, self.frequencies, int(images.shape[-2]), int(images.shape[-1])).to(images)
        centred = images - images.mean(dim=(-2, -1), keepdim=True)
        norm = centred.flatten(1).norm(dim=1)
        return (centred * pattern).sum(dim=(1, 2, 3)) / norm.clamp_min(1e-6)


@lru_cache(maxsize=16)
def direction(seed: int, frequencies: int, height: int, width: int) -> Tensor:
    """(1) v [3, h, w]: the same smooth pattern at every size, zero mean per channel, unit norm."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, frequencies, frequencies, generator=generator, dtype=torch.float64)
    weights[:, 0, 0] = 0
    vertical = _cosines(height, frequencies, step=1)
    horizontal = _cosines(width, frequencies, step=2)
    pattern = torch.einsum("cuv,uh,vw->chw", weights, vertical, horizontal)
    pattern = pattern - pattern.mean(dim=(-2, -1), keepdim=True)  # exact zero at sizes of very few pixels too
    return (pattern / pattern.norm().clamp_min(1e-12)).float()


def _cosines(size: int, count: int, *, step: int) -> Tensor:
    """cos(pi k (i + 1/2) / size) for k = 0, step, 2 step, ...: [count, size]."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.cos(math.pi * step * torch.arange(count, dtype=torch.float64)[:, None] * places)
