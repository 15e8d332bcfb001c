"""What the repairs of classifiers share: held-out clean samples, looks at them, and the rule for what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from unpoison.data.pixels import Pixels, to_images
from unpoison.data.transforms import random_crop, random_flip
from unpoison.detection.cgd import apply_classifier
from unpoison.errors import ConfigError, DivergedError, NotEnoughDataError
from unpoison.models.batch_norm import has_batch_norm
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.training import restore, state_of
from unpoison.types import Classifier, Images, Labels

C = TypeVar("C", bound="RateConfig")


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A repaired copy, as it was after ``steps``; held-out accuracy and suspects' agreement (percent) on the way.

    ``changed_share``: share of all parameters, bounds among them, that the method may have changed, in [0, 1].
    """

    classifier: Classifier
    history: list[dict[str, float]]
    steps: int
    changed_share: float = 1.0

    @property
    def held_out_before(self) -> float:
        return self.history[0]["held_out_accuracy"]

    @property
    def held_out_after(self) -> float:
        return next(look["held_out_accuracy"] for look in self.history if look["step"] == self.steps)


def label_accuracy(
    classifier: Classifier,
    pixels: Pixels,
    labels: Int[np.ndarray, " n"],
    rows: Int[np.ndarray, " k"],
    *,
    run: Run,
) -> float:
    """Share, in percent, of ``rows`` to which the classifier says the given label; 0 for no rows."""
    if len(rows) == 0:
        return 0.0
    return 100 * float((apply_classifier(classifier, pixels, rows, run=run).argmax(1) == labels[rows]).mean())


def standard_error(percent: float, n: int) -> float:
    """Of a share of ``n`` samples, both in percent; the share is shrunk toward one half, so that it is never 0."""
    share = (percent / 100 * n + 1) / (n + 2)
    return 100 * math.sqrt(share * (1 - share) / n)


def acceptable(accuracy: float, best: float, n: int, tolerance: float) -> bool:
    """Whether a look at ``n`` held-out samples is not below the best one by more than ``tolerance`` points and chance.

    Chance is twice the standard error of the best look's accuracy.
    """
    return accuracy >= best - tolerance - 2 * standard_error(best, n)


def hold_out(
    rows: Int[np.ndarray, " k"], labels: Int[np.ndarray, " n"], share: float, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split ``rows`` into (kept, held out), the share rounded within each class so that every class keeps a sample."""
    kept, held = [], []
    for label in np.unique(labels[rows]):
        members = rows[labels[rows] == label]
        members = members[torch.randperm(len(members), generator=generator).numpy()]
        count = min(round(share * len(members)), len(members) - 1)
        held.append(members[:count])
        kept.append(members[count:])
    kept = np.concatenate(kept) if kept else rows
    held = np.concatenate(held) if held else rows[:0]
    if len(held) == 0:
        raise NotEnoughDataError(
            "samples held out of the clean region",
            have=0,
            need=1,
            hint="Give more data, or raise held_out; the repair has to be judged on something.",
        )
    return np.sort(kept), np.sort(held)


@dataclass(frozen=True, kw_only=True)
class CleanTrainingConfig:
    """What every training on the clean part of a split needs; the numbers are ours where a method does not say."""

    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 128
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    held_out: float = 0.05
    """Share of the clean samples kept aside to judge by."""
    check_every: int = 50
    """Steps between looks at the held-out samples, also the unit of resume."""
    tolerance: float = 1.0
    """Points under the best held-out accuracy, on top of chance, at which a look is no longer kept."""
    bound: float = 5.0
    """Largest fall of held-out accuracy, in points, that is accepted."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "batch_size", "check_every", "tolerance", "bound"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, got {self.held_out}.", hint="Try 0.05.")


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    """A learning rate as large as a network bears: the larger, the more is forgotten that clean samples do not use."""

    learning_rate: float = 0.1
    smaller_rates: tuple[float, ...] = (0.03, 0.01, 0.001)
    """Those under ``learning_rate`` are tried in turn where held-out accuracy falls by more than ``bound``."""
    bound: float = 5.0
    """Largest fall of held-out accuracy, in points, that is accepted; the model was trained on these samples."""

    def __post_init__(self) -> None:
        rates = (self.learning_rate, *self.smaller_rates)
        if min(rates) <= 0:
            raise ConfigError(f"the learning rates must be positive, got {rates}.", hint="Try 0.1 and smaller ones.")


@dataclass(frozen=True, kw_only=True)
class AllWeightsConfig(CleanTrainingConfig, RateConfig):
    """Training on, of all weights."""

    learning_rate: float = 0.1
    bound: float = 10.0
    """Wider than for gentler repairs: the held-out samples are of the suspicious model's own training set, of which it
    has a part by heart (7 points above its test accuracy in a small network), and such training forgets that too."""

    def __post_init__(self) -> None:
        CleanTrainingConfig.__post_init__(self)
        RateConfig.__post_init__(self)


