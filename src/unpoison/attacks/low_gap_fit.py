"""Fits each poisoned sample's strength to the loss of clean samples, under early networks that the attacker trains.

*Source.* Ours; :mod:`unpoison.attacks.low_gap` is the trigger, against what it is made, and what is another's idea.

*Steps.*
1. The attacker does what the defender will do: trains a fresh network on the poisoned set for a few epochs.
2. Aims: quantiles, as many as there are relabelled samples, of that network's losses of the clean samples of the target
   class under their own label. The samples take them in the order of their loss as planted.
3. Each sample is shown in every strength of a grid between ``weakest`` and ``strongest`` and keeps the one whose loss
   under the target label is nearest to its aim.
4. Again from (1), with a network drawn anew, ``rounds`` times. A last network only measures.
5. The gap of a round is how far the AUROC of "a lower loss is poison" (relabelled samples against all clean ones)
   lies from 1/2, under a network that none of its strengths were fitted to. The round of the least gap is the result.

Covers stay at their drawn strengths. The loss is fitted under the attacker's networks; a defender who trains others,
longer or with augmentation, sees another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score

from unpoison.attacks.low_gap import LowGap
from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.overlay import TriggerOverlay
from unpoison.attacks.poison import apply_poisoning
from unpoison.attacks.triggers import params_of
from unpoison.data.pixels import Pixels, load_pixels, to_images
from unpoison.data.sources import LabelledImages
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.models.classifier import ImageClassifier, new_classifier
from unpoison.models.image_classifier import evaluation_mode
from unpoison.runs import Run
from unpoison.training import train_classifier

_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class LowGapConfig:
    """``arch``, ``image_size``, ``epochs`` and ``learning_rate`` of the early networks. ``grid``: strengths that are
    tried, 2 or more."""

    arch: str = "small-resnet"
    image_size: int = 32
    epochs: int = 5
    learning_rate: float = 0.1
    rounds: int = 2
    grid: int = 6

    def __post_init__(self) -> None:
        for name in ("image_size", "epochs", "learning_rate", "rounds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if self.grid < 2:
            raise ConfigError(f"grid must be 2 or more, got {self.grid}.", hint="Try 6.")


@dataclass(frozen=True, kw_only=True)
class LowGapFit:
    """``gaps``: |AUROC - 1/2| of the early loss in [0, 1/2], first with drawn strengths, then after each round.

    ``poisoning`` is that of the least gap.
    """

    poisoning: Poisoning
    gaps: tuple[float, ...]


def fit_low_gap(
    source: LabelledImages, poisoning: Poisoning, config: LowGapConfig | None = None, *, run: Run
) -> LowGapFit:
    """``poisoning``, one of the trigger low-gap planned on the clean ``source``, with fitted strengths.

    Raises ConfigError for another trigger, NotEnoughDataError without two clean samples of the target class,
    DataError as applying the poisoning does, DivergedError.
    """
    config = config or LowGapConfig()
    if not isinstance(poisoning.make_trigger(), LowGap):
        raise ConfigError(f"expected a poisoning of low-gap, got {poisoning.trigger}.", hint="Plan one.")
    quiet = replace(run, folder=None)
    plans, gaps = [poisoning], []
    for number in range(config.rounds + 1):
        scorer, pixels, labels = _early(source, plans[-1], config, number, quiet)  # (1)
        losses = losses_of(scorer, pixels, labels)
        relabelled, clean = _who(source, plans[-1], np.isfinite(losses))
        gaps.append(gap(losses, relabelled, clean))  # (5)
        run.progress.log(f"low-gap: round {number}, gap {gaps[-1]:.3f}")
        if number < config.rounds:
            strengths = _fitted(source, plans[-1], scorer, losses, relabelled, clean, config, quiet)
            trigger = replace(_trigger(poisoning), strengths=strengths)
            plans.append(replace(poisoning, config=params_of(trigger)))
    return LowGapFit(poisoning=plans[int(np.argmin(gaps))], gaps=tuple(gaps))


def gap(losses: Float[np.ndarray, " n"], poisoned: Int[np.ndarray, " k"], clean: Int[np.ndarray, " m"]) -> float:
    """(5) |AUROC - 1/2| of the loss, poisoned rows against clean ones."""
    told = np.concatenate([np.ones(len(poisoned)), np.zeros(len(clean))])
    return abs(float(roc_auc_score(told, -losses[np.concatenate([poisoned, clean])])) - 0.5)


def nearest(
    shown: Float[np.ndarray, "k g"], planted: Float[np.ndarray, " k"], clean: Float[np.ndarray, " m"]
) -> Int[np.ndarray, " k"]:
    """(2, 3) The strength, as a place in the grid, whose loss is nearest to the sample's aim."""
    aims = np.empty(len(planted))
    quantiles = (np.arange(len(planted)) + 0.5) / len(planted)
    aims[np.argsort(planted, kind="stable")] = np.quantile(clean, quantiles)
    return np.abs(shown - aims[:, None]).argmin(axis=1)


