"""Fine-pruning: cut off the features that clean samples leave idle, then fine-tune.

Paper
    Liu, Dolan-Gavitt, Garg. "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks." RAID 2018,
    arXiv 1805.12185.
Idea
    A backdoor lives in units that sleep on clean images. Remove the sleepiest ones until it costs accuracy.
Needs
    The suspicious model and clean labelled samples: here the clean part of a split of its training set.
Protects
    The classifier's weights.
Steps
    1. Mean absolute value of each feature over the clean samples.
    2. Remove features from the idlest on, as long as held-out accuracy falls by at most ``prune_fall`` points.
    3. Fine-tune what is left.
Where we differ, and what the paper leaves open
    The paper prunes the channels of the last convolution. Ours are the inputs of the last linear layer, which are these
    channels in networks that average over positions, and exist in any network: their columns of the head become zero
    and stay it. Levels are chosen on held-out clean samples, and the last acceptable one is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.data.pixels import Pixels
from unpoison.defenses.repair import (
    AllWeightsConfig,
    CleanData,
    Repair,
    at_largest_rate,
    falling_rate,
    last_acceptable,
    sgd,
    train_looks,
)
from unpoison.errors import ConfigError
from unpoison.models.features import features_on
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.types import Classifier


@dataclass(frozen=True, kw_only=True)
class FinePruningConfig(AllWeightsConfig):
    """Fine-pruning's constants; all ours."""

    prune_fall: float = 4.0
    """Largest fall of held-out accuracy by pruning alone, in points."""
    levels: int = 40
    """Equal steps from none to all features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune_fall < 0 or self.levels < 2:
            raise ConfigError("expected prune_fall >= 0 and levels >= 2.", hint="Try 4 and 40.")


def repair_with_fine_pruning(
    classifier: Classifier, pixels: Pixels, split: Split, config: FinePruningConfig, *, run: Run
) -> Repair:
    """Steps 1 to 3 on copies of ``classifier``. Raises NotEnoughDataError, DivergedError, UnsupportedModelError."""
    data = CleanData.open(pixels, split, config.held_out, run)
    idleness = features_on(classifier, pixels, data.rows, run=run).abs().mean(dim=0)  # (1)
    order = idleness.argsort(stable=True)

    def pruned(level: float) -> Classifier:
        candidate = classifier.copy()
        cut_features(candidate, order[: int(level)])
        return candidate

    levels = [float(level) for level in np.unique(np.linspace(0, len(order) - 1, config.levels).astype(int))]
    repaired, level, looks = last_acceptable(levels, pruned, data, config.prune_fall, run=run)  # (2)
    start, gone = repaired or classifier, order[: int(level)]
    before = looks[0] | {"pruned": level}
    return at_largest_rate(config, lambda config: fine_tuned(start, gone, data, before, config, run))


def fine_tuned(
    pruned: Classifier, gone: Tensor, data: CleanData, before: dict[str, float], config: FinePruningConfig, run: Run
) -> Repair:
    """Step 3 at one rate, without the features ``gone``; ``before``: a look at the suspicious model."""
    repaired = pruned.copy()
    optimiser = sgd(repaired, config)

    def one_step(step: int, generator: torch.Generator) -> Tensor:
        images, labels = data.batch(config.batch_size, generator, run)
        falling_rate(optimiser, step, config)
        loss = F.cross_entropy(repaired.logits(images).float(), labels)  # (3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cut_features(repaired, gone)
        return loss

    return train_looks(repaired, optimiser, one_step, data, config, name="fine-pruning", run=run, before=before)


@torch.no_grad()
def cut_features(classifier: Classifier, features: Tensor) -> None:
    """The head no longer listens to these inputs."""
    weight = classifier.head().weight
    weight[:, features.to(weight.device)] = 0
