"""CGD, stage A: score every sample by a public CLIP and by models stopped early, and split the set by both.

Paper
    Xu, Yang, Dai, Tang, Zhang. "CLIP-guided backdoor defense through entropy-based poisoned dataset separation."
    ACM MM 2025, arXiv 2507.05113.
Idea
    A poisoned label is one that an independent CLIP does not believe, and one that a fresh network learns
    suspiciously early, since a trigger is easier than an object. Two losses against the given labels, two ranks.
Needs
    The labelled set, its class names, a public CLIP. No clean samples, no ground truth.
Steps
    1. Weak scorer: CLIP's zero-shot cosines, one text per class.
    2. Intermediate scorer: fresh networks of the suspicious model's architecture, trained a few epochs on the whole
       set; their mean logits.
    3. Cross-entropy of both against the given label.
    4. Ranks over the set, in (0, 1].
    5. Regions: see :mod:`unpoison.detection.thresholds`.
Where we differ, and what the paper leaves open
    The paper trains PreActResNet-18 scorers for every model; ours have the suspicious model's own architecture.
    The released code ranks raw cosines; ``clip_logit_scale`` and ``rank_within`` are ours. Five epochs are few steps on
    a small set: there the early models train longer. Five epochs are long on a huge
    one: there ``scorer_samples``, ours, says how many samples they are trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.data.pixels import Pixels, to_images
from unpoison.data.sources import LabelledImages, draw
from unpoison.detection.ranks import label_cross_entropy, rank_normalise
from unpoison.errors import ConfigError, DivergedError
from unpoison.models.image_classifier import evaluation_mode, images_at_once
from unpoison.models.zero_shot import ZeroShot
from unpoison.results import SampleScores, SkippedRow
from unpoison.runs import Run
from unpoison.types import Classifier

CLIP_AXIS, EARLY_AXIS, JOINT_AXIS, MEAN_AXIS = "clip_rank", "early_rank", "joint_rank", "mean_rank"
BATCH, SMALLEST_BATCH, FULL_BATCH_SAMPLES = 256, 16, 10_000
"""A trigger is learnt after so many steps, not after so many epochs: five epochs of 2,500 samples in batches of 256 are
45 steps, and poison is then still among the hardest samples. More epochs let the objects catch up; smaller batches do
not."""


@dataclass(frozen=True, kw_only=True)
class SeparationConfig:
    """Stage A's constants, the paper's unless marked ours."""

    clip_logit_scale: float = 100.0
    """Factor on the cosines before the softmax. The released code has 1; 100 is CLIP's own. Ours."""
    rank_within: Literal["dataset", "class"] = "dataset"
    """Rank over the whole set (the paper) or among the samples of the same given label (ours)."""
    scorers: int = 3
    """Networks whose logits are averaged into the intermediate scorer."""
    scorer_epochs: int = 5
    scorer_learning_rate: float = 3e-4
    scorer_weight_decay: float = 5e-4
    scorer_batch_size: int | None = None
    """None: 256 (the paper's) from 10,000 samples on, less in a smaller set, see :meth:`batch_size` (ours)."""
    scorer_samples: int | None = None
    """Samples, drawn at random, that the early models are trained on; all are judged. None: all (the paper). Ours."""

    def __post_init__(self) -> None:
        positive = ("clip_logit_scale", "scorers", "scorer_epochs", "scorer_learning_rate", "scorer_batch_size")
        for name in (*positive, "scorer_samples"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}.", hint=f"Raise {name}.")
        if self.rank_within not in ("dataset", "class"):
            raise ConfigError(
                f"rank_within must be 'dataset' or 'class', got {self.rank_within!r}.", hint="Choose one of the two."
            )

    def batch_size(self, samples: int) -> int:
        """Of an early model: falls with samples^1.5 under 10,000, so that a smaller set gets more steps in as many
        epochs (390 at 2,500 samples, 195 at 10,000); not under 16, and never more than there are samples."""
        size = self.scorer_batch_size
        if size is None:
            share = min(1.0, samples / FULL_BATCH_SAMPLES)
            size = max(SMALLEST_BATCH, round(BATCH * share**1.5))
        return max(1, min(size, samples))


