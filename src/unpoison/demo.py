"""The whole way on built-in pictures: poison a set, train on it, find the poison, repair the model, measure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from unpoison.api import purify_with_cgd
from unpoison.attacks.folder import write_or_continue
from unpoison.attacks.poison import plan_poisoning
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.cgd import CGDConfig
from unpoison.detection.cgd import SeparationConfig
from unpoison.errors import ConfigError
from unpoison.evaluation.classifier import evaluate_classifier
from unpoison.models.classifier import DESCRIPTION, load_classifier, new_classifier, save_classifier
from unpoison.models.image_classifier import ImageClassifier
from unpoison.outputs import save_purification
from unpoison.results import Purification
from unpoison.runs import Run
from unpoison.training import train_classifier
from unpoison.types import ZeroShotModel


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes for two processor cores."""

    train: int = 5000
    test: int = 1500
    trigger: str = "blended"
    """A patch would do for the attack, but these objects are so easy that a fresh network learns them before a patch:
    CGD's second axis has nothing to see. A pattern over the whole image is learnt first, as on real images."""
    rate: float = 0.05
    target: int = 0
    epochs: int = 6
    learning_rate: float = 0.05
    augment: bool = False
    """So short a training leaves hardly a backdoor to repair with crops and flips."""
    cgd: CGDConfig = field(
        default_factory=lambda: CGDConfig(
            steps=150, separation=SeparationConfig(scorers=2, scorer_epochs=3, scorer_batch_size=256)
        )
    )

    def __post_init__(self) -> None:
        for name in ("train", "test", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.", hint=f"Raise {name}.")


@dataclass(frozen=True, kw_only=True)
class DemoFiles:
    """Where each part of a demo is in its folder."""

    folder: Path

    @property
    def poisoned(self) -> Path:
        return self.folder / "poisoned"

    @property
    def victim(self) -> Path:
        return self.folder / "victim"

    @property
    def model(self) -> Path:
        return self.folder / "model"


def run_demo(config: DemoConfig, folder: Path, *, clip: ZeroShotModel, run: Run) -> Purification:
    """Every step a user would take, in ``folder``; each is continued where an earlier call was cut short.

    Writes poisoned/ (data and manifest), victim/ (the backdoored model) and what ``purify`` writes.
    """
    files = DemoFiles(folder=folder)
    log = run.progress.log
    log(f"1/5 poison {config.rate:.0%} of {config.train:,} pictures with {config.trigger}")
    clean = open_images(f"shapes:{config.train}:{run.seed}")
    plan = plan_poisoning(clean, config.trigger, rate=config.rate, target=config.target, seed=run.seed)
    poisoning = write_or_continue(clean, plan, files.poisoned)
    poisoned = open_images(files.poisoned / "data.parquet")
    log("2/5 train a classifier on them")
    victim = train_victim(poisoned, config, files.victim, run=run)
    log("3/5 measure its accuracy and the attack's success on new pictures")
    test = open_images(f"shapes:{config.test}:{run.seed + 1}")
    before = evaluate_classifier(victim, test, poisoning=poisoning, run=run, name=str(files.victim))
    log("4/5 find the poison and repair the model, without knowing the attack")
    outcome = purify_with_cgd(victim, poisoned, config=config.cgd, clip=clip, run=run)
    log("5/5 measure again")
    after = evaluate_classifier(outcome.classifier, test, poisoning=poisoning, run=run, name=str(files.model))
    purification = replace(outcome.purification, before=before, after=after)
    save_purification(
        purification,
        outcome.classifier,
        outcome.scores,
        outcome.split,
        outcome.samples,
        folder,
        base_model=str(files.victim),
    )
    return purification


def train_victim(poisoned: LabelledImages, config: DemoConfig, folder: Path, *, run: Run) -> ImageClassifier:
    """The backdoored model: from ``folder`` when it is there, else trained and saved there."""
    if (folder / DESCRIPTION).exists():
        return load_classifier(folder)
    fresh = new_classifier("small-resnet", poisoned.class_names, seed=run.seed)
    pixels = load_pixels(poisoned, fresh.image_size, cache=run.cache, progress=run.progress)
    victim = train_classifier(
        fresh, pixels, poisoned.labels, run=run, epochs=config.epochs, learning_rate=config.learning_rate,
        augment=config.augment,
    )  # fmt: skip
    save_classifier(victim, folder)
    return load_classifier(folder)
