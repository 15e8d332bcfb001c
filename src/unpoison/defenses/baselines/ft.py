"""Fine-tuning of a classifier: go on training it, on clean samples.

Paper
    The baseline of every repair; e.g. Liu, Dolan-Gavitt, Garg. "Fine-Pruning: Defending Against Backdooring Attacks on
    Deep Neural Networks." RAID 2018, arXiv 1805.12185.
Idea
    What clean samples do not use is forgotten, slowly.
Needs
    The suspicious model and clean labelled samples: here the clean part of a split of its training set.
Protects
    The classifier's weights.
Steps
    1. SGD on the cross-entropy of the clean samples, all layers; crop and flip.
Where we differ, and what the paper leaves open
    Steps, rates and their linear fall are ours: the largest of four rates that the network bears. Part of the clean
    samples is held out, and judges that and what is kept. At a third of the first rate a small network kept half
    of one backdoor and all of another (benchmarks/pad_ft.py, --set tune).
"""

from __future__ import annotations

from dataclasses import dataclass

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
    sgd,
    train_looks,
)
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.types import Classifier


@dataclass(frozen=True, kw_only=True)
class FTConfig(AllWeightsConfig):
    """Fine-tuning's constants; all ours."""


def repair_with_ft(classifier: Classifier, pixels: Pixels, split: Split, config: FTConfig, *, run: Run) -> Repair:
    """Step 1 on copies of ``classifier``. Raises NotEnoughDataError, DivergedError."""
    return at_largest_rate(config, lambda config: fine_tuned(classifier, pixels, split, config, run))


def fine_tuned(classifier: Classifier, pixels: Pixels, split: Split, config: FTConfig, run: Run) -> Repair:
    """Step 1 at one rate."""
    repaired = classifier.copy()
    data = CleanData.open(pixels, split, config.held_out, run)
    optimiser = sgd(repaired, config)

    def one_step(step: int, generator: torch.Generator) -> Tensor:
        images, labels = data.batch(config.batch_size, generator, run)
        falling_rate(optimiser, step, config)
        loss = F.cross_entropy(repaired.logits(images).float(), labels)  # (1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss

    return train_looks(repaired, optimiser, one_step, data, config, name="ft", run=run)
