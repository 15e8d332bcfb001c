"""Adap-Blend: pieces of a blended pattern in the training set, the whole pattern at test time, and covers.

*Paper.* Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses",
ICLR 2023 (OpenReview _wSHsgrVali). The pattern is cut into 16 pieces; each training sample shows a random half of them
at 0.15, a test sample shows all at 0.2. As many triggered samples again keep their label (covers), so that the trigger
alone does not set the poisoned samples apart.

*Where we differ.* The pattern is uniform noise drawn from the seed (the paper's is a picture), at the image's own size.
``cover`` is counted among the triggered samples: rate 0.006 with cover 0.5 is the paper's 0.003 and 0.003. Which pieces
a sample shows comes from the seed and its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attacks.blended import noise
from unpoison.attacks.draws import draw_for_each, seed_of
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class AdapBlend:
    """``alpha``, at test time, and ``planted_alpha``, in the training set: share of the pattern in the mix, in (0, 1].

    ``pieces`` a side, 1 to 64. ``shown``: share of the pieces that a training sample shows, in (0, 1]. ``cover``: share
    of the triggered training samples that keep their label, in [0, 1).
    """

    alpha: float = 0.2
    planted_alpha: float = 0.15
    pieces: int = 4
    shown: float = 0.5
    cover: float = 0.5

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all")

    def __post_init__(self) -> None:
        for name in ("alpha", "planted_alpha", "shown"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"adap-blend: {name} must be in (0, 1], got {getattr(self, name)}.",
                    hint="The paper's are alpha 0.2, planted_alpha 0.15 and shown 0.5.",
                )
        if not 1 <= self.pieces <= 64:
            raise ConfigError(f"adap-blend: pieces must be 1 to 64, got {self.pieces}.", hint="The paper's is 4.")
        if not 0 <= self.cover < 1:
            raise ConfigError(f"adap-blend: cover must be in [0, 1), got {self.cover}.", hint="The paper's is 0.5.")

    def planted(self) -> AdapBlendPieces:
        """The trigger as the training set shows it."""
        return AdapBlendPieces(alpha=self.planted_alpha, pieces=self.pieces, shown=self.shown)

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] mixed with the whole pattern of ``seed``; the ids play no part."""
        return torch.lerp(images, _pattern(seed, images), self.alpha)


@dataclass(frozen=True, kw_only=True)
class AdapBlendPieces:
    """Some pieces of the pattern, others for each sample id."""

    alpha: float
    pieces: int
    shown: float

    modes: ClassVar[tuple[str, ...]] = AdapBlend.modes

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with pieces mixed in. Raises UsageError when there is not one id for each."""
        count = self.pieces**2

        def draw(generator: torch.Generator) -> Tensor:
            return torch.randperm(count, generator=generator) < max(1, round(self.shown * count))

        shown = draw_for_each(draw, seed_of(seed, "pieces"), ids, len(images), "adap-blend")
        shown = shown.view(-1, self.pieces, self.pieces).to(images)
        rows, columns = (torch.arange(size, device=images.device) * self.pieces // size for size in images.shape[-2:])
        mask = shown[:, rows][:, :, columns][:, None]
        return torch.lerp(images, _pattern(seed, images), self.alpha * mask)


def _pattern(seed: int, images: Images) -> Images:
    return noise(seed, int(images.shape[-2]), int(images.shape[-1])).to(images).expand_as(images)