def at_largest_rate(config: C, attempt: Callable[[C], Repair]) -> Repair:
    """``attempt`` at the largest rate of ``config`` whose held-out accuracy is within its ``bound``; else at the last.

    Raises DivergedError where the smallest rate diverges too.
    """
    for smaller in sorted((rate for rate in config.smaller_rates if rate < config.learning_rate), reverse=True):
        try:
            repair = attempt(config)
            if repair.held_out_after >= repair.held_out_before - config.bound:
                return repair
        except DivergedError:
            pass
        config = replace(config, learning_rate=smaller, smaller_rates=())
    return attempt(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class CleanData:
    """The clean samples of a split, those to train on and those held out, with the suspect ones for a look."""

    pixels: Pixels
    labels: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " k"]
    held_out: Int[np.ndarray, " m"]
    suspect: Int[np.ndarray, " s"]

    @classmethod
    def open(cls, pixels: Pixels, split: Split, share: float, run: Run) -> CleanData:
        """Raises NotEnoughDataError."""
        rows, held_out = hold_out(split.clean, split.labels, share, run.generator("hold-out"))
        return cls(pixels=pixels, labels=split.labels, rows=rows, held_out=held_out, suspect=split.suspect)

    def batch(self, size: int, generator: torch.Generator, run: Run, *, augment: bool = True) -> tuple[Images, Labels]:
        """A batch drawn with repeats, shifted by up to 4 pixels and mirrored unless ``augment`` is off."""
        rows = self.rows[torch.randint(len(self.rows), (size,), generator=generator).sort().values.numpy()]
        images = to_images(self.pixels.array[rows])
        if augment:
            images = random_flip(random_crop(images, 4, generator), generator)
        return images.to(run.device), torch.from_numpy(self.labels[rows]).to(run.device)

    def look(self, classifier: Classifier, step: int, run: Run) -> dict[str, float]:
        """Held-out accuracy, and how far the classifier still says the suspects' labels, in percent."""
        return {
            "step": float(step),
            "held_out_accuracy": label_accuracy(classifier, self.pixels, self.labels, self.held_out, run=run),
            "suspect_agreement": label_accuracy(classifier, self.pixels, self.labels, self.suspect, run=run),
        }


def check_batch_size(classifier: Classifier, batch_size: int) -> None:
    """Raises ConfigError where a network is to be trained on batches that its BatchNorm cannot normalise."""
    if batch_size < 2 and has_batch_norm(classifier.module):
        raise ConfigError(
            f"a network with BatchNorm cannot be trained on batches of {batch_size}.",
            hint="Set batch_size to 2 or more.",
        )


def train_looks(
    repaired: Classifier,
    optimiser: torch.optim.Optimizer,
    one_step: Callable[[int, torch.Generator], Tensor],
    data: CleanData,
    config: CleanTrainingConfig,
    *,
    name: str,
    run: Run,
    before: dict[str, float] | None = None,
    first_step: int = 0,
) -> Repair:
    """Train ``repaired`` in place; keep the last look that is not clearly worse than the best one.

    ``one_step(step, generator)`` changes the weights and gives its loss. A run that is killed and repeated ends with
    the same weights. ``before``: a look at the suspicious model, where ``repaired`` is already another one;
    ``first_step``: steps that were taken before. Raises ConfigError (batches of one and BatchNorm), DivergedError.
    """
    check_batch_size(repaired, config.batch_size)
    net = repaired.module.to(run.device)
    history = [before or data.look(repaired, 0, run)]
    best, kept, kept_step = 0.0, {}, first_step
    for start in run.progress.track(
        range(0, config.steps, config.check_every), total=config.steps * config.batch_size, what=name,
        weight=config.check_every * config.batch_size, unit="images",
    ):  # fmt: skip
        done = min(start + config.check_every, config.steps)

        def some_steps(start: int = start, done: int = done) -> dict[str, Tensor]:
            net.train()
            generator = run.generator(name, start)
            for step in range(start, done):
                loss = one_step(step, generator)
                if not torch.isfinite(loss):
                    raise DivergedError(name, step=step, loss=float(loss.detach()))
            return state_of(net, optimiser)

        with run.seeded(name, start):
            restore(net, optimiser, run.step(f"{name}-{config.learning_rate:g}-{start:05d}", some_steps))
        history.append(data.look(repaired, first_step + done, run) | {"learning_rate": config.learning_rate})
        accuracy = history[-1]["held_out_accuracy"]
        best = max(best, accuracy)
        if acceptable(accuracy, best, len(data.held_out), config.tolerance):
            kept, kept_step = state_of(net, optimiser), first_step + done
    restore(net, optimiser, kept)
    net.eval()
    return Repair(classifier=repaired, history=history, steps=kept_step)


def last_acceptable(
    levels: Iterable[float], at: Callable[[float], Classifier], data: CleanData, fall: float, *, run: Run
) -> tuple[Classifier | None, float, list[dict[str, float]]]:
    """The classifier of the last level, of levels that cost more and more, whose held-out accuracy is at most ``fall``
    points under the best level's; with the level and all looks. The search ends at the first level that costs more."""
    best, found, chosen, looks = 0.0, None, 0.0, []
    for level in levels:
        candidate = at(level)
        look = data.look(candidate, 0, run) | {"level": level}
        looks.append(look)
        best = max(best, look["held_out_accuracy"])
        if look["held_out_accuracy"] < best - fall:
            break
        found, chosen = candidate, level
    return found, chosen, looks


def sgd(classifier: Classifier, config: CleanTrainingConfig) -> torch.optim.SGD:
    return torch.optim.SGD(
        classifier.module.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def falling_rate(optimiser: torch.optim.Optimizer, step: int, config: CleanTrainingConfig) -> None:
    """The rate falls linearly to zero."""
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate * (1 - step / config.steps)
