"""Where to cut a network's activations: above what clean samples need, below what a trigger drives them to.

Papers
    Wang, Xiang, Miller, Kesidis. "Universal post-training backdoor detection and mitigation" (MM-BD, IEEE S&P 2024) and
    "Improved activation clipping for universal backdoor mitigation and test-time detection" (MMAC, MLSP 2024).
Rules
    ``quantile`` (ours): per channel the 0.995 quantile over all positions of all clean samples. One forward pass.
    ``learned``: bounds Z that minimise mean ||f(x; Z) - f(x)||^2 + c sum_sites ||Z||_2, from each channel's maximum. c
    grows while the clipped model's accuracy on the clean samples holds, and falls while it does not.
    ``margin``: the same with c sum_classes (largest margin that any image reaches) in place of the norms. The largest
    margin is that of noise images climbing it while Z is learned.
    ``suspects`` (ours): bounds that keep the model's opinion of clean samples and take its belief in the labels of
    suspect ones: KL(f(x) || f(x; Z)) on clean samples - w mean log(1 - p_y(x; Z)) on suspect ones, by Adam. The second
    term fades by itself once the labels are no longer believed. It needs samples that are suspect: without any, the
    quantile rule takes its place.
Where we differ, and what the papers leave open
    One step of the noise images to each step of Z. Every activation is clipped, not a chosen few. c changes every fifth
    of the epochs from two fifths on (20, 30, 40 of 50), which is the published schedule of ``learned``.
    In ``margin``, c multiplies the sum of the margins of as many noise images as there are classes, drawn anew at every
    step, not of all of them (50 a class): 0.002 weighs a fiftieth of what it does there.
    A model that is clipped already keeps its bounds where the new ones would be wider.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unpoison.data.pixels import Pixels, to_images
from unpoison.detection.cgd import apply_classifier
from unpoison.errors import ConfigError, UnsupportedModelError
from unpoison.models.activations import AtActivations, channel_rows
from unpoison.models.image_classifier import evaluation_mode, images_at_once
from unpoison.runs import Run
from unpoison.training import restore, state_of
from unpoison.types import Bound, Classifier, Logits

ClipRule = Literal["none", "quantile", "learned", "margin", "suspects"]
_SAMPLED = 2**16  # values of a channel behind its quantile
_NOT_BELIEVED = 1e-6  # probability of a label
_STAGES = 10  # of the rules that learn for long


@dataclass(frozen=True, kw_only=True)
class ClippingConfig:
    """``quantile`` for the rule of this name, the rest for the other two."""

    rule: ClipRule = "quantile"
    quantile: float = 0.995
    epochs: int | None = None
    """None: 50 for ``learned``, 300 for ``margin``."""
    batch_size: int = 200
    learning_rate: float = 0.1
    """Adam's, of the bounds; a share of each channel's own maximum (ours: networks differ in scale)."""
    weight: float | None = None
    """c at the start. None: 0.5 for ``learned``, 0.002 for ``margin``."""
    weight_factor: float = 1.2
    least_accuracy: float = 95.0
    """On the clean samples, in percent of what the unclipped model reaches, above which c grows."""
    noise_images: int = 50
    """For each class, for the rule ``margin``."""
    suspect_steps: int = 40
    """Adam steps of the rule ``suspects``. At an epsilon of 1e-8 four times the samples gained nothing."""
    suspect_batch: int = 100
    """Samples of such a step: half of them clean, half suspect."""
    suspect_weight: float = 1.0
    """w of the rule ``suspects``."""
    suspect_epsilon: float = 1e-2
    """Adam's epsilon in the rule ``suspects``: bounds whose gradient is small beside it hardly move. With 1e-8 all move
    alike, those too that no suspect asks for, which costs accuracy."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(ClipRule):
            raise ConfigError(f"no clip rule {self.rule!r}.", hint=f"Choose one of {', '.join(get_args(ClipRule))}.")
        if not 0 < self.quantile <= 1:
            raise ConfigError(f"quantile must lie in (0, 1], got {self.quantile}.", hint="Try 0.995.")
        if min(self.batch_size, self.suspect_batch, self.noise_images) < 1:
            raise ConfigError(
                "batch_size, suspect_batch and noise_images must be at least 1.", hint="Leave them at their defaults."
            )
        if not self.learning_rate > 0 or self.weight_factor < 1:
            raise ConfigError("expected learning_rate > 0 and weight_factor >= 1.", hint="Try 0.1 and 1.2.")


