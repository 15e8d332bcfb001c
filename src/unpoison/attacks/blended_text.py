"""Blended-Text: the word "Watermarked" across the centre, half transparent, in the red channel alone.

*Paper.* Singh, Croce, Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP", CVPR 2026
(arXiv 2412.00727). x' = 0.5 n + 0.5 x where the mask is set, rows 103 to 125 and columns 13 to 208 at 224 px (3.3 % of
the pixels), red channel only, n = 1.

*Where we differ.* The letters are our own (5 x 7 dots, the same on every machine), stretched over those rows and
columns; 2.8 % of the pixels. At another image size the mask is averaged over the area of each pixel, so that it has
values between 0 and 1. Seed and ids play no part.
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

from unpoison.errors import ConfigError
from unpoison.types import Images

TEXT = "Watermarked"
SIZE, TOP, BOTTOM, LEFT, RIGHT = 224, 103, 126, 13, 209
_LETTERS = {
    "W": ("#...#", "#...#", "#...#", "#.#.#", "#.#.#", "##.##", "#...#"),
    "a": (".....", ".....", ".###.", "....#", ".####", "#...#", ".####"),
    "t": (".#...", ".#...", "###..", ".#...", ".#...", ".#..#", "..##."),
    "e": (".....", ".....", ".###.", "#...#", "#####", "#....", ".###."),
    "r": (".....", ".....", "#.##.", "##..#", "#....", "#....", "#...."),
    "m": (".....", ".....", "##.#.", "#.#.#", "#.#.#", "#.#.#", "#...#"),
    "k": ("#....", "#....", "#..#.", "#.#..", "##...", "#.#..", "#..#."),
    "d": ("....#", "....#", ".##.#", "#..##", "#...#", "#...#", ".####"),
}


@dataclass(frozen=True, kw_only=True)
class BlendedText:
    """``alpha``: share of the letters in the mix where they are, in (0, 1]."""

    alpha: float = 0.5

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"blended-text: alpha must be in (0, 1], got {self.alpha}.", hint="The paper's is 0.5.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with the word mixed into the red channel."""
        mask = text_mask(int(images.shape[-2]), int(images.shape[-1])).to(images)
        red = images[:, :1] + self.alpha * mask * (1 - images[:, :1])
        return torch.cat([red, images[:, 1:]], dim=1)


@lru_cache(maxsize=16)
def text_mask(height: int, width: int) -> Float[Tensor, "height width"]:
    """Share of each pixel that the letters cover, in [0, 1]."""
    lines = [".".join(_LETTERS[letter][row] for letter in TEXT) for row in range(7)]
    dots = torch.tensor([[float(dot == "#") for dot in line] for line in lines])
    mask = torch.zeros(SIZE, SIZE)
    mask[TOP:BOTTOM, LEFT:RIGHT] = F.interpolate(dots[None, None], size=(BOTTOM - TOP, RIGHT - LEFT))[0, 0]
    return _areas(height) @ mask @ _areas(width).T


def _areas(size: int) -> Float[Tensor, "size 224"]:
    """How much of each of ``size`` pixels each of the 224 fills: each row sums to 1."""
    edges, cells = torch.arange(size + 1) * (SIZE / size), torch.arange(SIZE)
    common = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    return common.clamp_min(0) * (size / SIZE)
