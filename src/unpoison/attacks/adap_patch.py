"""Adap-Patch: four patches; a training sample shows one of them faintly, a test sample all of them plainly.

*Paper.* Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses",
ICLR 2023 (OpenReview _wSHsgrVali). Four patch triggers of opacity 0.5, 0.2, 0.5 and 0.3; each triggered training sample
gets one; two thirds of them keep their label (covers: 0.6 % of the set, beside 0.3 % that are poisoned).

*Where we differ.* The paper's patches are pictures; ours are 3 x 3 random colors drawn from the seed, one in each
corner, 3/16 of the short side and at least 2 pixels wide. All four are shown at test time (the paper's code shows two
at opacity 1). ``cover`` is counted among the triggered samples. Which patch a sample shows comes from the seed and its
id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.draws import generator_of, need_ids, scaled_side, seed_of
from unpoison.errors import ConfigError
from unpoison.types import Images

CORNERS = 4


@dataclass(frozen=True, kw_only=True)
class AdapPatch:
    """``share``: side of a patch as a share of the short side. ``alpha``: opacity at test time. Both in (0, 1].

    ``planted_alphas``: opacity of each of the four patches in the training set, in (0, 1]. ``cover``: share of the
    triggered training samples that keep their label, in [0, 1).
    """

    share: float = 3 / 16
    alpha: float = 1.0
    planted_alphas: tuple[float, float, float, float] = (0.5, 0.2, 0.5, 0.3)
    cover: float = 2 / 3

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all")

    def __post_init__(self) -> None:
        for name, value in [
            ("share", self.share),
            ("alpha", self.alpha),
            *(("planted_alphas", a) for a in self.planted_alphas),
        ]:
            if not 0 < value <= 1:
                raise ConfigError(
                    f"adap-patch: {name} must be in (0, 1], got {value}.",
                    hint="The usual are share 0.1875, alpha 1 and planted_alphas 0.5, 0.2, 0.5, 0.3.",
                )
        if not 0 <= self.cover < 1:
            raise ConfigError(f"adap-patch: cover must be in [0, 1), got {self.cover}.", hint="The paper's is 2/3.")

    def planted(self) -> AdapPatchOne:
        """The trigger as the training set shows it."""
        return AdapPatchOne(share=self.share, alphas=self.planted_alphas)

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with all patches; the ids play no part."""
        patches, masks = _corners(images, seed, self.share)
        shown, added = torch.ones_like(masks[0]), torch.zeros_like(patches[0])
        for patch, mask in zip(patches, self.alpha * masks, strict=True):  # where patches meet, the later lies on top
            shown, added = shown * (1 - mask), torch.lerp(added, patch, mask.expand_as(patch))
        return torch.addcmul(added, images, shown)


@dataclass(frozen=True, kw_only=True)
class AdapPatchOne:
    """One of the four patches, drawn for each sample id."""

    share: float
    alphas: tuple[float, float, float, float]

    modes: ClassVar[tuple[str, ...]] = AdapPatch.modes

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with a patch each. Raises UsageError when there is not one id for each."""
        names = need_ids(ids, len(images), "adap-patch")
        which = torch.tensor([seed_of(seed, name, "patch") % CORNERS for name in names], dtype=torch.int64)
        which = which.to(images.device)
        patches, masks = _corners(images, seed, self.share)
        opacity = masks * images.new_tensor(self.alphas).view(CORNERS, 1, 1, 1)
        return torch.lerp(images, patches[which], opacity[which])


def _corners(images: Images, seed: int, share: float) -> tuple[Float[Tensor, "4 3 h w"], Float[Tensor, "4 1 h w"]]:
    side = scaled_side(share, min(images.shape[-2:]), 2)
    patches, masks = corners(seed, side, int(images.shape[-2]), int(images.shape[-1]))
    return patches.to(images), masks.to(images)


@lru_cache(maxsize=16)
def corners(seed: int, side: int, height: int, width: int) -> tuple[Float[Tensor, "4 3 h w"], Float[Tensor, "4 1 h w"]]:
    """The patches in their places (top left, top right, bottom left, bottom right), and where each is."""
    colors = torch.randint(2, (CORNERS, 3, 3, 3), generator=generator_of(seed)).float()
    cells = torch.arange(side) * 3 // side
    squares = colors[:, :, cells][:, :, :, cells]
    patches, masks = torch.zeros(CORNERS, 3, height, width), torch.zeros(CORNERS, 1, height, width)
    down, across = min(side, height), min(side, width)
    for corner in range(CORNERS):
        rows = slice(0, down) if corner < 2 else slice(height - down, height)
        columns = slice(0, across) if corner % 2 == 0 else slice(width - across, width)
        patches[corner, :, rows, columns] = squares[corner, :, :down, :across]
        masks[corner, :, rows, columns] = 1
    return patches, masks
