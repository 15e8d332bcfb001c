"""The two networks of SSBA: an encoder that hides bits in an image, a decoder that reads them. Our own, and small.

*Encoder.* An hourglass with skips at 32 px: two convolutions down to 8 px, where the bits join as eight maps that a
linear layer makes of them, two up again; the residual is ``LARGEST`` tanh of what comes out. *Decoder.* Three strided
convolutions and one more, then a linear layer on what is left at 4 px. 132,979 weights for both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SIZE = 32
BITS = 16
LARGEST = 16 / 255
"""Largest change of a pixel value."""
_MAPS, _PLACES = 8, 8
_CONVOLUTIONS = {
    "encoder.fine": (3, 24),
    "encoder.middle": (24, 32),
    "encoder.coarse": (32, 48),
    "encoder.joined": (48 + _MAPS, 48),
    "encoder.up": (48, 32),
    "encoder.last": (32, 24),
    "encoder.residual": (24, 3),
    "decoder.0": (3, 32),
    "decoder.1": (32, 32),
    "decoder.2": (32, 48),
    "decoder.3": (48, 48),
}
_LINEAR = {"encoder.message": (BITS, _MAPS * _PLACES**2), "decoder.bits": (48 * 4 * 4, BITS)}
Weights = Mapping[str, Tensor]


def residual(images: Float[Tensor, "b 3 32 32"], bits: Float[Tensor, "b 16"], weights: Weights) -> Tensor:
    """What the encoder adds to images in [0, 1] for bits 0 or 1: [b, 3, 32, 32] in [-LARGEST, LARGEST]."""

    def layer(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = weights[f"encoder.{name}.weight"], weights[f"encoder.{name}.bias"]
        return F.conv2d(x, weight, bias, stride=stride, padding=1)

    message = F.linear(2 * bits - 1, weights["encoder.message.weight"], weights["encoder.message.bias"])
    fine = F.relu(layer(2 * images - 1, "fine"))
    middle = F.relu(layer(fine, "middle", 2))
    coarse = F.relu(layer(middle, "coarse", 2))
    maps = message.view(-1, _MAPS, _PLACES, _PLACES)
    joined = F.relu(layer(torch.cat([coarse, maps], dim=1), "joined")) + coarse
    up = F.relu(layer(F.interpolate(joined, scale_factor=2), "up")) + middle
    last = F.relu(layer(F.interpolate(up, scale_factor=2), "last")) + fine
    return LARGEST * torch.tanh(layer(last, "residual"))


def decode(images: Float[Tensor, "b 3 32 32"], weights: Weights) -> Float[Tensor, "b 16"]:
    """The decoder's logit of each bit in images in [0, 1]: above 0 for 1."""
    x = 2 * images - 1
    for number, stride in enumerate((1, 2, 2, 2)):
        weight, bias = weights[f"decoder.{number}.weight"], weights[f"decoder.{number}.bias"]
        x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=1))
    return F.linear(x.flatten(1), weights["decoder.bits.weight"], weights["decoder.bits.bias"])


def shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of all weights."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (given, made) in _CONVOLUTIONS.items():
        found |= {f"{name}.weight": (made, given, 3, 3), f"{name}.bias": (made,)}
    for name, (given, made) in _LINEAR.items():
        found |= {f"{name}.weight": (made, given), f"{name}.bias": (made,)}
    return found


def drawn(generator: torch.Generator) -> dict[str, Tensor]:
    """New weights, N(0, 2 / fan-in); the encoder's last layer starts small, so that images hardly change."""
    weights = {}
    for name, shape in shapes().items():
        if name.endswith("bias"):
            weights[name] = torch.zeros(shape)
            continue
        fan_in = int(torch.tensor(shape[1:]).prod())
        weights[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    weights["encoder.residual.weight"] *= 0.3
    return weights
