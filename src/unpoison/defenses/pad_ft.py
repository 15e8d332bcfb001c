"""PAD-FT: purify a training set by the model's own losses, clip activations, tune the last layer.

Paper
    Xu, Gu, Sakurai. "PAD-FT: A Lightweight Defense for Backdoor Attacks via Data Purification and Fine-Tuning."
    arXiv 2409.12072, 2024.
Idea
    A backdoor needs activations that clean images never cause, and a last layer that listens to them. Cut the first
    off, tune the second on samples that the training set itself gives, and leave all other weights alone.
Needs
    The suspicious model and its training set. No clean samples from elsewhere.
Protects
    The classifier's last layer, behind clipped activations.
Steps
    1. D_c, the self-purified set: :mod:`unpoison.detection.self_purified`.
    2. Clip every activation; the bounds come from D_c alone.
    3. Fine-tune the last linear layer on D_c, clips active, everything else frozen and in evaluation mode.
Where we differ, and what the paper leaves open
    No code is public. The rule of the bounds is not known: we offer three (:mod:`unpoison.defenses.clipping`). The
    numbers of step 3 are ours: where labels are unlearnt, its rate is the largest of four that the head bears, by
    held-out samples, since which one that is depends on the size of the features. What a suspect is to be instead is
    what the clipped model would have said without that label. Features behind frozen layers are
    constant, so they are computed once, from plain images, and the head is trained on the stored features; with
    ``views`` also from shifted and mirrored copies. A saturated head hardly moves: ``reset_head`` draws it anew first.
    Part of D_c is held out; a repair that loses more than ``bound`` points there is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unpoison.data.pixels import Pixels, to_images
from unpoison.data.transforms import random_crop, random_flip
from unpoison.defenses.clipping import ClippingConfig, find_bounds
from unpoison.defenses.repair import RateConfig, Repair, at_largest_rate, hold_out, label_accuracy
from unpoison.detection.thresholds import OddLabels
from unpoison.errors import ConfigError, DivergedError
from unpoison.models.features import features_on
from unpoison.models.image_classifier import evaluation_mode, images_at_once
from unpoison.results import Split
from unpoison.runs import Run
from unpoison.types import Classifier


@dataclass(frozen=True, kw_only=True)
class PADFTConfig(RateConfig):
    """PAD-FT's constants; the paper names n_c only, the rest is ours."""

    per_class: int = 250
    """n_c: samples of each class in D_c. At most half of a class, unless more than this default is asked for."""
    scores_share: float = 1.0
    """Weight of the given scores' rank in the choice of D_c; the rest is the paper's rule. Ours."""
    odd_labels: OddLabels = "unlearn"
    """Whether the doubtful samples of labels that are odd but not proved poisoned are suspect too, as in CGD. Ours."""
    clip: ClippingConfig = field(default_factory=lambda: ClippingConfig(rule="suspects"))
    reset_head: bool = False
    """Draw the head anew before it is tuned."""
    epochs: int = 20
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    unlearn: float = 1.0
    """Weight of the suspect samples of the split, where there are any: cross-entropy to the model's own opinion of them
    once their label is taken from it. Ours; less costs less clean accuracy and leaves more of the backdoor."""
    gentle_rate: float = 0.01
    """The learning rate where no label is unlearnt: the head has nothing to let go of."""
    views: int = 0
    """Shifted and mirrored copies of D_c beside the plain one."""
    held_out: float = 0.1
    """Share of D_c kept aside to judge the repair by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("per_class", "epochs", "batch_size", "bound", "gentle_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if not 0 < self.held_out < 1 or not 0 <= self.scores_share <= 1 or self.views < 0:
            raise ConfigError(
                "expected held_out in (0, 1), scores_share in [0, 1], views of at least 0.", hint="Try the defaults."
            )

    @property
    def largest_share(self) -> float:
        """Share of a class that D_c may hold, in (0, 1]."""
        return 0.5 if self.per_class <= type(self).per_class else 1.0

    @classmethod
    def as_published(cls) -> PADFTConfig:
        """The paper's rule for D_c and its order of steps; the head is tuned from where it is."""
        return cls(scores_share=0.0, clip=ClippingConfig(rule="quantile"), unlearn=0.0)


