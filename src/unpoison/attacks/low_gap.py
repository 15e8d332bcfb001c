"""A blended trigger of another strength in each training sample, and covers: no sample of it is learnt early.

*Source.* Ours, against PAD-FT (arXiv 2409.12072) and the second axis of CGD (arXiv 2507.05113), which take the loss
under a network trained for a few epochs for a sign: a trigger is a shortcut, so that poisoned samples are learnt
first. Covers and a weaker planted trigger are Adap-Blend's (Qi et al., ICLR 2023); new are strengths fitted to the
loss.

*Idea.* x' = (1 - a) x + a n with n ~ U[0, 1] as in Blended. A test sample has a = ``alpha``. In the training set a is
each sample's own: one that :func:`~unpoison.attacks.low_gap_fit.fit_low_gap` chose so that its early loss is that of
a clean sample, else drawn between ``weakest`` and ``strongest`` from the seed and its id. A ``cover`` share keeps its
label, which makes the trigger a poor shortcut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attacks.blended import noise
from unpoison.attacks.draws import draw_for_each, need_ids, seed_of
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class LowGap:
    """``alpha``, at test time; ``weakest`` and ``strongest``, in the training set: share of the pattern, in (0, 1].

    ``cover``: share of the triggered training samples that keep their label, in [0, 1). ``strengths``: the share of the
    pattern in the training samples of these ids, in (0, 1].
    """

    alpha: float = 0.2
    weakest: float = 0.05
    strongest: float = 0.2
    cover: float = 0.5
    strengths: Mapping[str, float] = field(default_factory=dict)

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all")

    def __post_init__(self) -> None:
        for name in ("alpha", "weakest", "strongest"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"low-gap: {name} must be in (0, 1], got {getattr(self, name)}.", hint="Try 0.2, 0.05 and 0.2."
                )
        if self.weakest > self.strongest:
            raise ConfigError("low-gap: weakest is above strongest.", hint="Exchange them.")
        if not 0 <= self.cover < 1:
            raise ConfigError(f"low-gap: cover must be in [0, 1), got {self.cover}.", hint="Try 0.5.")
        outside = [value for value in self.strengths.values() if not 0 < value <= 1]
        if outside:
            raise ConfigError(f"low-gap: strengths must be in (0, 1], got {outside[0]}.", hint="Fit them again.")

    def planted(self) -> LowGapPlanted:
        """The trigger as the training set shows it."""
        return LowGapPlanted(weakest=self.weakest, strongest=self.strongest, strengths=self.strengths)

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] mixed with the pattern at ``alpha``; the ids play no part."""
        return torch.lerp(images, _pattern(seed, images), self.alpha)


@dataclass(frozen=True, kw_only=True)
class LowGapPlanted:
    """The pattern in another strength for each sample id."""

    weakest: float
    strongest: float
    strengths: Mapping[str, float]

    modes: ClassVar[tuple[str, ...]] = LowGap.modes

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1], mixed. Raises UsageError when there is not one id for each."""
        alpha = self.alphas(seed, ids, len(images)).to(images)[:, None, None, None]
        return torch.lerp(images, _pattern(seed, images), alpha.expand_as(images))

    def alphas(self, seed: int, ids: Sequence[str] | None, count: int) -> Tensor:
        """The strength [b] of each sample: its own, or one drawn for its id."""
        names = need_ids(ids, count, "low-gap")
        drawn = draw_for_each(lambda generator: torch.rand((), generator=generator), seed_of(seed, "strength"), names,
                              count, "low-gap")  # fmt: skip
        drawn = self.weakest + (self.strongest - self.weakest) * drawn
        return torch.tensor([self.strengths.get(name, float(a)) for name, a in zip(names, drawn, strict=True)])


def _pattern(seed: int, images: Images) -> Images:
    return noise(seed, int(images.shape[-2]), int(images.shape[-1])).to(images).expand_as(images)
