"""I-BAU: unlearn whatever one perturbation of all images can do, with the gradient that knows how it will adapt.

Paper
    Zeng, Chen, Park, Mao, Jin, Jia. "Adversarial Unlearning of Backdoors via Implicit Hypergradient." ICLR 2022, arXiv
    2110.03735.
Idea
    A trigger is a universal perturbation. Minimise over the weights the loss that the worst one causes; as the worst
    one depends on the weights, the gradient has an implicit part.
Needs
    The suspicious model and clean labelled samples: here the clean part of a split of its training set.
Protects
    The classifier's weights.
Steps
    1. delta* = argmax over ||delta|| <= radius of H(delta, w) = mean CE(f_w(x + delta), y), by gradient ascent.
    2. Hypergradient: grad_w H + (d delta* / d w)^T grad_delta H. With Phi(delta, w) = delta + eta grad_delta H, whose
       fixed point delta* is, the second term is solved for by K steps of v <- v dPhi/ddelta + grad_delta H, then
       v dPhi/dw.
    3. Step of the weights along it.
Where we differ, and what the paper leaves open
    H has -``decay``/2 ||delta||^2 added, so that Phi contracts. Images are in [0, 1] and the radius in their units. One
    batch a step; delta starts anew in each. BatchNorm keeps its statistics. Part of the clean samples is held out, and
    judges what is kept. Radius and rate are ours, for small images and nets: at a radius of 2.5 the small net loses
    its accuracy before its backdoor; at a rate of 1e-4 nothing happens, at 1e-3 it loses up to 28 points
    (benchmarks/pad_ft.py, --set tune).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unpoison.data.pixels import Pixels
from unpoison.defenses.repair import CleanData, CleanTrainingConfig, Repair, falling_rate, train_looks
from unpoison.errors import ConfigError
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.types import Classifier, Images, Labels


@dataclass(frozen=True, kw_only=True)
class IBAUConfig(CleanTrainingConfig):
    """I-BAU's constants; K is the paper's."""

    steps: int = 100
    batch_size: int = 100
    learning_rate: float = 3e-4
    """Adam's."""
    weight_decay: float = 0.0
    check_every: int = 20
    radius: float = 1.0
    """Largest L2 norm of the perturbation, for images in [0, 1]."""
    ascent_steps: int = 10
    ascent_rate: float = 0.2
    """Length of an ascent step, in L2 norm."""
    fixed_point_steps: int = 5
    """K."""
    eta: float = 0.1
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.radius, self.ascent_rate, self.eta) <= 0 or self.ascent_steps < 1 or self.fixed_point_steps < 0:
            raise ConfigError(
                "expected radius, ascent_rate and eta > 0, ascent_steps >= 1, fixed_point_steps >= 0.",
                hint="Try the defaults.",
            )


def repair_with_i_bau(classifier: Classifier, pixels: Pixels, split: Split, config: IBAUConfig, *, run: Run) -> Repair:
    """Steps 1 to 3 on a copy of ``classifier``. Raises NotEnoughDataError, DivergedError."""
    repaired = classifier.copy()
    data = CleanData.open(pixels, split, config.held_out, run)
    weights = [weight for weight in repaired.module.parameters() if weight.requires_grad]
    optimiser = torch.optim.Adam(weights, config.learning_rate)

    def one_step(step: int, generator: torch.Generator) -> Tensor:
        repaired.module.eval()
        images, labels = data.batch(config.batch_size, generator, run, augment=False)
        falling_rate(optimiser, step, config)
        delta = worst_perturbation(repaired, images, labels, config)  # (1)
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            loss, gradients = hypergradient(repaired, images, labels, delta, weights, config)  # (2)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimiser.step()  # (3)
        return loss

    return train_looks(repaired, optimiser, one_step, data, config, name="i-bau", run=run)


def perturbed_loss(classifier: Classifier, images: Images, labels: Labels, delta: Tensor) -> Float[Tensor, ""]:
    """mean CE(f(x + delta), y)."""
    return F.cross_entropy(classifier.logits(images + delta).float(), labels)


def worst_perturbation(
    classifier: Classifier, images: Images, labels: Labels, config: IBAUConfig
) -> Float[Tensor, "1 3 h w"]:
    """Step 1 from zero: steps along the gradient's direction, back onto the ball."""
    delta = torch.zeros_like(images[:1])
    for _ in range(config.ascent_steps):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(perturbed_loss(classifier, images, labels, delta), [delta])
        delta = delta.detach() + config.ascent_rate * gradient / gradient.norm().clamp_min(1e-12)
        delta = delta * (config.radius / delta.norm().clamp_min(1e-12)).clamp_max(1.0)
    return delta


def hypergradient(
    classifier: Classifier,
    images: Images,
    labels: Labels,
    delta: Float[Tensor, "1 3 h w"],
    weights: Sequence[Tensor],
    config: IBAUConfig,
) -> tuple[Tensor, list[Tensor]]:
    """Step 2: the loss at delta* and its total gradient with respect to ``weights``."""
    delta = delta.detach().requires_grad_()
    loss = perturbed_loss(classifier, images, labels, delta)
    (direct_delta,) = torch.autograd.grad(loss, [delta], create_graph=True)
    direct = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    phi = delta + config.eta * (direct_delta - config.decay * delta)
    aim = direct_delta.detach()
    v = aim
    for _ in range(config.fixed_point_steps):
        (pulled,) = torch.autograd.grad(phi, [delta], grad_outputs=v, retain_graph=True)
        v = pulled + aim
    implicit = torch.autograd.grad(phi, weights, grad_outputs=v, allow_unused=True)
    gradients = []
    for weight, first, second in zip(weights, direct, implicit, strict=True):
        parts = [part.detach() for part in (first, second) if part is not None]
        gradients.append(torch.stack(parts).sum(0) if parts else torch.zeros_like(weight))
    return loss.detach(), gradients