def find_bounds(
    classifier: Classifier,
    pixels: Pixels,
    rows: Int[np.ndarray, " k"],
    config: ClippingConfig,
    *,
    labels: Int[np.ndarray, " n"],
    suspect: Int[np.ndarray, " s"],
    run: Run,
) -> tuple[Bound, ...]:
    """Bounds by the rule that is used (:func:`used_rule`) from the clean samples ``rows``; for "none", those that the
    model has. They are never wider than those. The model stays as it is.

    ``suspect`` samples and their ``labels`` are for the rule of this name. Raises UnsupportedModelError for a network
    that calls no activation function.
    """
    rule = used_rule(config, suspect)
    if rule == "none":
        return tuple(classifier.bounds)
    with evaluation_mode(classifier.module.to(run.device)):
        if rule == "quantile":
            found = channel_quantiles(classifier, pixels, rows, config.quantile, run=run)
            return no_wider(found, classifier.bounds)
        start = no_wider(channel_quantiles(classifier, pixels, rows, 1.0, run=run), classifier.bounds)
        if rule == "suspects":
            found = _unlearn(classifier, pixels, rows, suspect, labels, start, config, run)
        else:
            found = _learn(classifier, pixels, rows, start, config, run)
    return no_wider(found, classifier.bounds)


def used_rule(config: ClippingConfig, suspect: Int[np.ndarray, " s"]) -> ClipRule:
    """The rule that makes the bounds: where nothing is suspect, "quantile" takes the place of "suspects"."""
    return "quantile" if config.rule == "suspects" and len(suspect) == 0 else config.rule


def no_wider(bounds: Sequence[Bound], than: Sequence[Bound]) -> tuple[Bound, ...]:
    """The smaller of both, channel by channel; ``bounds`` themselves where there are no others."""
    if not than:
        return tuple(bounds)
    return tuple(torch.minimum(bound, other.to(bound)) for bound, other in zip(bounds, than, strict=True))


