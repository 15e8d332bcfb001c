"""Learning rates as functions of the step, the rule that scales them to a model's size, and AdamW's two groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

REFERENCE_PARAMETERS = 100_000_000
"""Size, in parameters, of the models that published CLIP learning rates are meant for (RN50: 102 M, ViT-B/32: 151 M).
"""
RATE_EXPONENT = 0.65
SMALLEST_FACTOR, LARGEST_FACTOR = 1.0, 100 / 3


def warm_up(step: int, *, steps: int) -> float:
    """Factor in (0, 1] that rises linearly over the first ``steps`` steps and is 1 from then on."""
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


def linear(done: float, *, begin: float, end: float) -> float:
    """From ``begin`` at ``done`` = 0 to ``end`` at ``done`` = 1, and no further on either side."""
    return begin + (end - begin) * min(max(done, 0.0), 1.0)


def cosine(done: float, *, begin: float, end: float = 0.0) -> float:
    """Half a cosine from ``begin`` at ``done`` = 0 to ``end`` at ``done`` = 1, and no further on either side."""
    return end + (begin - end) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2


def warm_up_cosine(step: int, *, total: int, peak: float, warm_up_steps: int) -> float:
    """Linear warm-up to ``peak``, then half a cosine to zero at ``total`` steps; ``step`` counts from 0.

    A warm-up of more than a tenth of the run is cut to that, so that a short run reaches its peak.
    """
    rising = min(warm_up_steps, total // 10)
    if step < rising:
        return peak * warm_up(step, steps=rising)
    return cosine((step - rising) / max(1, total - rising), begin=peak)


def linear_then_cosine(step: int, *, total: int, peak: float, middle: float, end: float) -> float:
    """PAR's rate: linear from ``peak`` to ``middle`` over the first half, half a cosine on to ``end`` after it."""
    half = total / 2
    if step < half:
        return linear(step / half, begin=peak, end=middle)
    return cosine((step - half) / half, begin=middle, end=end)


def scaled_rate(published: float, parameters: int) -> float:
    """A learning rate published for CLIPs of about 100 M parameters, for a model of ``parameters`` parameters.

    Our choice, from two points: 3e-5 suits 100 M (PAR's paper), 1e-3 suits a convolutional CLIP of 0.46 M, while 3e-3
    collapses it. Between them a power of the size, (1e8 / parameters) ^ 0.65; larger models keep the published rate,
    smaller ones than 0.46 M get the factor of that size (33).
    """
    factor = (REFERENCE_PARAMETERS / max(1, parameters)) ** RATE_EXPONENT
    return published * min(max(factor, SMALLEST_FACTOR), LARGEST_FACTOR)


def set_rate(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    """One learning rate for all parameter groups."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for an optimiser: matrices and kernels decay, biases, norms and scalars do not.

    Norms, biases, class tokens and temperatures are the parameters of fewer than two dimensions.
    """
    entries = list(named)
    return [
        {"params": [value for _, value in entries if value.ndim >= 2], "weight_decay": weight_decay},
        {"params": [value for _, value in entries if value.ndim < 2], "weight_decay": 0.0},
    ]