def score_with_cgd(
    classifier: Classifier,
    source: LabelledImages,
    pixels: Pixels,
    zero_shot: ZeroShot,
    config: SeparationConfig,
    *,
    run: Run,
) -> SampleScores:
    """Steps 1 to 4: the axes ``clip_rank`` and ``early_rank`` in (0, 1] and the raw losses behind them.

    ``joint_rank``, ours, is the smaller of the two ranks: high where CLIP disagrees *and* the label was learnt early.
    Raises DivergedError.
    """
    clip_loss = label_cross_entropy(config.clip_logit_scale * zero_shot.cosines, source.labels)  # (1), (3)
    early_logits = early_model_logits(classifier, pixels, source.labels, config, run=run)  # (2)
    early_loss = label_cross_entropy(early_logits, source.labels)  # (3)
    return scores_of_losses(
        source,
        clip_loss,
        early_loss,
        config,
        skipped=merged_skips(source, zero_shot, pixels),
        agreement=agreement(first_choices(zero_shot.cosines), source.labels),
    )


def scores_of_losses(
    source: LabelledImages,
    clip_loss: Float[np.ndarray, " n"],
    early_loss: Float[np.ndarray, " n"],
    config: SeparationConfig,
    *,
    skipped: tuple[SkippedRow, ...],
    agreement: float,
) -> SampleScores:
    """Step 4 for losses, NaN where a row was skipped, however they were come by; ``agreement`` in percent."""
    unusable = np.isnan(clip_loss) | np.isnan(early_loss)
    clip_loss, early_loss = (np.where(unusable, np.nan, loss) for loss in (clip_loss, early_loss))
    groups = source.labels if config.rank_within == "class" else None
    clip_rank = rank_normalise(clip_loss, groups)  # (4)
    early_rank = rank_normalise(-early_loss, groups)
    return SampleScores(
        method="cgd",
        ids=list(source.ids),
        labels=source.labels,
        class_names=source.class_names,
        axes={
            CLIP_AXIS: clip_rank,
            EARLY_AXIS: early_rank,
            JOINT_AXIS: np.minimum(clip_rank, early_rank),
            "clip_loss": clip_loss,
            "early_ease": -early_loss,
        },
        primary=JOINT_AXIS,
        skipped=skipped,
        details={"clip_agreement": agreement},
    )


def with_mean_rank(scores: SampleScores) -> SampleScores:
    """The same scores with the mean of both ranks as the primary axis: low only where CLIP agrees *and* the label was
    learnt late. ``joint_rank`` finds what is poisoned for sure; this one finds what is clean for sure. Ours."""
    mean = (scores.axes[CLIP_AXIS] + scores.axes[EARLY_AXIS]) / 2
    return replace(scores, axes=scores.axes | {MEAN_AXIS: mean}, primary=MEAN_AXIS)


def early_model_logits(
    classifier: Classifier,
    pixels: Pixels,
    labels: Int[np.ndarray, " n"],
    config: SeparationConfig,
    *,
    run: Run,
) -> Float[np.ndarray, "n c"]:
    """Mean logits of ``config.scorers`` fresh models after a few epochs on the set; NaN where unusable."""
    total = np.zeros((len(labels), len(classifier.class_names)), dtype=np.float64)
    rows = np.flatnonzero(pixels.usable)
    drawn = training_rows(len(labels), config, run)
    drawn = drawn[pixels.usable[drawn]]
    for index in range(config.scorers):

        def train_and_apply(index: int = index) -> dict[str, Tensor]:
            scorer = train_early_model(classifier, pixels, labels, drawn, config, index, run=run)
            return {"logits": torch.from_numpy(apply_classifier(scorer, pixels, rows, run=run))}

        total[rows] += run.step(f"scorer-{index}", train_and_apply)["logits"].numpy()
    total[~pixels.usable] = np.nan
    return total / config.scorers