@torch.no_grad()
def channel_quantiles(
    classifier: Classifier, pixels: Pixels, rows: Int[np.ndarray, " k"], quantile: float, *, run: Run
) -> tuple[Bound, ...]:
    """Each channel's quantile over samples and positions, at every site.

    Of long streams it is that of an even sample: the same number of positions of every image, drawn with repeats. The
    maximum (a quantile of 1) is over all positions.
    """
    kept: list[list[Tensor]] = []
    each = max(1, _SAMPLED // max(1, len(rows)))
    generator = run.generator("positions")
    size = images_at_once(run.device, pixels.array.shape[1])
    starts = range(0, len(rows), size)

    def keep(index: int, output: Tensor) -> Tensor:
        if index == len(kept):
            kept.append([])
        site, values = kept[index], channel_rows(output)
        if quantile == 1.0:
            site[:] = [torch.stack([values.amax(0), *site]).amax(0)] if site else [values.amax(0)]
        else:
            places = len(values) // len(output)
            drawn = torch.randint(places, (len(output), min(each, places)), generator=generator)
            chosen = (drawn + places * torch.arange(len(output))[:, None]).flatten()
            site.append(values[chosen.to(values.device)].float().cpu())
        return output

    for start in run.progress.track(starts, total=len(rows), what="activations", weight=size, unit="images"):
        images = to_images(pixels.array[rows[start : start + size]]).to(run.device)
        with AtActivations(keep):
            classifier.logits(images)
    if not kept:
        raise UnsupportedModelError(
            f"{type(classifier.module).__name__} calls none of torch's activation functions: nothing can be clipped.",
            hint='Set clip to "none", or use a network with ReLU, GELU or the like.',
        )
    if quantile == 1.0:
        return tuple(site[0].float().cpu() for site in kept)
    return tuple(_quantile(torch.cat(site), quantile) for site in kept)


def _quantile(values: Float[Tensor, "rows channels"], quantile: float) -> Bound:
    """The value that a share of ``quantile`` of each column's rows does not exceed."""
    place = min(len(values), max(1, int(np.ceil(quantile * len(values)))))
    return values.kthvalue(place, dim=0).values


def _learn(
    classifier: Classifier,
    pixels: Pixels,
    rows: np.ndarray,
    start: tuple[Bound, ...],
    config: ClippingConfig,
    run: Run,
) -> tuple[Bound, ...]:
    """The rules ``learned`` and ``margin``, a stage at a time: an interrupted run goes on after the last one."""
    margin = config.rule == "margin"
    epochs = config.epochs or (300 if margin else 50)
    weight = config.weight if config.weight is not None else (0.002 if margin else 0.5)
    scale = [bound.to(run.device).clamp_min(1e-6) for bound in start]
    classes = len(classifier.class_names)
    side = classifier.image_size
    noise = torch.rand(classes * config.noise_images, 3, side, side, generator=run.generator("noise images"))
    aims = torch.arange(classes, device=run.device).repeat_interleave(config.noise_images)
    learnt = nn.ParameterDict({f"site-{site:03d}": torch.ones_like(bound) for site, bound in enumerate(scale)})
    shares = list(learnt.values())
    groups: list[dict[str, Any]] = [{"params": shares}]
    if margin:
        learnt["noise"] = noise.to(run.device)
        groups.append({"params": [learnt["noise"]], "maximize": True})  # up, where the bounds go down
    learnt.register_buffer("weight", torch.tensor(weight, dtype=torch.float64))
    optimiser = torch.optim.Adam(groups, config.learning_rate)
    with torch.no_grad():
        targets = [classifier.logits(part) for part in _batches(pixels, rows, config.batch_size, run)]

    def one_epoch(epoch: int) -> None:
        right, seen, weight = 0, 0, float(learnt.get_buffer("weight"))
        for images, target in zip(_batches(pixels, rows, config.batch_size, run), targets, strict=True):
            bounds = [share * most for share, most in zip(shares, scale, strict=True)]
            logits = classifier.bounded(bounds).logits(images)
            loss = (logits - target).square().sum(1).mean()
            if margin:
                drawn = torch.randperm(len(noise), generator=run.generator("drawn", epoch, seen))[:classes]
                shown = learnt["noise"][drawn.to(run.device)]
                high = margins(classifier.bounded(bounds).logits(shown), aims[drawn.to(run.device)])
                loss = loss + weight * high.sum()
            else:
                loss = loss + weight * torch.stack([bound.norm() for bound in bounds]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for values in learnt.values():
                    values.clamp_(0, 1)
            right += int((logits.argmax(1) == target.argmax(1)).sum())
            seen += len(images)
        if epoch + 1 >= 0.4 * epochs and (epoch + 1) % max(1, epochs // 5) == 0 and epoch + 1 < epochs:
            kept = 100 * right / seen >= config.least_accuracy
            learnt.get_buffer("weight").fill_(weight * config.weight_factor if kept else weight / config.weight_factor)

    def one_stage(first: int) -> dict[str, Tensor]:
        for epoch in range(first, min(first + stage, epochs)):
            one_epoch(epoch)
        return state_of(learnt, optimiser)

    stage = -(-epochs // _STAGES)
    with frozen_weights(classifier):
        for first in run.progress.track(
            range(0, epochs, stage), total=epochs, what=f"{config.rule} bounds", weight=stage, unit="epochs"
        ):
            name = f"bounds-{config.rule}-{first:04d}"
            restore(learnt, optimiser, run.step(name, partial(one_stage, first)))
    return tuple((share * most).detach().cpu() for share, most in zip(shares, scale, strict=True))


def _unlearn(
    classifier: Classifier,
    pixels: Pixels,
    rows: np.ndarray,
    suspect: np.ndarray,
    labels: np.ndarray,
    start: tuple[Bound, ...],
    config: ClippingConfig,
    run: Run,
) -> tuple[Bound, ...]:
    """The rule ``suspects``."""
    scale = [bound.to(run.device).clamp_min(1e-6) for bound in start]
    shares = [torch.ones_like(bound, requires_grad=True) for bound in scale]
    optimiser = torch.optim.Adam(shares, config.learning_rate, eps=config.suspect_epsilon)
    generator = run.generator("suspect bounds")
    half = max(1, config.suspect_batch // 2)
    targets = torch.from_numpy(apply_classifier(classifier, pixels, rows, run=run)).float()
    with frozen_weights(classifier):
        for step in run.progress.track(
            range(config.suspect_steps), total=config.suspect_steps, what="bounds", unit="steps"
        ):
            optimiser.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.suspect_steps)
            places, doubted = (
                torch.randint(len(part), (half,), generator=generator).numpy() for part in (rows, suspect)
            )
            images = to_images(pixels.array[np.concatenate([rows[places], suspect[doubted]])]).to(run.device)
            target = targets[places].to(run.device)
            bounds = [share * most for share, most in zip(shares, scale, strict=True)]
            logits = classifier.bounded(bounds).logits(images).float()
            given = torch.from_numpy(labels[suspect[doubted]]).to(run.device)
            kept = F.kl_div(logits[:half].log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")
            loss = kept + config.suspect_weight * disbelief(logits[half:], given)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            for share in shares:
                share.data.clamp_(0, 1)
    return tuple((share * most).detach().cpu() for share, most in zip(shares, scale, strict=True))


def disbelief(logits: Logits, labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """-mean log(1 - p_y): large while the label is believed, with a gradient that does not vanish there.

    Where the label is not believed at all it is 0 without a gradient: what is left of one would be numbers so small
    that processors take a hundred times as long to pass them back.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    believed = logits.detach().softmax(1).gather(1, labels[:, None])[:, 0] > _NOT_BELIEVED
    return torch.where(believed, logits.logsumexp(1) - others, 0.0).mean()


@contextmanager
def frozen_weights(classifier: Classifier) -> Iterator[None]:
    """No gradient is made for the weights inside."""
    parameters = [weight for weight in classifier.module.parameters() if weight.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def margins(logits: Logits, classes: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """z_c minus the largest other logit."""
    own = F.one_hot(classes, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)


def _batches(pixels: Pixels, rows: np.ndarray, size: int, run: Run):
    for start in range(0, len(rows), size):
        yield to_images(pixels.array[rows[start : start + size]]).to(run.device)
