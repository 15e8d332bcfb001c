"""CGD, stage B: repair a backdoored classifier with the split that stage A made of its training set.

Paper
    Xu, Yang, Dai, Tang, Zhang. "CLIP-guided backdoor defense through entropy-based poisoned dataset separation."
    ACM MM 2025, arXiv 2507.05113.
Idea
    Keep training on the samples that both scorers find clean; on the suspect ones, pull the model toward CLIP's
    opinion and push the given label away. The shortcut is unlearnt, the rest is kept.
Needs
    The suspicious model and its training set. No clean samples: a part of the clean region is held out instead.
Protects
    The classifier's weights.
Steps
    1. Regions from the two ranks of stage A (:mod:`unpoison.detection.cgd`, :mod:`unpoison.detection.thresholds`).
    2. Over-sample the clean region per class up to its largest class.
    3. L = mean_clean CE(f(x), y) + alpha tau^2 mean_suspect KL(softmax(z / tau) || softmax(f(x) / tau))
       + beta mean_suspect log(p_f[y] + eps), z being CLIP's logits.
    4. SGD from the suspicious weights, all layers; crop and flip.
    5. Keep the last look that is not below the best by more than ``tolerance`` and what sampling explains, and accept
       or refuse, on held-out clean samples.
    6. Where the suspects still get their label by then, the same steps again with -insist mean_suspect log(1 - p_f[y])
       for the last term.
Where we differ, and what the paper leaves open
    The authors stop when clean *test* accuracy falls by 1.0 point from its best, and restore the epoch before. We hold
    out ``held_out`` of the clean region, by class, and judge on that. The rate falls to zero, so a dip early on is no
    reason to stop: training goes on, and what is kept is the last look that is not clearly worse than the best one. The
    samples held out are few, and the suspicious model knew them: by 1.0 point alone, chance chose a half-done repair.
    They count epochs (10 of at most 200 batches, no momentum, constant rate); on small sets that is too few steps to
    repair anything, so we count steps, with momentum and a rate that falls to zero. The mixed region is dropped from
    the loader (theirs still moves BatchNorm). A set without evidence of poison leaves the model as it is. Their
    alpha is 5e-4, over all classes; at 0.02, and among the classes that the label is not, the model learns from CLIP
    what stands under the trigger, so that triggered images get their own class and not just any other
    (docs/decisions/0010).
    Step 6 is ours: the slope of log p vanishes where a label is sure, and victims that were trained long are as sure as
    floats can say. A result whose suspects still get their label is refused, whatever its accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.data.pixels import Pixels, to_images
from unpoison.data.transforms import random_crop, random_flip
from unpoison.defenses.clipping import disbelief
from unpoison.defenses.repair import Repair, acceptable, check_batch_size, hold_out, label_accuracy
from unpoison.detection.cgd import SeparationConfig
from unpoison.detection.thresholds import OddLabels
from unpoison.errors import ConfigError, DivergedError
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.training import restore, state_of
from unpoison.types import Classifier, Labels, Logits


@dataclass(frozen=True, kw_only=True)
class CGDConfig:
    """CGD's constants. :meth:`as_published` gives the authors'; benchmarks/cgd.py is there to measure the others."""

    separation: SeparationConfig = field(default_factory=SeparationConfig)
    regions: Literal["estimated", "published"] = "estimated"
    """``published``: fixed percentiles sigma1, sigma2. ``estimated`` (ours): regions as large as the evidence."""
    odd_labels: OddLabels = "unlearn"
    """What the repair does with the doubtful samples of labels that are odd but not proved poisoned. Ours. A scan
    always leaves them out."""
    sigma1: float = 0.2
    sigma2: float = 0.1
    alpha: float = 0.02
    """Weight of the KL term. The authors' 5e-4 unlearns the trigger and leaves the image under it unread."""
    teacher: Literal["others", "all"] = "others"
    """What CLIP's opinion in the KL term is about: all classes, as the authors have it, or (ours) the others than the
    given label, which are compared among themselves: how sure the label still is, is left to the unlearning alone."""
    tau: float = 3.0
    """Temperature of the KL term."""
    beta: float = 0.025
    """Weight of the unlearning term; 0 leaves it out."""
    epsilon: float = 1e-6
    steps: int = 400
    """Optimiser steps. Ours."""
    learning_rate: float = 0.01
    momentum: float = 0.9
    """Ours; the authors use none."""
    schedule: Literal["linear", "constant"] = "linear"
    """Ours falls linearly to zero; the authors' rate is constant."""
    weight_decay: float = 5e-4
    batch_size: int = 256
    insist: float = 1.0
    """Weight of -log(1 - p_y) in step 6. Ours."""
    believed: float = 20.0
    """Percent of the suspects that may still get their label after ``steps`` (step 6), and in a result that is
    accepted. 100 leaves both out. Ours."""
    held_out: float = 0.05
    """Share of the clean region kept aside. Ours."""
    check_every: int = 50
    """Steps between looks at the held-out samples, also the unit of resume."""
    tolerance: float = 1.0
    """Points under the best held-out accuracy of all looks at which a look is no longer kept (the authors' fall), on
    top of twice that accuracy's standard error (ours)."""
    bound: float = 5.0
    """Largest fall of held-out accuracy, in points, that is accepted; the model was trained on these samples. Ours."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "batch_size", "check_every", "tau", "tolerance", "bound"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, got {self.held_out}.", hint="Try 0.05.")
        if not 0 < self.sigma2 <= self.sigma1 < 1:
            raise ConfigError(
                f"expected 0 < sigma2 <= sigma1 < 1, got {self.sigma1} and {self.sigma2}.", hint="Try 0.2 and 0.1."
            )

    @classmethod
    def as_published(cls, *, samples: int) -> CGDConfig:
        """The released code's setting for a set of ``samples`` (at most 10 epochs of at most 200 batches of 256)."""
        return cls(
            separation=SeparationConfig(clip_logit_scale=1.0, scorer_batch_size=256),
            regions="published",
            momentum=0.0,
            schedule="constant",
            believed=100.0,
            alpha=5e-4,
            teacher="all",
            steps=10 * min(200, max(1, samples // 256)),
        )


def repair_with_cgd(
    classifier: Classifier,
    pixels: Pixels,
    split: Split,
    cosines: Float[np.ndarray, "n c"],
    config: CGDConfig,
    *,
    run: Run,
) -> Repair:
    """Steps 2 to 6 on a copy of ``classifier``.

    Raises NotEnoughDataError, ConfigError (batches of one and BatchNorm), DivergedError.
    """
    check_batch_size(classifier, config.batch_size)
    repaired = classifier.copy()
    net = repaired.module.to(run.device)
    clean, held_out = hold_out(split.clean, split.labels, config.held_out, run.generator("hold-out"))
    clean = oversample(clean, split.labels, run.generator("oversample"))  # (2)
    pool, suspect_from = np.concatenate([clean, split.suspect]), len(clean)
    teacher = torch.from_numpy(config.separation.clip_logit_scale * cosines).float()
    optimiser = torch.optim.SGD(
        net.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    history = [_look(repaired, pixels, split, held_out, 0, run)]
    best, kept, kept_step = 0.0, {}, 0

    def some_steps(passed: int, first: int) -> dict[str, Tensor]:
        """From step ``first`` of the first or second pass to the next look."""
        net.train()
        generator = run.generator("repair", passed * config.steps + first)
        for step in range(first, min(first + config.check_every, config.steps)):
            if config.schedule == "linear":
                optimiser.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
            drawn = torch.randint(len(pool), (config.batch_size,), generator=generator).sort().values.numpy()
            rows, suspect = pool[drawn], torch.from_numpy(drawn >= suspect_from).to(run.device)
            images = random_flip(random_crop(to_images(pixels.array[rows]), 4, generator), generator)
            logits = repaired.logits(images.to(run.device)).float()
            labels, asked = torch.from_numpy(split.labels[rows]).to(run.device), teacher[rows].to(run.device)
            loss = cgd_loss(logits, labels, asked, suspect, config, insist=passed > 0)  # (3, 6)
            if not torch.isfinite(loss):
                raise DivergedError("CGD's repair", step=passed * config.steps + step, loss=float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()  # (4)
        return state_of(net, optimiser)

    for passed, what in enumerate(("repair", "repair, insisting")):
        for first in run.progress.track(
            range(0, config.steps, config.check_every), total=config.steps * config.batch_size, what=what,
            weight=config.check_every * config.batch_size, unit="images",
        ):  # fmt: skip
            name = passed * config.steps + first
            with run.seeded("repair", name):
                restore(net, optimiser, run.step(f"repair-{name:05d}", partial(some_steps, passed, first)))
            done = passed * config.steps + min(first + config.check_every, config.steps)
            history.append(_look(repaired, pixels, split, held_out, done, run))  # (5)
            accuracy = history[-1]["held_out_accuracy"]
            best = max(best, accuracy)
            if acceptable(accuracy, best, len(held_out), config.tolerance):
                kept, kept_step = state_of(net, optimiser), done
        if history[-1]["suspect_agreement"] <= config.believed:  # (6)
            break
    restore(net, optimiser, kept)
    net.eval()
    return Repair(classifier=repaired, history=history, steps=kept_step)


def cgd_loss(
    logits: Logits, labels: Labels, teacher: Logits, suspect: Tensor, config: CGDConfig, *, insist: bool = False
) -> Tensor:
    """Step 3 on one batch, or step 6; ``suspect`` [b] is true for samples of the suspect region. A term without samples
    is 0."""
    loss = logits.new_zeros(())
    if not bool(suspect.all()):
        loss = F.cross_entropy(logits[~suspect], labels[~suspect])
    if bool(suspect.any()):
        student, asked = logits[suspect], teacher[suspect]
        if config.teacher == "others":
            student, asked = (without_label(values, labels[suspect]) for values in (student, asked))
        loss = loss + config.alpha * config.tau**2 * teacher_divergence(student, asked, config.tau)
        if insist:
            loss = loss + config.insist * disbelief(logits[suspect], labels[suspect])
        else:
            loss = loss + config.beta * label_log_likelihood(logits[suspect], labels[suspect], config.epsilon)
    return loss


def teacher_divergence(logits: Logits, teacher: Logits, tau: float) -> Tensor:
    """mean KL(softmax(z / tau) || softmax(f / tau))."""
    student = (logits / tau).log_softmax(1)
    return F.kl_div(student, (teacher / tau).log_softmax(1), log_target=True, reduction="batchmean")


def without_label(logits: Logits, labels: Labels) -> Float[Tensor, "b others"]:
    """The logits of the classes that each sample's label is not, in their order."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, labels[:, None], False)
    return logits[others].view(len(logits), logits.shape[1] - 1)


def label_log_likelihood(logits: Logits, labels: Labels, epsilon: float) -> Tensor:
    """mean log(p_f[y] + eps); minimising it unlearns the given labels."""
    return (logits.softmax(1).gather(1, labels[:, None]).squeeze(1) + epsilon).log().mean()


def oversample(
    rows: Int[np.ndarray, " k"], labels: Int[np.ndarray, " n"], generator: torch.Generator
) -> Int[np.ndarray, " m"]:
    """Step 2: repeat each class's rows up to the size of the largest class, the remainder drawn without repeats."""
    classes, counts = np.unique(labels[rows], return_counts=True)
    parts = []
    for label, count in zip(classes, counts, strict=True):
        members = rows[labels[rows] == label]
        whole, rest = divmod(int(counts.max()), int(count))
        extra = members[torch.randperm(int(count), generator=generator).numpy()[:rest]]
        parts += [np.tile(members, whole), extra]
    return np.concatenate(parts)


def _look(
    classifier: Classifier, pixels: Pixels, split: Split, held_out: np.ndarray, step: int, run: Run
) -> dict[str, float]:
    return {
        "step": float(step),
        "held_out_accuracy": label_accuracy(classifier, pixels, split.labels, held_out, run=run),
        "suspect_agreement": label_accuracy(classifier, pixels, split.labels, split.suspect, run=run),
    }
