"""Whether scores, splits, data and a model belong together, and what to say where they hardly do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from unpoison.data.sources import LabelledImages
from unpoison.errors import DataError, NotEnoughDataError, ResultError
from unpoison.results import SampleScores, Split, clip_too_weak
from unpoison.types import Classifier

MIN_SAMPLES = 50
FOREIGN_AGREEMENT = 60.0
"""Percent of given labels that a model says, under which the set hardly is the one that it was trained on. Another set
of the same classes that is as easy as the training set passes: a model of 75 percent test accuracy agrees with 75
percent of any such set. Only losses that are too large to be those of a training set are noticed."""


def check_classes(classifier: Classifier, source: LabelledImages) -> None:
    """Raises DataError for other class names or another order of them, NotEnoughDataError for a tiny set."""
    if tuple(classifier.class_names) != tuple(source.class_names):
        raise DataError(
            f"the model's classes {list(classifier.class_names)} are not the data's {list(source.class_names)}.",
            hint="Give the data with the same class names in the same order as the model's.",
        )
    if len(source) < MIN_SAMPLES:
        raise NotEnoughDataError(
            f"samples in {source.name}",
            have=len(source),
            need=MIN_SAMPLES,
            hint="Ranks over so few samples mean nothing; give the whole training set.",
        )


def check_same_set(
    found: SampleScores | Split,
    *,
    ids: Sequence[str],
    labels: Int[np.ndarray, " n"],
    class_names: Sequence[str],
    name: str,
) -> None:
    """Raises ResultError where scores or a split are of other samples, other labels, or another order of the classes
    than the set ``name``: its labels would be taken for others."""
    what = "split" if isinstance(found, Split) else f"scores of {found.method}"
    verb = "is" if isinstance(found, Split) else "are"
    if found.ids != list(ids):
        raise ResultError(
            f"the {what} {verb} of another set ({len(found.ids)} samples, {name} has {len(ids)}).",
            hint="Scan this very set, with the same --limit and --seed.",
        )
    if tuple(found.class_names) != tuple(class_names):
        raise ResultError(
            f"the {what} {verb} of another list of classes: {list(found.class_names)[:5]} there, "
            f"{list(class_names)[:5]} in {name}.",
            hint="Scan the set with the model's class names in the model's order (--class-names FILE).",
        )
    if not np.array_equal(found.labels, labels):
        raise ResultError(
            f"the {what} {verb} of other labels: {int((found.labels != labels).sum()):,} of {len(ids):,} differ from "
            f"{name}.",
            hint="Scan the set as it is now.",
        )


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


def judge_agreement(agreement: float, classes: int, name: str) -> tuple[str, ...]:
    """Warnings about a model's agreement, in percent, with the labels of its supposed training set."""
    said = f"The model says the given label for only {agreement:.1f} percent of {name}"
    if near_chance(agreement, classes):
        return (
            f"{said}; chance is {100 / classes:.1f}. The labels look shuffled, or the classes are in another order: "
            "nothing that follows means much.",
        )
    if agreement < FOREIGN_AGREEMENT:
        return (
            f"{said}: this hardly is the set that it was trained on, and losses on another set tell little of poison.",
        )
    return ()


def near_chance(agreement: float, classes: int) -> bool:
    """Whether a model's agreement with the given labels, in percent, is so low that no repair by them is accepted."""
    return clip_too_weak(agreement, 100.0 / classes)


NEAR_CHANCE = " But the model knows these labels hardly better than chance: what was held out judges nothing."
"""Why a repair by such labels is not accepted, whatever its held-out accuracy."""


def clip_warnings(source: LabelledImages, scores: SampleScores, truncated: Sequence[str] = ()) -> tuple[str, ...]:
    """What to say of CGD's scores of a set: a CLIP that is too weak, class names cut off, classes that are too rare."""
    warnings = []
    agreement, chance = scores.details.get("clip_agreement"), 100.0 / len(source.class_names)
    if agreement is not None and clip_too_weak(agreement, chance):
        warnings.append(
            f"CLIP agrees with {agreement:.1f} percent of the given labels, chance is {chance:.1f}: it hardly knows "
            f"these classes. Give a larger one with --clip, or class names as people would say them."
        )
    if truncated:
        warnings.append(f"CLIP's tokenizer cut these class names off: {', '.join(truncated)}.")
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    rare = [name for name, count in zip(source.class_names, counts, strict=True) if 0 < count < 20]
    if rare:
        warnings.append(f"Classes with fewer than 20 samples cannot be judged on their own: {', '.join(rare)}.")
    return tuple(warnings)
