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

from unpoison.api import REPAIR_LIMITS, PurifyOutcome, describe_samples
from unpoison.data.pixels import Pixels, load_pixels
from unpoison.data.sources import LabelledImages
from unpoison.defenses.baselines.abl import ABLConfig, repair_with_abl
from unpoison.defenses.baselines.anp import ANPConfig, repair_with_anp
from unpoison.defenses.baselines.fine_pruning import FinePruningConfig, repair_with_fine_pruning
from unpoison.defenses.baselines.ft import FTConfig, repair_with_ft
from unpoison.defenses.baselines.ft_sam import FTSAMConfig, repair_with_ft_sam
from unpoison.defenses.baselines.i_bau import IBAUConfig, repair_with_i_bau
from unpoison.defenses.baselines.nad import NADConfig, repair_with_nad
from unpoison.defenses.clipping import used_rule
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
from unpoison.errors import DataError
from unpoison.evidence import (
    NEAR_CHANCE,
    check_classes,
    check_every_class,
    check_same_set,
    clip_warnings,
    judge_agreement,
    near_chance,
)
from unpoison.models.checkpoints import hash_weights
from unpoison.models.zero_shot import ZeroShot, zero_shot_logits
from unpoison.results import Purification, SampleScores, Split
from unpoison.runs import Run
from unpoison.types import Classifier, ZeroShotModel

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
    never changed. Raises NotEnoughDataError, SourceFormatError, DataError, ResultError (scores of another set or order
    of classes), UnsupportedModelError, DivergedError.
    """
    run, config = run or Run(), config or PADFTConfig()
    begun, classifier = time.monotonic(), classifier.copy()
    if scores is not None:
        _check(scores, source)
    known = _open(classifier, source, run)
    estimate, zero_shot, suspect = None, None, np.zeros(0, dtype=np.int64)
    if scores is None and clip is not None and config.scores_share > 0:
        zero_shot = zero_shot_logits(clip, source, run=run)
        scores = score_with_cgd(classifier, source, known.pixels, zero_shot, SeparationConfig(), run=run)
    told = _of_clip(source, scores, zero_shot)
    if scores is not None and {CLIP_AXIS, EARLY_AXIS} <= scores.axes.keys():
        separated = split_by_evidence(scores, odd=config.odd_labels)
        estimate, suspect, scores = separated.estimate, separated.suspect, with_mean_rank(scores)
    share = config.scores_share if scores is not None else 0.0
    chosen = select_clean(known.own, config.per_class, other=scores, share=share, largest_share=config.largest_share)
    split = with_suspects(chosen, suspect)
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
        warnings=known.warnings + told + _warnings(scores, split, config) + believed,
        used=_used(scores, split, config),
        shuffled=known.shuffled,
        inputs={} if clip is None else {"clip": clip.fingerprint},
    )  # fmt: skip
    samples = describe_samples(source, shown, split, None if zero_shot is None else first_choices(zero_shot.cosines))
    return PurifyOutcome(
        classifier=repair.classifier, purification=purification, scores=shown, split=split, samples=samples
    )


def _warnings(scores: SampleScores | None, split: Split, config: PADFTConfig) -> tuple[str, ...]:
    if scores is None:
        return (
            "The samples to tune on were chosen by the model's own losses alone: where it was poisoned, many of the "
            "target class are poison. Give a CLIP or the scores of a scan.",
        )
    if len(split.suspect) and split.estimate is not None and not split.estimate.poisoned:
        return ("Poisoning was not proved: the doubtful samples of odd labels were unlearnt (odd_labels).",)
    if len(split.suspect) == 0 and _used(scores, split, config):
        why = (
            "no sample is suspect" if split.estimate is not None else f"the scores of {scores.method} name no suspects"
        )
        return (f"No label was unlearnt, and bounds come from clean samples alone: {why}.",)
    return ()


def _used(scores: SampleScores | None, split: Split, config: PADFTConfig) -> dict[str, str]:
    """What was done in place of what ``config`` asks for."""
    rule = used_rule(config.clip, split.suspect)
    changed = {
        "clip.rule": rule if rule != config.clip.rule else None,
        "unlearn": "0" if config.unlearn > 0 and len(split.suspect) == 0 else None,
        "scores_share": "0" if config.scores_share > 0 and scores is None else None,
    }
    return {name: value for name, value in changed.items() if value is not None}


def _of_clip(source: LabelledImages, scores: SampleScores | None, zero_shot: ZeroShot | None) -> tuple[str, ...]:
    """What to say of CGD's scores, given or made here; nothing of those of others."""
    if scores is None or "clip_agreement" not in scores.details:
        return ()
    return clip_warnings(source, scores, () if zero_shot is None else zero_shot.truncated)


def _check(found: SampleScores | Split, source: LabelledImages) -> None:
    check_same_set(found, ids=source.ids, labels=source.labels, class_names=source.class_names, name=source.name)


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
    SourceFormatError, DataError, ResultError (a split of another set or order of classes), UnsupportedModelError,
    DivergedError.
    """
    repair_with, kind = CLASSICS[method]
    run, config = run or Run(), config or kind()
    begun, classifier = time.monotonic(), classifier.copy()
    if split is not None:
        _check(split, source)
    known = _open(classifier, source, run)
    scores, choices, told = known.own, None, ()
    if split is None:
        if clip is None:
            raise DataError(
                f"{method} needs a split of the training set.", hint="Give one from a scan, or a CLIP to make one with."
            )
        zero_shot = zero_shot_logits(clip, source, run=run)
        scores = score_with_cgd(classifier, source, known.pixels, zero_shot, SeparationConfig(), run=run)
        told = _of_clip(source, scores, zero_shot)
        split = split_by_evidence(scores, odd=getattr(config, "odd_labels", "leave-out"))
        choices = first_choices(zero_shot.cosines)
    check_every_class(split)
    repair = repair_with(classifier, known.pixels, split, config, run=run)
    purification = _purification(
        method, classifier, source, repair, split, config, run,
        bound=config.bound,
        seconds=time.monotonic() - begun,
        protects="the weights of a new classifier" if method == "abl" else "the classifier's weights",
        limits=REPAIR_LIMITS,
        warnings=known.warnings + told + warn_of_suspects(repair.classifier, known.pixels, split, run),
        shuffled=known.shuffled,
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
    shuffled: bool


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
    classes = len(source.class_names)
    warnings = judge_agreement(agreement, classes, source.name)
    return _Known(pixels=pixels, own=own, warnings=warnings, shuffled=near_chance(agreement, classes))


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
    shuffled: bool,
    inputs: dict[str, str],
    used: dict[str, str] | None = None,
) -> Purification:
    fall = repair.held_out_before - repair.held_out_after
    return Purification(
        method=method,
        config=msgspec.json.decode(msgspec.json.encode(config)),
        accepted=fall <= bound and not shuffled,
        reason=(
            f"Held-out label accuracy went from {repair.held_out_before:.1f} to {repair.held_out_after:.1f} percent; "
            f"a fall of at most {bound:.1f} points is accepted.{NEAR_CHANCE if shuffled else ''}"
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
        used=used or {},
    )


__all__ = [
    "CLASSICS", "purify_with_abl", "purify_with_anp", "purify_with_classic", "purify_with_fine_pruning",
    "purify_with_ft", "purify_with_ft_sam", "purify_with_i_bau", "purify_with_nad", "purify_with_pad_ft",
]  # fmt: skip
