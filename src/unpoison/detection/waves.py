"""Is there a wave over the whole image with which a CLIP is surer of one class than it is of anything plain?

Papers
    Barni, Kallas, Tondi. "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning." ICIP 2019
    (SIG) is what is looked for. The search and its numbers are ours.
Why
    The smallest change that reaches a class (:mod:`unpoison.detection.trigger_search`) is never a wave: one fitted to
    the model is several times smaller. And a strong wave makes a clean model name one class for nearly all images as
    well. What a clean model lacks is certainty: what it sees then fits that class no better than its own images do, and
    mostly far worse, which is then the first because the others fall even more.
Steps
    1. For each class the waves x' = clip(x + a sin(2 pi f u / width)), u along ``angles``, on images that the model
       takes for something else.
    2. lead = mean over images of (logit of the class - largest other one), in units of the mean lead that the first
       answer has over the second on plain images. fit = mean logit of the class, in units of its 95th percentile on
       plain images.
    3. The wave of the largest lead is judged on images that have not chosen it: the class is suspected where it still
       leads by ``lead``, fits by ``fit`` and is named for ``reach`` percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.detection.inversion import InvertedTrigger, Logits
from unpoison.errors import ConfigError
from unpoison.types import Images

_AT_ONCE = 256
_WELL, _TINY = 0.95, 1e-8


@dataclass(frozen=True, kw_only=True)
class WaveConfig:
    """Which waves are tried, and when a class is suspected."""

    amplitudes: tuple[float, ...] = (40 / 255, 60 / 255)
    """SIG's for classifiers and for CLIP. Fainter ones were planted, but stronger ones set them off as well."""
    periods: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    """Over the width of an image. A model obeys the neighbours of the one it was taught."""
    angles: tuple[int, ...] = (0, 45, 90, 135)
    """In degrees."""
    lead: float = 2.0
    """Times the lead on plain images..."""
    fit: float = 1.0
    """...and times what plain images that fit the class well reach. Clean models had at most 3.2 and 0.96, a planted
    wave 3.9 and 1.09 at least (docs/decisions/0005-search-before-repair.md)."""
    reach: float = 80.0
    """...and percent of images that are sent to the class."""
    images: int = 128
    """How many are looked at with every wave; as many of those that judge."""

    def __post_init__(self) -> None:
        if not (self.amplitudes and self.periods and self.angles) or min(*self.amplitudes, *self.periods) <= 0:
            raise ConfigError("expected waves: amplitudes, periods and angles.", hint="Try the defaults.")
        if min(self.lead, self.fit) <= 0 or not 0 <= self.reach <= 100 or self.images < 1:
            raise ConfigError("expected lead, fit > 0, reach in percent and images >= 1.", hint="Try the defaults.")


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundWave:
    """``trigger``: the wave as something added, its root mean square and its success on unseen images in percent;
    ``lead`` and ``fit`` as in step 2, on unseen images."""

    trigger: InvertedTrigger
    lead: float
    fit: float


@torch.no_grad()
def find_waves(
    logits: Logits,
    images: Images,
    held_out: Float[Tensor, "m 3 h w"],
    targets: Sequence[int],
    config: WaveConfig | None = None,
) -> tuple[FoundWave, ...]:
    """Steps 1 to 3: the suspected ones of ``targets``, the surest first.

    ``logits`` are cosines at any scale: of anything else the fit means nothing. ``images`` and ``held_out``, in [0, 1],
    choose the waves and judge them. Where no plain image has a lead or fits a class, nothing is found.
    """
    config = config or WaveConfig()
    chosen, judging = (_Looked.at(logits, part[: config.images]) for part in (images, held_out))
    best: dict[int, tuple[float, Tensor]] = {}
    for wave in waves(images.shape[-2], images.shape[-1], config):
        worn = chosen.answers(wave.to(images))
        for target in targets:
            lead = chosen.lead(worn, target)
            if lead > max(config.lead, best[target][0] if target in best else 0.0):
                best[target] = (lead, wave.to(images))
    found = []
    for target, (_, wave) in best.items():
        worn = judging.answers(wave)
        lead, reached = judging.lead(worn, target), judging.reached(worn, target)
        fit = judging.level(worn, target) / max(chosen.usual_level(target), _TINY)
        if lead >= config.lead and fit >= config.fit and reached >= config.reach:
            pattern = wave.expand(3, -1, -1).clone()
            trigger = InvertedTrigger(
                form="additive", target=target, mask=torch.ones_like(pattern[:1]), pattern=pattern,
                size=float(pattern.square().mean().sqrt()), success=reached,
            )  # fmt: skip
            found.append(FoundWave(trigger=trigger, lead=lead, fit=fit))
    return tuple(sorted(found, key=lambda wave: -wave.lead))


def waves(height: int, width: int, config: WaveConfig) -> Iterator[Float[Tensor, "1 h w"]]:
    """Every wave of ``config``, as what is added to each color of an image."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    for angle in config.angles:
        along = columns * math.cos(math.radians(angle)) + rows * math.sin(math.radians(angle))
        for periods in config.periods:
            signal = torch.sin(2 * math.pi * periods * along / width)[None]
            yield from (amplitude * signal for amplitude in config.amplitudes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Looked:
    """Images and what a model says of them ``plain`` [n, k]. All that is measured of a class is over the images that
    the model takes for another one, and 0 where there are none."""

    logits: Logits
    images: Images
    plain: Float[Tensor, "n k"]

    @classmethod
    def at(cls, logits: Logits, images: Images) -> _Looked:
        return cls(logits=logits, images=images, plain=_answers(logits, images))

    def answers(self, wave: Float[Tensor, "1 h w"]) -> Float[Tensor, "n k"]:
        return _answers(self.logits, (self.images + wave).clamp(0, 1))

    def lead(self, worn: Float[Tensor, "n k"], target: int) -> float:
        first, second = self.plain.topk(2, dim=1).values.unbind(1)
        usual, there = float((first - second).mean()), self._others(worn, target)
        if not len(there) or usual < _TINY:
            return 0.0
        others = there.clone()
        others[:, target] = -torch.inf
        return float((there[:, target] - others.max(dim=1).values).mean()) / usual

    def level(self, worn: Float[Tensor, "n k"], target: int) -> float:
        there = self._others(worn, target)[:, target]
        return float(there.mean()) if len(there) else 0.0

    def reached(self, worn: Float[Tensor, "n k"], target: int) -> float:
        """Percent."""
        there = self._others(worn, target)
        return 100 * float((there.argmax(1) == target).float().mean()) if len(there) else 0.0

    def usual_level(self, target: int) -> float:
        """Of plain images that fit the class well: more than 95 percent of all are below."""
        return float(self.plain[:, target].quantile(_WELL))

    def _others(self, worn: Float[Tensor, "n k"], target: int) -> Float[Tensor, "m k"]:
        return worn[self.plain.argmax(1) != target]


def _answers(logits: Logits, images: Images) -> Float[Tensor, "n k"]:
    return torch.cat([logits(part).float() for part in images.split(_AT_ONCE)])