def training_rows(total: int, config: SeparationConfig, run: Run) -> Int[np.ndarray, " k"]:
    """The rows, in order, that the early models are trained on: all, or ``config.scorer_samples`` drawn at random."""
    if config.scorer_samples is None or config.scorer_samples >= total:
        return np.arange(total)
    return draw(total, config.scorer_samples, run.seed_of("scorer samples"))


def train_early_model(
    classifier: Classifier,
    pixels: Pixels,
    labels: Int[np.ndarray, " n"],
    rows: Int[np.ndarray, " k"],
    config: SeparationConfig,
    index: int,
    *,
    run: Run,
) -> Classifier:
    """The early model number ``index`` (from 0): a fresh network after a few epochs on ``rows``. Raises DivergedError.

    ``rows`` point into ``pixels`` and ``labels``; where these begin does not change the result.
    """
    with run.seeded("scorer", index):
        scorer = classifier.fresh(run.seed_of("scorer", index))
        track = run.progress.track(
            range(config.scorer_epochs),
            total=config.scorer_epochs * len(rows),
            what=f"early model {index + 1} of {config.scorers}",
            weight=len(rows),
            unit="images",
        )
        _train_early(scorer, pixels, labels, rows, config, track, run, index)
    return scorer


def _train_early(
    scorer: Classifier,
    pixels: Pixels,
    labels: np.ndarray,
    rows: np.ndarray,
    config: SeparationConfig,
    epochs,
    run: Run,
    index: int,
) -> None:
    net = scorer.module.to(run.device).train()
    optimiser = torch.optim.Adam(net.parameters(), config.scorer_learning_rate, weight_decay=config.scorer_weight_decay)
    size = config.batch_size(len(rows))
    for epoch in epochs:
        order = rows[torch.randperm(len(rows), generator=run.generator("scorer", index, epoch)).numpy()]
        for start in range(0, len(order) - size + 1, size):
            chosen = np.sort(order[start : start + size])
            logits = scorer.logits(to_images(pixels.array[chosen]).to(run.device))
            loss = F.cross_entropy(logits, torch.from_numpy(labels[chosen]).to(run.device))
            if not torch.isfinite(loss):
                raise DivergedError("Training of an early model", step=start // size, loss=float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@torch.no_grad()
def apply_classifier(
    classifier: Classifier, pixels: Pixels, rows: Int[np.ndarray, " k"], *, run: Run
) -> Float[np.ndarray, "k c"]:
    """Logits [k, c] of the classifier, in evaluation mode, on the given rows."""
    size = images_at_once(run.device, pixels.array.shape[1])
    with evaluation_mode(classifier.module.to(run.device)):
        parts = [
            classifier.logits(to_images(pixels.array[rows[start : start + size]]).to(run.device)).float().cpu()
            for start in range(0, len(rows), size)
        ]
    return torch.cat(parts).numpy()


def first_choices(cosines: Float[np.ndarray, "n c"]) -> Int[np.ndarray, " n"]:
    """The class that CLIP would give each sample, -1 where it was skipped."""
    usable = ~np.isnan(cosines).any(axis=1)
    choices = np.full(len(cosines), -1, dtype=np.int64)
    choices[usable] = cosines[usable].argmax(axis=1)
    return choices


def agreement(choices: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Share, in percent, of usable samples whose given label is CLIP's first choice."""
    usable = choices >= 0
    return 100.0 * float((choices[usable] == labels[usable]).mean()) if usable.any() else 0.0


def merged_skips(source: LabelledImages, zero_shot: ZeroShot, pixels: Pixels) -> tuple:
    """Every skipped row once, in the order of discovery."""
    return tuple({row.id: row for row in (*source.skipped, *zero_shot.skipped, *pixels.skipped)}.values())
