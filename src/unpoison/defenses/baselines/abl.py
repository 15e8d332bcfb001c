"""ABL: train anew in a way that keeps poison apart, isolate it, unlearn it.

Paper
    Li, Lyu, Koren, Lyu, Li, Ma. "Anti-Backdoor Learning: Training Clean Models on Poisoned Data." NeurIPS 2021, arXiv
    2110.11571.
Idea
    Poison is learnt first. A training that does not let any loss fall under gamma stalls the clean samples there, while
    poison passes below: the samples of smallest loss are poison, and what they taught is unlearnt by gradient ascent.
Needs
    The poisoned training set and the model's architecture; the suspicious weights are not used.
Protects
    The weights of a new classifier.
Steps
    1. Train fresh weights with sign(CE - gamma) CE (local gradient ascent) for some epochs.
    2. Isolate the share of samples of smallest loss.
    3. Go on training on the rest with plain CE.
    4. Unlearn: minimise CE on the rest minus CE on the isolated samples, at a small rate.
Where we differ, and what the paper leaves open
    ``isolation = "split"``, the default, keeps the suspect samples of the given split apart and unlearns them instead
    of what step 2 finds, where it suspects any: of 10,000 samples a short first training does not yet hold the poison
    apart, and with ``own`` the attack stays (benchmarks/pad_ft.py). Numbers of epochs are for such sets. Unlearning
    ends at the last look whose accuracy on held-out samples of the split's clean part is acceptable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.data.pixels import Pixels
from unpoison.defenses.repair import CleanData, CleanTrainingConfig, Repair, train_looks
from unpoison.detection.cgd import apply_classifier
from unpoison.detection.ranks import label_cross_entropy
from unpoison.detection.thresholds import OddLabels
from unpoison.errors import ConfigError
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.types import Classifier


@dataclass(frozen=True, kw_only=True)
class ABLConfig(CleanTrainingConfig):
    """ABL's constants; gamma and the isolated share are the paper's. ``steps`` and ``learning_rate`` are step 4's."""

    steps: int = 20
    learning_rate: float = 5e-4
    check_every: int = 5
    gamma: float = 0.5
    isolated: float = 0.01
    """Share of the set."""
    isolation: Literal["own", "split"] = "split"
    odd_labels: OddLabels = "unlearn"
    """Whether the doubtful samples of labels that are odd but not proved poisoned are suspect too, where CGD makes the
    split, as in CGD and PAD-FT. A scan's own split always leaves them out. Ours."""
    isolation_epochs: int = 4
    training_epochs: int = 16
    training_rate: float = 0.1
    bound: float = 10.0
    """As wide as for fine-tuning of all weights: the held-out samples are of the suspicious model's own training set,
    of which it has a part by heart, and the new network has not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.isolated < 0.5 or self.gamma < 0 or min(self.isolation_epochs, self.training_epochs) < 1:
            raise ConfigError(
                "expected isolated in (0, 0.5), gamma >= 0, at least one epoch of each kind.", hint="Try the defaults."
            )


def repair_with_abl(classifier: Classifier, pixels: Pixels, split: Split, config: ABLConfig, *, run: Run) -> Repair:
    """Steps 1 to 4 with a new network of ``classifier``'s architecture.

    Raises NotEnoughDataError, DivergedError, UnsupportedModelError (weights that cannot be drawn anew).
    """
    data = CleanData.open(pixels, split, config.held_out, run)
    before = data.look(classifier, 0, run)
    fresh = classifier.fresh(run.seed_of("abl"))
    usable = np.setdiff1d(np.flatnonzero(pixels.usable), data.held_out)
    everything = replace(data, rows=usable)
    first = _train(fresh, everything, config, "abl-isolation", config.isolation_epochs, config.gamma, run)  # (1)
    isolated = isolate(first, pixels, split, usable, config, run)  # (2)
    rest = replace(data, rows=np.setdiff1d(usable, isolated))
    trained = _train(first, rest, config, "abl-training", config.training_epochs, None, run)  # (3)
    optimiser = torch.optim.SGD(trained.module.parameters(), config.learning_rate, momentum=config.momentum)
    poison = replace(data, rows=isolated)

    def one_step(step: int, generator: torch.Generator) -> Tensor:
        loss = batch_loss(trained, rest, config, generator, run)
        if len(isolated):
            loss = loss - batch_loss(trained, poison, config, generator, run)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss

    return train_looks(trained, optimiser, one_step, data, config, name="abl", run=run, before=before)  # (4)


def isolate(
    classifier: Classifier,
    pixels: Pixels,
    split: Split,
    rows: Int[np.ndarray, " k"],
    config: ABLConfig,
    run: Run,
) -> Int[np.ndarray, " m"]:
    """Step 2: the rows of smallest loss, or those that the split suspects, if it does."""
    if config.isolation == "split" and len(split.suspect):
        return split.suspect
    loss = label_cross_entropy(apply_classifier(classifier, pixels, rows, run=run), split.labels[rows])
    return np.sort(rows[np.argsort(loss, kind="stable")[: round(config.isolated * len(rows))]])


def local_gradient_ascent(losses: Float[Tensor, " b"], gamma: float) -> Float[Tensor, ""]:
    """mean sign(CE - gamma) CE."""
    return ((losses.detach() - gamma).sign() * losses).mean()


def batch_loss(
    classifier: Classifier, data: CleanData, config: ABLConfig, generator: torch.Generator, run: Run
) -> Float[Tensor, ""]:
    images, labels = data.batch(config.batch_size, generator, run)
    return F.cross_entropy(classifier.logits(images).float(), labels)


def _train(
    classifier: Classifier, data: CleanData, config: ABLConfig, name: str, epochs: int, gamma: float | None, run: Run
) -> Classifier:
    """Epochs of SGD on ``data.rows`` with a rate that rises and falls; the last weights are kept."""
    steps = epochs * max(1, len(data.rows) // config.batch_size)
    phase = replace(
        config, steps=steps, learning_rate=config.training_rate, check_every=-(-steps // epochs), tolerance=100.0
    )
    optimiser = torch.optim.SGD(
        classifier.module.parameters(), phase.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )

    def one_step(step: int, generator: torch.Generator) -> Tensor:
        done = (step + 1) / steps
        optimiser.param_groups[0]["lr"] = phase.learning_rate * min(done / 0.2, (1 - done) / 0.8 + 1e-3)
        images, labels = data.batch(phase.batch_size, generator, run)
        losses = F.cross_entropy(classifier.logits(images).float(), labels, reduction="none")
        loss = losses.mean() if gamma is None else local_gradient_ascent(losses, gamma)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss

    return train_looks(classifier, optimiser, one_step, data, phase, name=name, run=run).classifier
