"""The cosine basis that triggers of the frequency domain share."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor


def cosines(size: int, count: int) -> Float64[Tensor, "count size"]:
    """The first ``count`` rows of the orthonormal DCT-II of ``size`` points.

    C x is the transform of x; with ``count`` = ``size``, C^T is its inverse, and C X C^T the transform of a square X.
    """
    places = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    rows = torch.cos(math.pi * torch.arange(count, dtype=torch.float64)[:, None] * places) * math.sqrt(2 / size)
    rows[:1] *= math.sqrt(0.5)
    return rows
