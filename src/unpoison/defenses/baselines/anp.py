"""ANP: find the neurons that a small adversarial change turns into a backdoor, and remove them.

Paper
    Wu, Wang. "Adversarial Neuron Pruning Purifies Backdoored Deep Models." NeurIPS 2021, arXiv 2110.14430.
Idea
    In a backdoored network, neurons that are changed a little in the worst direction soon predict the target label.
    Learn a mask over neurons that keeps clean samples right under such changes, and prune what it lets go.
Needs
    The suspicious model and clean labelled samples: here the clean part of a split of its training set.
Protects
    The classifier's weights.
Steps
    1. Worst relative change of each neuron's weight and bias, |delta|, |xi| <= epsilon: one signed step from zero.
    2. Mask m in [0, 1]: minimise alpha CE(m) + (1 - alpha) CE(m, delta, xi) by SGD.
    3. Prune neurons in the order of their masks, as long as held-out accuracy falls by at most ``prune_fall``. Of masks
       that are equal (many end at 0), the one that was lower on the way goes first.
Where we differ, and what the paper leaves open
    Neurons are BatchNorm's channels, as in the published code; in a network without BatchNorm, the output channels of
    its convolutions and linear layers but the head. BatchNorm keeps its statistics. How many neurons
    go is chosen on held-out clean samples, and the last acceptable network is kept; the paper prunes all masks under a
    threshold. The rate is half the paper's: both were tried (benchmarks/pad_ft.py, --set tune). In a network of few
    channels each that goes costs points, so little can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unpoison.data.pixels import Pixels
from unpoison.defenses.repair import CleanData, CleanTrainingConfig, Repair, last_acceptable
from unpoison.errors import ConfigError, DivergedError, UnsupportedModelError
from unpoison.models.batch_norm import batch_norms
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.types import Classifier


@dataclass(frozen=True, kw_only=True)
class ANPConfig(CleanTrainingConfig):
    """ANP's constants; alpha and epsilon are the paper's, which has 2,000 steps and a rate of 0.2."""

    steps: int = 300
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    alpha: float = 0.2
    epsilon: float = 0.4
    prune_fall: float = 4.0
    """Largest fall of held-out accuracy by pruning, in points."""
    largest_share: float = 0.5
    """Share of neurons that may go."""
    levels: int = 241
    """Equal steps from none to that share; in a small network one neuron each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1 or not self.epsilon > 0 or self.prune_fall < 0 or self.levels < 2:
            raise ConfigError(
                "expected alpha in [0, 1], epsilon > 0, prune_fall >= 0, levels >= 2.", hint="Try the defaults."
            )
        if not 0 < self.largest_share < 1:
            raise ConfigError(f"largest_share must lie in (0, 1), got {self.largest_share}.", hint="Try 0.5.")


class Masked(nn.Module):
    """value * (m + delta) over the first axis; with m and delta as plain tensors that the caller changes."""

    def __init__(self, mask: Tensor, change: Tensor) -> None:
        super().__init__()
        self.mask, self.change = mask, change

    def forward(self, value: Tensor) -> Tensor:
        return value * (self.mask + self.change).view(-1, *[1] * (value.ndim - 1))


def repair_with_anp(classifier: Classifier, pixels: Pixels, split: Split, config: ANPConfig, *, run: Run) -> Repair:
    """Steps 1 to 3 on a copy of ``classifier``. Raises NotEnoughDataError, DivergedError, UnsupportedModelError."""
    data = CleanData.open(pixels, split, config.held_out, run)
    stored = run.step("anp-masks", lambda: learn_masks(classifier, data, config, run))
    order = np.lexsort((stored["mean"].numpy(), stored["mask"].numpy()))

    def pruned(level: float) -> Classifier:
        gone = torch.zeros(len(order), dtype=torch.bool, device=run.device)
        gone[torch.from_numpy(order[: round(level * len(order))])] = True
        candidate = classifier.copy()
        candidate.module.to(run.device).eval()
        layers = [layer for _, layer in neuron_layers(candidate)]
        with torch.no_grad():
            for layer, part in zip(
                layers, gone.split([len(layer.get_parameter("weight")) for layer in layers]), strict=True
            ):
                layer.get_parameter("weight")[part] = 0
        return candidate

    levels = [float(level) for level in np.linspace(0, config.largest_share, config.levels)]
    found, level, looks = last_acceptable(levels, pruned, data, config.prune_fall, run=run)  # (3)
    history = [looks[0] | {"step": 0.0}]
    history += [look | {"step": float(config.steps + index)} for index, look in enumerate(looks)]
    prunable = sum(layer.get_parameter("weight").numel() for _, layer in neuron_layers(classifier))
    return Repair(
        classifier=found or classifier.copy(),
        history=history,
        steps=config.steps + levels.index(level),
        changed_share=prunable / sum(weight.numel() for weight in classifier.module.parameters()),
    )