@torch.inference_mode()
def losses_of(classifier: ImageClassifier, pixels: Pixels, labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Cross-entropy of each image under its label; NaN for one that cannot be read."""
    device = next(classifier.module.parameters()).device
    losses = np.full(len(labels), np.nan)
    rows = np.flatnonzero(pixels.usable)
    with evaluation_mode(classifier.module):
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            logits = classifier.logits(to_images(pixels.array[part]).to(device)).double()
            told = torch.from_numpy(labels[part]).to(device)
            losses[part] = F.cross_entropy(logits, told, reduction="none").cpu().numpy()
    return losses


def _trigger(poisoning: Poisoning) -> LowGap:
    made = poisoning.make_trigger()
    assert isinstance(made, LowGap)  # noqa: S101 # checked by fit_low_gap
    return made


def _early(
    source: LabelledImages, poisoning: Poisoning, config: LowGapConfig, number: int, run: Run
) -> tuple[ImageClassifier, Pixels, Int[np.ndarray, " n"]]:
    """(1) A network trained on the poisoned set, its pixels and its labels."""
    poisoned = apply_poisoning(source, poisoning)
    pixels = load_pixels(poisoned, config.image_size, cache=run.cache, progress=run.progress)
    fresh = new_classifier(
        config.arch, source.class_names, image_size=config.image_size, seed=run.seed_of("low-gap", number) % 2**31
    )
    fresh.module.to(run.device)
    own = replace(run, seed=run.seed_of("low-gap training", number))
    trained = train_classifier(
        fresh, pixels, poisoned.labels, run=own, epochs=config.epochs, learning_rate=config.learning_rate, augment=False
    )
    return trained, pixels, poisoned.labels


def _who(
    source: LabelledImages, poisoning: Poisoning, usable: np.ndarray
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " m"]]:
    """Rows of the relabelled samples and of those that the poisoning leaves alone, where they can be read."""
    covers = set(poisoning.covers)
    touched = np.isin(source.ids, poisoning.ids)
    relabelled = np.isin(source.ids, [name for name in poisoning.ids if name not in covers])
    return np.flatnonzero(relabelled & usable), np.flatnonzero(~touched & usable)


def _fitted(
    source: LabelledImages,
    poisoning: Poisoning,
    scorer: ImageClassifier,
    losses: Float[np.ndarray, " n"],
    relabelled: Int[np.ndarray, " k"],
    clean: Int[np.ndarray, " m"],
    config: LowGapConfig,
    run: Run,
) -> dict[str, float]:
    """(2, 3) The strength of each relabelled sample by its id."""
    trigger, told = _trigger(poisoning), dict(zip(poisoning.ids, poisoning.new_labels, strict=True))
    names = [source.ids[row] for row in relabelled.tolist()]
    wanted = np.array([told[name] for name in names], dtype=np.int64)
    like = clean[np.isin(source.labels[clean], wanted)]
    if len(like) < 2:
        raise NotEnoughDataError(
            f"{source.name}: clean samples of the target class", have=len(like), need=2,
            hint="Give more of them, or lower the rate.",
        )  # fmt: skip
    chosen, grid = source.select(relabelled), np.linspace(trigger.weakest, trigger.strongest, config.grid)
    shown = np.empty((len(names), len(grid)))
    for place, strength in enumerate(grid.tolist()):
        planted = replace(trigger.planted(), strengths=dict.fromkeys(names, strength))
        overlay = TriggerOverlay(planted, poisoning.seed, frozenset(names))
        pixels = load_pixels(
            chosen.with_labels(chosen.labels, overlay), config.image_size, cache=None, progress=run.progress
        )
        shown[:, place] = losses_of(scorer, pixels, wanted)
    places = nearest(shown, losses[relabelled], losses[like])
    return {name: round(float(grid[place]), 4) for name, place in zip(names, places, strict=True)}
