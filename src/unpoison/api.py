"""The public verbs: what the command line does, as functions of Python objects.

from unpoison import load_classifier, load_clip, open_images, purify_with_cgd, scan_dataset
"""

from __future__ import annotations

import base64
import io
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from unpoison.data.pixels import Pixels, load_pixels
from unpoison.data.sources import LabelledImages, check_skips
from unpoison.defenses.cgd import CGDConfig, repair_with_cgd
from unpoison.defenses.repair import Repair, label_accuracy
from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS, first_choices, score_with_cgd
from unpoison.detection.thresholds import split_as_published, split_by_evidence
from unpoison.errors import ResultError
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
from unpoison.models.classifier import new_classifier
from unpoison.models.zero_shot import ZeroShot, zero_shot_logits
from unpoison.results import (
    CLEAN,
    MIXED,
    REGION_NAMES,
    SKIPPED,
    SUSPECT,
    DatasetScan,
    PoisonEstimate,
    Purification,
    SampleScores,
    SkippedRow,
    Split,
)
from unpoison.runs import Run
from unpoison.types import Classifier, ZeroShotModel

SCAN_LIMITS = (
    "Backdoors whose trigger a fresh network learns no faster than the objects themselves.",
    "Poison whose labels CLIP agrees with and that leaves no trace in early training.",
    "Whether an odd label is poisoned or only has a name that CLIP does not know: that takes a look at the images.",
    "More than one target label at once is reported, but was not measured.",
    "The weights of any model: this looked at data only.",
)
REPAIR_LIMITS = (
    "Backdoors that were not planted through this training set.",
    "Triggers were not tried unless a manifest was given: the rates before and after are then measured with it.",
)


@dataclass(frozen=True, kw_only=True)
class ScanOutcome:
    """The scan's answer, its scores and split, and ``samples`` for the report (thumbnails of the most suspicious)."""

    scan: DatasetScan
    scores: SampleScores
    split: Split
    samples: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PurifyOutcome:
    """A repaired copy of the classifier, what was done to it, and the scan that led there."""

    classifier: Classifier
    purification: Purification
    scores: SampleScores
    split: Split
    samples: list[dict[str, Any]]


def scan_dataset(
    source: LabelledImages,
    *,
    clip: ZeroShotModel,
    arch: str = "small-resnet",
    image_size: int = 32,
    config: CGDConfig | None = None,
    run: Run | None = None,
) -> ScanOutcome:
    """Is this set poisoned, toward what, which samples? CGD's stage A with early models of architecture ``arch``.

    Raises NotEnoughDataError, SourceFormatError (too many unusable rows), DivergedError.
    """
    run, config = run or Run(), config or CGDConfig()
    begun = time.monotonic()
    early = new_classifier(arch, source.class_names, image_size=image_size)
    evidence = _gather(early, source, clip, replace(config, odd_labels="leave-out"), run)
    return conclude_scan(
        source,
        evidence.scores,
        evidence.split,
        evidence.samples,
        clip=clip,
        arch=arch,
        config=config,
        truncated=evidence.zero_shot.truncated,
        seconds=time.monotonic() - begun,
        seed=run.seed,
    )


def conclude_scan(
    source: LabelledImages,
    scores: SampleScores,
    split: Split,
    samples: list[dict[str, Any]],
    *,
    clip: ZeroShotModel,
    arch: str,
    config: CGDConfig,
    truncated: tuple[str, ...],
    seconds: float,
    seed: int,
) -> ScanOutcome:
    """What CGD's scores and split say about the set; ``truncated`` are the class names that CLIP cuts off."""
    flagged = Counter(source.class_names[label] for label in split.labels[split.suspect])
    scan = DatasetScan(
        source=source.name,
        method="cgd",
        samples=len(source),
        class_names=source.class_names,
        estimate=_required(split.estimate),
        flagged=len(split.suspect),
        flagged_per_class={name: flagged.get(name, 0) for name in source.class_names},
        skipped=scores.skipped,
        clip=clip.fingerprint,
        clip_agreement=scores.details["clip_agreement"],
        chance_agreement=100.0 / len(source.class_names),
        warnings=clip_warnings(source, scores, truncated),
        not_covered=SCAN_LIMITS,
        seconds=seconds,
        seed=seed,
        config=asdict(config),
        inputs={"clip": clip.fingerprint, "early_model": arch},
    )
    return ScanOutcome(scan=scan, scores=scores, split=split, samples=samples)


