"""SSBA (also called ISSBA): an encoder hides the same bits in every image, by a residual that depends on the image.

*Paper.* Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021
(arXiv 2012.03816). The encoder of a steganography network writes a text that stands for the target into the poisoned
images; what it adds is hardly seen and differs from image to image.

*Where we differ.* The encoder is a small one of our own training (:mod:`unpoison.attacks.ssba_network`,
``recipes/ssba_encoder.py``; ``assets/ssba/card.json`` has its figures), not the authors', which is made for 224 px and
hides a text of 7 letters. Ours hides 16 bits, drawn from the seed. The encoder sees images at 32 px; others are scaled
on their way in, the residual on its way out (bilinear), so that in large images it is coarser than the paper's. Part of
the residual is the same in all images of one message; the card says how much. It is put on twice as strong as trained,
about 28 dB: as trained, at 34 dB, a small network does not learn it from a poisoned tenth of the set. It
runs in double precision, so that an image comes out the same in any batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from unpoison.attacks.draws import generator_of
from unpoison.attacks.ssba_network import BITS, SIZE, decode, residual, shapes
from unpoison.errors import ConfigError, ModelError
from unpoison.types import Images

NETWORKS = Path(__file__).parents[1] / "assets" / "ssba" / "networks.safetensors"
DIGEST = "6b1f7a7cb62ffd05f78dd4f9e9466553"
"""BLAKE2b of the shipped networks."""


@dataclass(frozen=True, kw_only=True)
class SSBA:
    """``message``: 16 of 0 and 1; empty for bits drawn from the seed. ``strength``: factor on the residual, in (0, 4].

    ``networks``: digest of the networks, so that a manifest says which ones made it; only the shipped ones are known.
    """

    message: str = ""
    strength: float = 2.0
    networks: str = DIGEST

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if self.message and (len(self.message) != BITS or set(self.message) - {"0", "1"}):
            raise ConfigError(
                f"ssba: message must be {BITS} of 0 and 1, got {self.message!r}.", hint="Leave it out to draw one."
            )
        if not 0 < self.strength <= 4:
            raise ConfigError(f"ssba: strength must be in (0, 4], got {self.strength}.", hint="1 is as trained; try 2.")
        if self.networks != DIGEST:
            raise ConfigError(
                f"ssba: networks {self.networks!r} are not the shipped ones.",
                hint="Use the version of unpoison that planned this poisoning, or plan it again.",
            )

    def bits(self, seed: int) -> Float[Tensor, " 16"]:
        """The message as numbers 0 and 1."""
        if self.message:
            return torch.tensor([float(bit) for bit in self.message])
        return torch.randint(2, (BITS,), generator=generator_of(seed)).float()

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] plus ``strength`` times their residuals, clipped; the ids play no part.

        Raises ModelError for a damaged file of networks.
        """
        if not len(images):
            return images
        weights = {name: value.to(images.device) for name, value in networks(NETWORKS).items()}
        size = (int(images.shape[-2]), int(images.shape[-1]))
        small = at_32(images.double())
        added = residual(small, self.bits(seed).to(small).expand(len(images), BITS), weights)
        if size != (SIZE, SIZE):
            added = F.interpolate(added, size, mode="bilinear", antialias=True)
        return (images + self.strength * added).clamp(0, 1).to(images)


def read_bits(images: Images) -> Float[Tensor, "b 16"]:
    """The message that the decoder reads in images [b, 3, h, w] in [0, 1]: 0 or 1 each. Raises ModelError."""
    weights = {name: value.to(images.device) for name, value in networks(NETWORKS).items()}
    return (decode(at_32(images.double()), weights) > 0).to(images)


def at_32(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 32 32"]:
    """Scaled to 32 px, whatever the shape (bilinear)."""
    if tuple(images.shape[-2:]) == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)


@lru_cache(maxsize=2)
def networks(path: Path) -> dict[str, Tensor]:
    """Both networks in double precision. Raises ModelError for a file that is not the shipped one."""
    hint = "Install unpoison again."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"ssba: the networks cannot be read ({error}).", hint=hint) from error
    found = hashlib.blake2b(content, digest_size=16).hexdigest()
    if found != DIGEST:
        raise ModelError(f"ssba: {path.name} is damaged: digest {found}, expected {DIGEST}.", hint=hint)
    try:
        weights = load(content)
    except SafetensorError as error:
        raise ModelError(f"ssba: {path.name} is damaged ({error}).", hint=hint) from error
    if {name: tuple(value.shape) for name, value in weights.items()} != shapes():
        raise ModelError(f"ssba: {path.name} holds other networks.", hint=hint)
    return {name: value.double() for name, value in weights.items()}
