"""NAD: the suspicious model learns to look where a fine-tuned copy of itself looks.

Paper
    Li, Lyu, Koren, Lyu, Li, Ma. "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks."
    ICLR 2021, arXiv 2101.05930.
Idea
    A trigger draws a network's attention. A copy fine-tuned on clean samples is drawn less; distil its attention maps
    into the original while that is fine-tuned too.
Needs
    The suspicious model and clean labelled samples: here the clean part of a split of its training set.
Protects
    The classifier's weights.
Steps
    1. Teacher: the model fine-tuned on the clean samples.
    2. Attention map of a layer: A(x) = sum over channels of F(x)^2, scaled to unit length over positions.
    3. Student, from the suspicious weights: CE + beta sum over layers mean (A_teacher - A_student)^2.
Where we differ, and what the paper leaves open
    Layers: the last activation of each map size, found while the network runs, so that it works for any network
    (in one whose maps all have one size: three of them, evenly spaced). beta = 1,000 for all, on the mean over
    positions of squares: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.data.pixels import Pixels
from unpoison.defenses.baselines.ft import FTConfig, repair_with_ft
from unpoison.defenses.repair import (
    AllWeightsConfig,
    CleanData,
    Repair,
    at_largest_rate,
    falling_rate,
    sgd,
    train_looks,
)
from unpoison.errors import ConfigError, UnsupportedModelError
from unpoison.models.activations import activations, channel_axis
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.types import Classifier


@dataclass(frozen=True, kw_only=True)
class NADConfig(AllWeightsConfig):
    """NAD's constants. ``teacher`` is step 1; its ``held_out`` is the student's: it must not train on what judges."""

    beta: float = 1000.0
    teacher: FTConfig = field(default_factory=lambda: FTConfig(steps=200))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "teacher", replace(self.teacher, held_out=self.held_out))
        if self.beta < 0:
            raise ConfigError(f"beta cannot be negative, got {self.beta}.", hint="Try 1000.")


def repair_with_nad(classifier: Classifier, pixels: Pixels, split: Split, config: NADConfig, *, run: Run) -> Repair:
    """Steps 1 to 3 on copies of ``classifier``. Raises NotEnoughDataError, DivergedError, UnsupportedModelError."""
    teacher = repair_with_ft(classifier, pixels, split, config.teacher, run=run).classifier  # (1)
    teacher.module.eval().requires_grad_(False)
    return at_largest_rate(config, lambda config: distilled(classifier, teacher, pixels, split, config, run))


def distilled(
    classifier: Classifier, teacher: Classifier, pixels: Pixels, split: Split, config: NADConfig, run: Run
) -> Repair:
    """Steps 2 and 3 at one rate."""
    repaired = classifier.copy()
    data = CleanData.open(pixels, split, config.held_out, run)
    optimiser = sgd(repaired, config)

    def one_step(step: int, generator: torch.Generator) -> Tensor:
        images, labels = data.batch(config.batch_size, generator, run)
        falling_rate(optimiser, step, config)
        logits: list[Tensor] = []
        seen = activations(lambda: logits.append(repaired.logits(images)))
        with torch.no_grad():
            wanted = activations(lambda: teacher.logits(images))
        layers = chosen_layers(seen)
        distance = torch.stack([attention_distance(seen[layer], wanted[layer]) for layer in layers]).sum()  # (2)
        loss = F.cross_entropy(logits[0].float(), labels) + config.beta * distance  # (3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss

    return train_looks(repaired, optimiser, one_step, data, config, name="nad", run=run)


def chosen_layers(found: Sequence[Tensor]) -> list[int]:
    """The last activation of each map size; of a single size, three evenly spaced ones. Vectors have no map."""
    sizes = {site: positions(output) for site, output in enumerate(found) if positions(output) > 1}
    if not sizes:
        raise UnsupportedModelError(
            "no activation of this network has positions to attend to.", hint="Use another repair, for example ft."
        )
    last = {size: site for site, size in sizes.items()}
    if len(last) > 1:
        return sorted(last.values())
    sites = sorted(sizes)
    return sorted({sites[round(share * (len(sites) - 1))] for share in (1 / 3, 2 / 3, 1)})


def positions(output: Tensor) -> int:
    return output.numel() // (output.shape[0] * output.shape[channel_axis(output)]) if output.ndim > 2 else 1


def attention_map(output: Tensor) -> Float[Tensor, "b positions"]:
    """Step 2."""
    return F.normalize(output.float().square().sum(dim=channel_axis(output)).flatten(1), dim=1)


def attention_distance(student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
    """Mean over samples and positions of (A_teacher - A_student)^2."""
    return (attention_map(student) - attention_map(teacher)).square().mean()