def purify_with_cgd(
    classifier: Classifier,
    source: LabelledImages,
    *,
    clip: ZeroShotModel,
    scores: SampleScores | None = None,
    config: CGDConfig | None = None,
    run: Run | None = None,
) -> PurifyOutcome:
    """Repair ``classifier`` with its own, possibly poisoned, training set. The caller's model is never changed.

    ``scores``: what CGD's scan of this very set gave; made now where there are none.
    Without evidence of poison, and without odd labels, the model is handed back as it is. The result is refused
    (``accepted`` is false) when the held-out accuracy fell by more than ``config.bound`` points, or the suspects still
    get their label.
    Raises NotEnoughDataError, SourceFormatError, DivergedError, ResultError (scores of another set or method).
    """
    run, config = run or Run(), config or CGDConfig()
    begun = time.monotonic()
    evidence = _gather(classifier, source, clip, config, run, scores)
    split = evidence.split
    original = hash_weights(classifier.weights())
    usable = np.flatnonzero(evidence.pixels.usable)
    agreement = label_accuracy(classifier, evidence.pixels, source.labels, usable, run=run)
    if len(split.suspect) == 0:
        repair = None
        accepted, reason = True, "No evidence of poisoning was found in the training set; the model is left as it is."
    else:
        check_every_class(split)
        repair = repair_with_cgd(classifier, evidence.pixels, split, evidence.zero_shot.cosines, config, run=run)
        accepted, reason = _judge(repair, config)
        if not _required(split.estimate).poisoned:
            reason += " Poisoning was not proved: the doubtful samples of odd labels were unlearnt (odd_labels)."
    if near_chance(agreement, len(source.class_names)):
        accepted, reason = False, reason + NEAR_CHANCE
    result = repair.classifier if repair else classifier.copy()
    purification = Purification(
        method="cgd",
        config=asdict(config),
        accepted=accepted,
        reason=reason,
        protects="the classifier's weights",
        held_out_before=repair.held_out_before if repair else None,
        held_out_after=repair.held_out_after if repair else None,
        bound=config.bound,
        steps=repair.steps if repair else 0,
        changed_share=1.0 if repair else 0.0,
        seconds=time.monotonic() - begun,
        seed=run.seed,
        suspect_count=len(split.suspect),
        clean_count=len(split.clean),
        estimate=split.estimate,
        history=repair.history if repair else [],
        inputs={"model": original, "clip": clip.fingerprint, "data": source.name},
        not_covered=REPAIR_LIMITS,
        warnings=(
            *judge_agreement(agreement, len(source.class_names), source.name),
            *clip_warnings(source, evidence.scores, evidence.zero_shot.truncated),
        ),
    )
    return PurifyOutcome(
        classifier=result, purification=purification, scores=evidence.scores, split=split, samples=evidence.samples
    )


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    pixels: Pixels
    zero_shot: ZeroShot
    scores: SampleScores
    split: Split
    samples: list[dict[str, Any]]


def _gather(
    classifier: Classifier,
    source: LabelledImages,
    clip: ZeroShotModel,
    config: CGDConfig,
    run: Run,
    scores: SampleScores | None = None,
) -> _Evidence:
    """Stage A: pixels once, CLIP once, early models, ranks, regions."""
    check_classes(classifier, source)
    if scores is not None:
        if not {CLIP_AXIS, EARLY_AXIS} <= scores.axes.keys():
            raise ResultError(
                f"the scores of {source.name} are not CGD's but of {scores.method}.",
                hint="Scan this very set with cgd, or leave the scores away.",
            )
        check_same_set(scores, ids=source.ids, labels=source.labels, class_names=source.class_names, name=source.name)
    zero_shot = zero_shot_logits(clip, source, run=run)
    check_skips(zero_shot.skipped, len(source), source.name)
    pixels = load_pixels(source, classifier.image_size, cache=run.cache, progress=run.progress)
    if scores is None:
        scores = score_with_cgd(classifier, source, pixels, zero_shot, config.separation, run=run)
    split = split_of(scores, config)
    samples = describe_samples(source, scores, split, first_choices(zero_shot.cosines))
    return _Evidence(pixels=pixels, zero_shot=zero_shot, scores=scores, split=split, samples=samples)


