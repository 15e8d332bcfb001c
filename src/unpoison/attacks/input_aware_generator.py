"""Input-aware's trigger: a pattern and a mask that two small networks make from each image itself.

*Paper.* Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020 (arXiv 2010.08138). x' = x + m(x) (p(x) - x)
with a pattern p and a mask m of the image's own; :mod:`unpoison.attacks.input_aware` trains both.

*Where we differ.* The networks are our own and small (three levels at 32 px, 15,380 weights for both), so that the
trained trigger fits into the manifest: half-precision safetensors in base64. Images of another size are scaled to 32 px
on their way in, pattern and mask on their way out (bilinear). They run in double precision, so that an image comes out
the same in any batch. Untrained, the weights are drawn from the seed.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from unpoison.attacks.draws import generator_of
from unpoison.errors import ConfigError
from unpoison.types import Images

SIZE = 32
LARGEST = 1 << 20  # bytes of weights that are read from a manifest
NETWORKS = {"pattern": 3, "mask": 1}
"""The two networks and the channels that they give."""
_WIDTHS = (16, 24)
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class InputAware:
    """``weights``: both networks as safetensors in base64; empty for newly drawn ones."""

    weights: str = ""

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if self.weights:
            decoded(self.weights)

    @classmethod
    def of(cls, weights: Weights) -> InputAware:
        """The trigger with these weights, rounded to half precision."""
        content = save({name: value.detach().cpu().half().contiguous() for name, value in weights.items()})
        return cls(weights=base64.b64encode(content).decode())

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1], each with its own pattern where its own mask is; the ids play no part."""
        weights = decoded(self.weights) if self.weights else drawn(seed)
        return triggered(images.double(), {name: w.to(images.device).double() for name, w in weights.items()}).to(
            images
        )


def triggered(images: Float[Tensor, "b 3 h w"], weights: Weights) -> Float[Tensor, "b 3 h w"]:
    """x + m (p - x); gradients flow to images and weights."""
    pattern, mask = pattern_and_mask(images, weights)
    return (images + mask * (pattern - images)).clamp(0, 1)


def pattern_and_mask(
    images: Float[Tensor, "b 3 h w"], weights: Weights
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]:
    """Both in [0, 1] at the images' size."""
    if not len(images):
        return images, images[:, :1]
    size = (int(images.shape[-2]), int(images.shape[-1]))
    small = images if size == (SIZE, SIZE) else F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    pattern, mask = (torch.sigmoid(_network(small, weights, name)) for name in NETWORKS)
    if size != (SIZE, SIZE):
        pattern, mask = (F.interpolate(made, size, mode="bilinear", antialias=True) for made in (pattern, mask))
    return pattern, mask


def _network(images: Tensor, weights: Weights, name: str) -> Tensor:
    """Down twice, up twice, with a skip in the middle: an hourglass without normalisation."""

    def layer(x: Tensor, number: int, stride: int = 1) -> Tensor:
        weight, bias = weights[f"{name}.{number}.weight"], weights[f"{name}.{number}.bias"]
        return F.conv2d(x, weight, bias, stride=stride, padding=1)

    wide = F.relu(layer(2 * images - 1, 0, 2))
    deep = F.relu(layer(wide, 1, 2))
    up = F.relu(layer(F.interpolate(deep, scale_factor=2), 2)) + wide
    return layer(F.interpolate(up, scale_factor=2), 3)


@lru_cache(maxsize=4)
def drawn(seed: int) -> dict[str, Tensor]:
    """New weights of both networks, N(0, 2 / fan-in); the mask starts near 0.1."""
    generator, weights = generator_of(seed), {}
    for name, shape in shapes().items():
        if name.endswith("bias"):
            weights[name] = torch.full(shape, -2.2 if name == "mask.3.bias" else 0.0)
        else:
            fan_in = shape[1] * shape[2] * shape[3]
            weights[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return weights


def shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of all weights."""
    first, second = _WIDTHS
    found: dict[str, tuple[int, ...]] = {}
    for name, last in NETWORKS.items():
        for number, (given, made) in enumerate(((3, first), (first, second), (second, first), (first, last))):
            found |= {f"{name}.{number}.weight": (made, given, 3, 3), f"{name}.{number}.bias": (made,)}
    return found


@lru_cache(maxsize=4)
def decoded(weights: str) -> dict[str, Tensor]:
    """Raises ConfigError for what are not the weights of these networks, or no finite numbers."""
    hint = "Train the trigger again."
    try:
        content = base64.b64decode(weights, validate=True)
        if len(content) > LARGEST:
            raise ValueError(f"{len(content)} bytes, at most {LARGEST}")
        found = load(content)
    except (binascii.Error, ValueError, SafetensorError) as error:
        raise ConfigError(f"input-aware: the weights are not safetensors in base64 ({error}).", hint=hint) from error
    wanted = shapes()
    if {name: tuple(value.shape) for name, value in found.items()} != wanted:
        raise ConfigError(f"input-aware: expected {len(wanted)} weights of known shapes, got others.", hint=hint)
    if not all(value.is_floating_point() and value.isfinite().all() for value in found.values()):
        raise ConfigError("input-aware: a weight is no finite number.", hint=hint)
    return found
