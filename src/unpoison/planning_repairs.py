"""How many images a repair of a classifier passes through the network, by its settings."""

from __future__ import annotations

from typing import Any

from unpoison.defenses.baselines.abl import ABLConfig
from unpoison.defenses.baselines.ft_sam import FTSAMConfig
from unpoison.defenses.baselines.i_bau import IBAUConfig
from unpoison.defenses.baselines.nad import NADConfig
from unpoison.defenses.clipping import ClippingConfig
from unpoison.defenses.pad_ft import PADFTConfig
from unpoison.defenses.repair import AllWeightsConfig

_LOOKS = 2  # passes over all samples before the bounds: losses and features


def repair_work(config: Any, samples: int, classes: int) -> tuple[int, int]:
    """Images that are passed forward and backward, and those that are passed forward alone.

    ``config``: of any repair of a classifier. Of one attempt; what looks at held-out samples take is left out.
    """
    if isinstance(config, PADFTConfig):
        chosen = min(samples, config.per_class * classes)
        return _bounded(config.clip, chosen, classes), _LOOKS * samples + chosen
    trained = getattr(config, "steps", 0) * config.batch_size
    if isinstance(config, FTSAMConfig):
        trained *= 2
    elif isinstance(config, IBAUConfig):
        trained *= config.ascent_steps + config.fixed_point_steps + 3
    elif isinstance(config, NADConfig):
        trained += config.teacher.steps * config.teacher.batch_size
    elif isinstance(config, ABLConfig):
        trained += (config.isolation_epochs + config.training_epochs) * samples
    return trained, 0


def attempts(config: Any) -> int:
    """How often a repair begins again at most, each time at a smaller learning rate."""
    if not isinstance(config, AllWeightsConfig):
        return 1
    return 1 + sum(rate < config.learning_rate for rate in config.smaller_rates)


def _bounded(clip: ClippingConfig, chosen: int, classes: int) -> int:
    if clip.rule == "suspects":
        return clip.suspect_steps * clip.suspect_batch
    if clip.rule == "learned":
        return (clip.epochs or 50) * chosen
    if clip.rule == "margin":
        return (clip.epochs or 300) * (chosen + clip.noise_images * classes)
    return 0