def repair_with_pad_ft(
    classifier: Classifier, pixels: Pixels, split: Split, config: PADFTConfig, *, run: Run
) -> Repair:
    """Steps 2 and 3 on a copy of ``classifier``; D_c is ``split.clean``.

    Raises NotEnoughDataError, UnsupportedModelError (no linear last layer, no activation to clip), DivergedError.
    """
    chosen, held_out = hold_out(split.clean, split.labels, config.held_out, run.generator("hold-out"))
    before = label_accuracy(classifier, pixels, split.labels, held_out, run=run)
    bounds = find_bounds(
        classifier, pixels, chosen, config.clip, labels=split.labels, suspect=split.suspect, run=run
    )  # (2)
    clipped = classifier.copy().bounded(bounds)
    clipped.module.eval()
    features = [features_on(clipped, pixels, chosen, run=run)]
    features += [features_of_view(clipped, pixels, chosen, view, run=run) for view in range(config.views)]
    labels = torch.from_numpy(split.labels[chosen])
    doubted = None
    if config.unlearn > 0 and len(split.suspect):
        stored = features_on(clipped, pixels, split.suspect, run=run)
        doubted = stored, opinion_without(clipped.head(), stored, torch.from_numpy(split.labels[split.suspect]))
    steps = config.epochs * -(-len(chosen) // config.batch_size)
    head = sum(weight.numel() for weight in clipped.head().parameters())
    bound_count = sum(bound.numel() for bound in bounds)
    changed = head + (0 if config.clip.rule == "none" else bound_count)
    total = sum(weight.numel() for weight in clipped.module.parameters())

    def tuned(config: PADFTConfig) -> Repair:
        repaired = clipped.copy()
        tune_head(repaired, torch.stack(features), labels, config, doubted=doubted, run=run)  # (3)
        after = {
            "step": float(steps),
            "held_out_accuracy": label_accuracy(repaired, pixels, split.labels, held_out, run=run),
            "learning_rate": config.learning_rate,
        }
        return Repair(
            classifier=repaired,
            history=[{"step": 0.0, "held_out_accuracy": before}, after],
            steps=steps,
            changed_share=changed / (total + bound_count),
        )

    if doubted is None:
        return tuned(replace(config, learning_rate=config.gentle_rate, smaller_rates=()))
    return at_largest_rate(config, tuned)


def tune_head(
    classifier: Classifier,
    features: Float[Tensor, "views k d"],
    labels: Int[Tensor, " k"],
    config: PADFTConfig,
    *,
    doubted: tuple[Float[Tensor, "s d"], Float[Tensor, "s c"]] | None = None,
    run: Run,
) -> None:
    """Step 3 in place: SGD along a cosine on stored features; each epoch draws a view for each sample.

    ``doubted``: features of suspect samples, and the opinion that the head is to have of them.
    """
    head = classifier.head()
    with run.seeded("head"):
        if config.reset_head:
            head.reset_parameters()
    tuned = [weight.detach().float().cpu().requires_grad_() for weight in head.parameters()]
    optimiser = torch.optim.SGD(tuned, config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs)
    generator = run.generator("head batches")
    rows = torch.arange(len(labels))
    for epoch in range(config.epochs):
        seen = features[torch.randint(len(features), (len(rows),), generator=generator), rows]
        for drawn in torch.randperm(len(rows), generator=generator).split(config.batch_size):
            loss = F.cross_entropy(F.linear(seen[drawn], *tuned), labels[drawn])
            if doubted is not None:
                some = torch.randint(len(doubted[1]), (len(drawn),), generator=generator)
                loss = loss + config.unlearn * F.cross_entropy(F.linear(doubted[0][some], *tuned), doubted[1][some])
            if not torch.isfinite(loss):
                raise DivergedError("Tuning of the head", step=epoch, loss=float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    with torch.no_grad():
        for weight, value in zip(head.parameters(), tuned, strict=True):
            weight.copy_(value)


@torch.no_grad()
def opinion_without(head: nn.Module, features: Float[Tensor, "s d"], labels: Int[Tensor, " s"]) -> Float[Tensor, "s c"]:
    """The probabilities of the other classes when each sample's label is ruled out.

    The cross-entropy to them is -log(1 - p_y), plus a constant, plus how far what is left of p has moved from them:
    what stands under the trigger is kept as far as the model still sees it.
    """
    logits = F.linear(features, *(weight.float().cpu() for weight in head.parameters()))
    return logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)


@torch.inference_mode()
def features_of_view(
    classifier: Classifier, pixels: Pixels, rows: Int[np.ndarray, " k"], view: int, *, run: Run
) -> Float[Tensor, "k d"]:
    """The head's inputs for shifted and mirrored copies of ``rows``."""
    generator = run.generator("view", view)
    parts, size = [], images_at_once(run.device, pixels.array.shape[1])
    with evaluation_mode(classifier.module):
        for start in range(0, len(rows), size):
            images = to_images(pixels.array[rows[start : start + size]])
            images = random_flip(random_crop(images, 4, generator), generator)
            parts.append(classifier.features(images.to(run.device)).float().cpu())
    return torch.cat(parts)
