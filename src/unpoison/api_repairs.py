"""Repairs of classifiers beside CGD's: PAD-FT, and the classics that are fed the clean part of a split.

from unpoison import load_classifier, load_clip, open_images, purify_with_pad_ft
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from unpoison.api import REPAIR_LIMITS, PurifyOutcome, check_classes, describe_samples
from unpoison.data.pixels import Pixels, load_pixels
from unpoison.data.sources import LabelledImages
from unpoison.defenses.baselines.abl import ABLConfig, repair_with_abl
from unpoison.defenses.baselines.anp import ANPConfig, repair_with_anp
from unpoison.defenses.baselines.fine_pruning import FinePruningConfig, repair_with_fine_pruning
from unpoison.defenses.baselines.ft import FTConfig, repair_with_ft
from unpoison.defenses.baselines.ft_sam import FTSAMConfig, repair_with_ft_sam
from unpoison.defenses.baselines.i_bau import IBAUConfig, repair_with_i_bau
from unpoison.defenses.baselines.nad import NADConfig, repair_with_nad
from unpoison.defenses.pad_ft import PADFTConfig, repair_with_pad_ft
from unpoison.defenses.repair import Repair, label_accuracy
from unpoison.detection.cgd import (
    CLIP_AXIS,
    EARLY_AXIS,
    SeparationConfig,
    apply_classifier,
    first_choices,
    score_with_cgd,
    with_mean_rank,
)
from unpoison.detection.self_purified import LOSS_AXIS, score_by_own_loss, select_clean, with_suspects
from unpoison.detection.thresholds import split_by_evidence
from unpoison.errors import DataError, NotEnoughDataError, ResultError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.zero_shot import zero_shot_logits
from unpoison.results import Purification, SampleScores, Split, clip_too_weak
from unpoison.runs import Run
from unpoison.types import Classifier, ZeroShotModel

FOREIGN_AGREEMENT = 60.0
"""Percent of given labels that a model says, under which the set hardly is the one that it was trained on."""
BELIEVED = 20.0
"""Percent of the suspects that get their label from a repaired model, above which it is said."""
PAD_FT_LIMITS = (
    *REPAIR_LIMITS,
    "Triggers whose activations stay among those of clean images: only the last layer and the bounds were changed.",
)


def purify_with_pad_ft(
    classifier: Classifier,
    source: LabelledImages,
    *,
    clip: ZeroShotModel | None = None,
    scores: SampleScores | None = None,
    config: PADFTConfig | None = None,
    run: Run | None = None,
) -> PurifyOutcome:
    """Clip the activations and tune the last layer on samples that the training set itself gives.

    ``scores`` of any detector choose them together with the model's own losses (``config.scores_share``); with a
    ``clip`` CGD's are made; with neither the paper's rule alone decides, which prefers poison. The caller's model is
    never changed. Raises NotEnoughDataError, SourceFormatError, DataError, UnsupportedModelError, DivergedError.
    """
    run, config = run or Run(), config or PADFTConfig()
    begun, classifier = time.monotonic(), classifier.copy()
    known = _open(classifier, source, run)
    estimate, choices, suspect = None, None, np.zeros(0, dtype=np.int64)
    if scores is None and clip is not None and config.scores_share > 0:
        zero_shot = zero_shot_logits(clip, source, run=run)
        scores = score_with_cgd(classifier, source, known.pixels, zero_shot, SeparationConfig(), run=run)
        choices = first_choices(zero_shot.cosines)
    if scores is not None and {CLIP_AXIS, EARLY_AXIS} <= scores.axes.keys():
        separated = split_by_evidence(scores, odd=config.odd_labels)
        estimate, suspect, scores = separated.estimate, separated.suspect, with_mean_rank(scores)
    share = config.scores_share if scores is not None else 0.0
    split = with_suspects(select_clean(known.own, config.per_class, other=scores, share=share), suspect)
    split = replace(split, estimate=estimate)
    check_every_class(split)
    repair = repair_with_pad_ft(classifier, known.pixels, split, config, run=run)
    shown = known.own if scores is None else replace(scores, axes=scores.axes | {LOSS_AXIS: known.own.suspicion})
    believed = warn_of_suspects(repair.classifier, known.pixels, split, run)
    purification = _purification(
        "pad-ft", classifier, source, repair, split, config, run,
        bound=config.bound,
        seconds=time.monotonic() - begun,
        protects="the classifier's last layer, behind clipped activations",
        limits=PAD_FT_LIMITS,
        warnings=known.warnings + _warnings(scores, split) + believed,
        inputs={} if clip is None else {"clip": clip.fingerprint},
    )  # fmt: skip
    samples = describe_samples(source, shown, split, choices)
    return PurifyOutcome(
        classifier=repair.classifier, purification=purification, scores=shown, split=split, samples=samples
    )


def _warnings(scores: SampleScores | None, split: Split) -> tuple[str, ...]:
    if scores is None:
        return (
            "The samples to tune on were chosen by the model's own losses alone: where it was poisoned, many of the "
            "target class are poison. Give a CLIP or the scores of a scan.",
        )
    if len(split.suspect) and split.estimate is not None and not split.estimate.poisoned:
        return ("Poisoning was not proved: the doubtful samples of odd labels were unlearnt (odd_labels).",)
    return ()


def warn_of_suspects(repaired: Classifier, pixels: Pixels, split: Split, run: Run) -> tuple[str, ...]:
    """What to say where the repaired model still gives many suspects their label, without any ground truth."""
    believed = label_accuracy(repaired, pixels, split.labels, split.suspect, run=run)
    if believed <= BELIEVED:
        return ()
    return (
        f"The repaired model still gives {believed:.0f} percent of the {len(split.suspect):,} suspects their label: "
        "where they are poison, the backdoor is still there.",
    )


RepairFunction = Callable[..., Repair]
CLASSICS: dict[str, tuple[RepairFunction, type[Any]]] = {
    "ft": (repair_with_ft, FTConfig),
    "ft-sam": (repair_with_ft_sam, FTSAMConfig),
    "fine-pruning": (repair_with_fine_pruning, FinePruningConfig),
    "nad": (repair_with_nad, NADConfig),
    "anp": (repair_with_anp, ANPConfig),
    "i-bau": (repair_with_i_bau, IBAUConfig),
    "abl": (repair_with_abl, ABLConfig),
}
"""Each works on the clean part of a split (:func:`purify_with_classic`)."""


def purify_with_classic(
    method: str,
    classifier: Classifier,
    source: LabelledImages,
    *,
    clip: ZeroShotModel | None = None,
    split: Split | None = None,
    config: Any = None,
    run: Run | None = None,
) -> PurifyOutcome:
    """A defense that was published for clean samples, on the clean part of ``split``; ``method`` is one of CLASSICS.

    Without a split, CGD makes one with ``clip``. The caller's model is never changed. Raises NotEnoughDataError,
    SourceFormatError, DataError, ResultError (a split of another set), UnsupportedModelError, DivergedError.
    """
    repair_with, kind = CLASSICS[method]
    run, config = run or Run(), config or kind()
    begun, classifier = time.monotonic(), classifier.copy()
    known = _open(classifier, source, run)
    scores, choices = known.own, None
    if split is None:
        if clip is None:
            raise DataError(
                f"{method} needs a split of the training set.", hint="Give one from a scan, or a CLIP to make one with."
            )
        zero_shot = zero_shot_logits(clip, source, run=run)
        scores = score_with_cgd(classifier, source, known.pixels, zero_shot, SeparationConfig(), run=run)
        split, choices = split_by_evidence(scores), first_choices(zero_shot.cosines)
    elif split.ids != list(source.ids):
        raise ResultError(
            f"the split is of another set ({len(split.ids)} samples, {source.name} has {len(source)}).",
            hint="Scan this very set, with the same --limit and --seed.",
        )
    check_every_class(split)
    repair = repair_with(classifier, known.pixels, split, config, run=run)
    purification = _purification(
        method, classifier, source, repair, split, config, run,
        bound=config.bound,
        seconds=time.monotonic() - begun,
        protects="the weights of a new classifier" if method == "abl" else "the classifier's weights",
        limits=REPAIR_LIMITS,
        warnings=known.warnings + warn_of_suspects(repair.classifier, known.pixels, split, run),
        inputs={} if clip is None else {"clip": clip.fingerprint},
    )  # fmt: skip
    samples = describe_samples(source, scores, split, choices)
    return PurifyOutcome(
        classifier=repair.classifier, purification=purification, scores=scores, split=split, samples=samples
    )


def _classic(method: str) -> Callable[..., PurifyOutcome]:
    def purify(
        classifier: Classifier,
        source: LabelledImages,
        *,
        clip: ZeroShotModel | None = None,
        split: Split | None = None,
        config: Any = None,
        run: Run | None = None,
    ) -> PurifyOutcome:
        return purify_with_classic(method, classifier, source, clip=clip, split=split, config=config, run=run)

    purify.__name__ = purify.__qualname__ = f"purify_with_{method.replace('-', '_')}"
    purify.__doc__ = f"``purify_with_classic({method!r}, ...)``."
    return purify


purify_with_ft, purify_with_ft_sam, purify_with_fine_pruning = map(_classic, ("ft", "ft-sam", "fine-pruning"))
purify_with_nad, purify_with_anp, purify_with_i_bau, purify_with_abl = map(_classic, ("nad", "anp", "i-bau", "abl"))


@dataclass(frozen=True, kw_only=True)
class _Known:
    pixels: Pixels
    own: SampleScores
    warnings: tuple[str, ...]


def _open(classifier: Classifier, source: LabelledImages, run: Run) -> _Known:
    """Pixels once, and one forward pass: the model's own losses on its training set, and whether it looks like that."""
    check_classes(classifier, source)
    pixels = load_pixels(source, classifier.image_size, cache=run.cache, progress=run.progress)
    rows = np.flatnonzero(pixels.usable)
    logits = np.full((len(source), len(source.class_names)), np.nan)
    logits[rows] = apply_classifier(classifier, pixels, rows, run=run)
    skipped = tuple({row.id: row for row in (*source.skipped, *pixels.skipped)}.values())
    own = score_by_own_loss(logits, source.labels, list(source.ids), source.class_names, skipped)
    agreement = 100 * float((logits[rows].argmax(axis=1) == source.labels[rows]).mean()) if len(rows) else 0.0
    return _Known(pixels=pixels, own=own, warnings=judge_agreement(agreement, len(source.class_names), source.name))


