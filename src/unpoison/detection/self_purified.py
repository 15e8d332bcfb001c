"""PAD-FT's purification: the samples of a training set that the model trained on it is surest of.

Paper
    Xu, Gu, Sakurai. "PAD-FT: A Lightweight Defense for Backdoor Attacks via Data Purification and Fine-Tuning."
    arXiv 2409.12072, 2024.
Idea
    A model's loss is small where image and label agree: per class, the samples of smallest loss are a clean set that
    nobody has to collect.
Needs
    The model and its training set.
Steps
    1. l_i = a CE(p_i, y_i) + (1 - a) CE(y_i, p_i), the symmetric cross-entropy under the suspicious model.
    2. Per class, keep the n_c samples of smallest l: the self-purified set D_c.
Where we differ, and what the paper leaves open
    l falls strictly with p_y for every 0 < a < 1, so its order is that of log p_y: we take -log p_y in float64, where
    a saturated softmax still tells samples apart, and break ties by the margin of the logits.
    A model fits its poison at least as well as the rest, so in the target class this rule prefers poison. ``other``
    (ours) ranks by independent evidence as well, for example CGD's ranks, which no poisoned model has a say in.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from unpoison.detection.ranks import rank_normalise
from unpoison.errors import NotEnoughDataError
from unpoison.evidence import check_same_set
from unpoison.results import CLEAN, MIXED, SKIPPED, SUSPECT, Region, SampleScores, SkippedRow, Split

LOSS_AXIS, MARGIN_AXIS = "own_loss", "own_margin"


def score_by_own_loss(
    logits: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    ids: list[str],
    class_names: tuple[str, ...],
    skipped: tuple[SkippedRow, ...] = (),
) -> SampleScores:
    """Step 1: ``own_loss`` = -log p_y >= 0 and minus the margin z_y - max of the others; NaN rows stay NaN."""
    loss, margin = own_loss(logits, labels), label_margin(logits, labels)
    return SampleScores(
        method="own-loss",
        ids=ids,
        labels=labels,
        class_names=class_names,
        axes={LOSS_AXIS: loss, MARGIN_AXIS: -margin},
        primary=LOSS_AXIS,
        skipped=skipped,
    )


def with_suspects(split: Split, suspect: Int[np.ndarray, " s"]) -> Split:
    """The same split with those rows suspect that it does not trust. Ours: PAD-FT itself suspects nobody."""
    region = split.region.copy()
    region[suspect] = np.where(region[suspect] == MIXED, SUSPECT, region[suspect])
    return replace(split, region=region)


def own_loss(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """-log p_y = log(1 + sum over j != y of exp(z_j - z_y)) in float64: no p_y is so near 1 that it becomes 0."""
    logits = logits.astype(np.float64)
    rows = np.arange(len(labels))
    behind = logits - logits[rows, labels][:, None]
    behind[rows, labels] = -np.inf
    most = np.maximum(behind.max(axis=1, initial=-np.inf), 0)
    return most + np.log1p(np.exp(behind - most[:, None]).sum(axis=1) - (1 - np.exp(-most)))


def label_margin(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """z_y minus the largest other logit."""
    logits = logits.astype(np.float64)
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - others.max(axis=1, initial=-np.inf)


def select_clean(
    scores: SampleScores,
    per_class: int,
    *,
    other: SampleScores | None = None,
    share: float = 1.0,
    largest_share: float = 0.5,
) -> Split:
    """Step 2: the ``per_class`` least suspicious samples of each class are clean, the rest is mixed.

    ``other``: ranks within the class by its primary axis count with weight ``share`` in [0, 1], the rule's own with the
    rest; at 1 the rule's own order only breaks ties. Of no class more than ``largest_share`` in (0, 1] is trusted, or
    one sample. Raises NotEnoughDataError without a usable sample, ResultError where ``other`` is of another set, other
    labels or another order of classes.
    """
    loss, margin = scores.axes[LOSS_AXIS], scores.axes[MARGIN_AXIS]
    order = rank_normalise(loss, scores.labels)
    usable = ~np.isnan(loss)
    if other is not None:
        check_same_set(
            other, ids=scores.ids, labels=scores.labels, class_names=scores.class_names, name="the training set"
        )
        order = share * rank_normalise(other.suspicion, scores.labels) + (1 - share) * order
        usable &= ~np.isnan(other.suspicion)
    if not usable.any():
        raise NotEnoughDataError("usable samples to purify", have=0, need=1, hint="Look at the skipped rows.")
    region: Region = np.full(len(loss), MIXED, dtype=np.int8)
    for label in np.unique(scores.labels[usable]):
        members = np.flatnonzero(usable & (scores.labels == label))
        keys = (margin[members], loss[members], order[members])
        count = min(per_class, max(1, int(largest_share * len(members))))
        region[members[np.lexsort(keys)[:count]]] = CLEAN
    region[~usable] = SKIPPED
    return Split(
        method="self-purified" if other is None else f"self-purified+{other.method}",
        ids=scores.ids,
        labels=scores.labels,
        region=region,
        class_names=scores.class_names,
    )