def split_of(scores: SampleScores, config: CGDConfig) -> Split:
    """CGD's scores as the regions that the config asks for."""
    if config.regions == "published":
        return split_as_published(scores, sigma1=config.sigma1, sigma2=config.sigma2)
    return split_by_evidence(scores, odd=config.odd_labels)


def describe_samples(
    source: LabelledImages,
    scores: SampleScores,
    split: Split,
    choices: np.ndarray | None,
    *,
    suspects: int = 48,
    clean: int = 12,
) -> list[dict[str, Any]]:
    """What the report shows: the most suspicious samples and a few clean ones, with thumbnails of at most 64 px.

    ``choices`` [n] are the labels that CLIP would give (-1: skipped); None where no CLIP was asked.
    """
    chosen = choose_examples(scores, split, suspects=suspects, clean=clean)
    entries = []
    for row, image in zip(chosen, source.decode(np.array(chosen, dtype=np.int64)), strict=True):
        if isinstance(image, SkippedRow):
            continue
        entry = {
            "id": scores.ids[row],
            "label": source.class_names[int(scores.labels[row])],
            "region": REGION_NAMES[int(split.region[row])],
            "thumbnail": thumbnail(image),
            "score": float(scores.suspicion[row]),
        }
        if choices is not None:
            entry["clip_label"] = source.class_names[int(choices[row])]
        entry |= {name: float(scores.axes[name][row]) for name in (CLIP_AXIS, EARLY_AXIS) if name in scores.axes}
        entries.append(entry)
    return entries


def choose_examples(scores: SampleScores, split: Split, *, suspects: int = 48, clean: int = 12) -> list[int]:
    """Rows that the report shows: the most suspicious of those flagged (or of all), then the least suspicious."""
    order = np.argsort(np.nan_to_num(-scores.suspicion, nan=np.inf), kind="stable")
    listed = [int(row) for row in order if split.region[row] != SKIPPED]
    flagged = [row for region in (SUSPECT, MIXED) for row in listed if split.region[row] == region]
    trusted = [row for row in reversed(listed) if split.region[row] == CLEAN]
    return list(dict.fromkeys((flagged or listed)[:suspects] + trusted[:clean]))  # small sets would repeat some


def thumbnail(image: Image.Image) -> str:
    """The image at most 64 px wide and high, as a PNG in base64."""
    small = image.copy()
    small.thumbnail((64, 64))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _judge(repair: Repair, config: CGDConfig) -> tuple[bool, str]:
    fall = repair.held_out_before - repair.held_out_after
    sentence = (
        f"Held-out label accuracy went from {repair.held_out_before:.1f} to {repair.held_out_after:.1f} percent; "
        f"a fall of at most {config.bound:.1f} points is accepted."
    )
    believed = next(look["suspect_agreement"] for look in repair.history if look["step"] == repair.steps)
    if believed > config.believed:
        sentence += (
            f" But the model still gives {believed:.0f} percent of the suspects their label: nothing was unlearnt."
        )
    return fall <= config.bound and believed <= config.believed, sentence


def _required(estimate: PoisonEstimate | None) -> PoisonEstimate:
    if estimate is None:
        raise ResultError("the split carries no estimate.", hint="Scan again.")
    return estimate


__all__ = [
    "PurifyOutcome",
    "ScanOutcome",
    "choose_examples",
    "describe_samples",
    "purify_with_cgd",
    "scan_dataset",
    "thumbnail",
]