def judge_agreement(agreement: float, classes: int, name: str) -> tuple[str, ...]:
    """Warnings about a model's agreement, in percent, with the labels of its supposed training set."""
    said = f"The model says the given label for only {agreement:.1f} percent of {name}"
    if clip_too_weak(agreement, 100.0 / classes):
        return (
            f"{said}; chance is {100 / classes:.1f}. The labels look shuffled, or the classes are in another order: "
            "nothing that follows means much.",
        )
    if agreement < FOREIGN_AGREEMENT:
        return (
            f"{said}: this hardly is the set that it was trained on, and losses on another set tell little of poison.",
        )
    return ()


def check_every_class(split: Split) -> None:
    """Raises NotEnoughDataError where a class has no clean sample: a repair would unlearn it."""
    counts = np.bincount(split.labels[split.clean], minlength=len(split.class_names))
    missing = [name for name, count in zip(split.class_names, counts, strict=True) if count == 0]
    if missing:
        raise NotEnoughDataError(
            f"clean samples of {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}",
            have=0,
            need=1,
            hint="A repair would unlearn these classes: give the whole training set, or one that trusts some of it.",
        )


def _purification(
    method: str,
    classifier: Classifier,
    source: LabelledImages,
    repair: Repair,
    split: Split,
    config: Any,
    run: Run,
    *,
    bound: float,
    seconds: float,
    protects: str,
    limits: tuple[str, ...],
    warnings: tuple[str, ...],
    inputs: dict[str, str],
) -> Purification:
    fall = repair.held_out_before - repair.held_out_after
    return Purification(
        method=method,
        config=msgspec.json.decode(msgspec.json.encode(config)),
        accepted=fall <= bound,
        reason=(
            f"Held-out label accuracy went from {repair.held_out_before:.1f} to {repair.held_out_after:.1f} percent; "
            f"a fall of at most {bound:.1f} points is accepted."
        ),
        protects=protects,
        held_out_before=repair.held_out_before,
        held_out_after=repair.held_out_after,
        bound=bound,
        steps=repair.steps,
        changed_share=repair.changed_share,
        seconds=seconds,
        seed=run.seed,
        suspect_count=len(split.suspect),
        clean_count=len(split.clean),
        estimate=split.estimate,
        history=repair.history,
        inputs={"model": hash_weights(classifier.weights()), "data": source.name, **inputs},
        not_covered=limits,
        warnings=warnings,
        clipped_sites=len(repair.classifier.bounds),
    )


__all__ = [
    "CLASSICS", "purify_with_abl", "purify_with_anp", "purify_with_classic", "purify_with_fine_pruning",
    "purify_with_ft", "purify_with_ft_sam", "purify_with_i_bau", "purify_with_nad", "purify_with_pad_ft",
]  # fmt: skip