def learn_masks(classifier: Classifier, data: CleanData, config: ANPConfig, run: Run) -> dict[str, Tensor]:
    """Steps 1 and 2: ``mask``, in [0, 1], of every neuron of :func:`neuron_layers`, and its ``mean`` over the steps."""
    net = classifier.copy()
    net.module.to(run.device).eval().requires_grad_(False)
    layers = [layer for _, layer in neuron_layers(net)]
    masks = [torch.ones(len(layer.get_parameter("weight")), device=run.device, requires_grad=True) for layer in layers]
    deltas = [torch.zeros_like(mask) for mask in masks]
    xis = [torch.zeros_like(mask) for mask in masks]
    for layer, mask, delta, xi in zip(layers, masks, deltas, xis, strict=True):
        parametrize.register_parametrization(layer, "weight", Masked(mask, delta))
        if layer.bias is not None:
            parametrize.register_parametrization(layer, "bias", Masked(torch.ones_like(mask), xi))
    mean = torch.zeros(sum(map(len, masks)), device=run.device)
    optimiser = torch.optim.SGD(masks, config.learning_rate, momentum=config.momentum)
    for step in run.progress.track(
        range(config.steps), total=config.steps * config.batch_size, what="anp", weight=config.batch_size, unit="images"
    ):
        images, labels = data.batch(config.batch_size, run.generator("anp", step), run)
        worst_neurons(net, images, labels, [*deltas, *xis], config.epsilon)  # (1)
        optimiser.zero_grad()
        if config.alpha < 1:
            loss = (1 - config.alpha) * F.cross_entropy(net.logits(images).float(), labels)
            loss.backward()
        set_changes([*deltas, *xis], 0.0)
        clean = F.cross_entropy(net.logits(images).float(), labels)
        (config.alpha * clean).backward()
        if not torch.isfinite(clean):
            raise DivergedError("ANP's masks", step=step, loss=float(clean.detach()))
        optimiser.step()  # (2)
        with torch.no_grad():
            for mask in masks:
                mask.clamp_(0, 1)
            mean += torch.cat(masks) / config.steps
    return {"mask": torch.cat(masks).detach().cpu(), "mean": mean.cpu()}


def worst_neurons(
    classifier: Classifier, images: Tensor, labels: Tensor, changes: Sequence[Tensor], epsilon: float
) -> None:
    """Step 1 in place: epsilon times the sign of the loss's gradient at no change."""
    set_changes(changes, 0.0)
    for change in changes:
        change.requires_grad_()
    loss = F.cross_entropy(classifier.logits(images).float(), labels)
    gradients = torch.autograd.grad(loss, list(changes), allow_unused=True)
    for change, gradient in zip(changes, gradients, strict=True):
        change.requires_grad_(False)
        if gradient is not None:
            change.copy_(epsilon * gradient.sign())


@torch.no_grad()
def set_changes(changes: Sequence[Tensor], value: float) -> None:
    for change in changes:
        change.fill_(value)


def neuron_layers(classifier: Classifier) -> list[tuple[str, nn.Module]]:
    """BatchNorm's layers, or where there are none the convolutions and linear layers that are not the head."""
    layers: list[tuple[str, nn.Module]] = list(batch_norms(classifier.module))
    if not layers:
        head = classifier.head()
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        layers = [
            (name, part) for name, part in classifier.module.named_modules()
            if isinstance(part, kinds) and part is not head
        ]  # fmt: skip
    if not layers:
        raise UnsupportedModelError(
            f"{type(classifier.module).__name__} has no layer whose neurons could be pruned.", hint="Use ft instead."
        )
    return layers
