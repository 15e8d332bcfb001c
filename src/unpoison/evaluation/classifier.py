"""Rates of a classifier on a test set, with and without the trigger of a poisoning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.parts import PoisoningParts
from unpoison.attacks.poison import trigger_test_source
from unpoison.data.pixels import Pixels, load_pixels, to_images
from unpoison.data.sources import LabelledImages
from unpoison.errors import ConfigError, DataError, NotEnoughDataError, ResultError
from unpoison.evaluation.intervals import rate
from unpoison.evaluation.metrics import der, excess_asr, purity_per_class
from unpoison.models.image_classifier import evaluation_mode, images_at_once
from unpoison.results import CLEAN, Evaluation, Interval, PartRates, Split
from unpoison.runs import Run
from unpoison.types import Classifier


def evaluate_classifier(
    classifier: Classifier,
    source: LabelledImages,
    *,
    poisoning: Poisoning | PoisoningParts | None = None,
    run: Run,
    batch_size: int | None = None,
    name: str = "classifier",
) -> Evaluation:
    """C-Acc, accuracy per class and, with a manifest, ASR, its floor, its excess and RA, all in percent.

    ``source`` holds clean test images under their true labels. The trigger is put on each image at its own size, before
    the classifier's resize, on every sample whose label is not already the attack's; the floor is the same samples
    without it. Parts of a poisoning are measured one by one and all together. Rows that do not decode count nowhere and
    are listed. The classifier is left as it is.
    Raises DataError when the class names (or their order) differ, SourceFormatError when over 10 % of the rows are bad,
    NotEnoughDataError when no sample outside the target class is there.
    """
    began = time.perf_counter()
    check_class_names(classifier, source)
    clean = load_pixels(source, classifier.image_size, cache=run.cache, progress=run.progress)
    guesses = predict(classifier, clean, run=run, batch_size=batch_size, what="clean images")
    usable = clean.usable
    hits = guesses == source.labels
    rates: dict[str, Interval] = {}
    parts: tuple[PartRates, ...] = ()
    if poisoning is not None:
        found = [
            _attacked(classifier, source, clean, guesses, part, run=run, batch_size=batch_size)
            for part in labelled_parts(poisoning)
        ]
        rates = join_guesses(found).rates()
        parts = rates_of_parts(found) if isinstance(poisoning, PoisoningParts) else ()
    present = [label for label in range(len(source.class_names)) if (usable & (source.labels == label)).any()]
    return Evaluation(
        model=name,
        data=source.name,
        c_acc=rate(hits[usable]),
        asr=rates.get("asr"),
        asr_floor=rates.get("floor"),
        asr_excess=excess_asr(rates["asr"].value, rates["floor"].value) if rates else None,
        ra=rates.get("ra"),
        attack=None if poisoning is None else poisoning.trigger,
        target=None if poisoning is None else poisoning.target_name,
        per_class={
            source.class_names[label]: 100 * float(hits[usable & (source.labels == label)].mean()) for label in present
        },
        parts=parts,
        skipped=source.skipped + clean.skipped,
        seconds=time.perf_counter() - began,
    )


def evaluate_before_after(before: Evaluation, after: Evaluation) -> float | None:
    """DER in percent of two evaluations on the same data; None where no trigger was measured.

    The raw ASR is used, as the metric is defined. Raises DataError when data, attack or target differ.
    """
    for field in ("data", "attack", "target"):
        first, second = getattr(before, field), getattr(after, field)
        if first != second:
            raise DataError(
                f"Before and after were measured on different {field}: {first!r} and {second!r}.",
                hint="Evaluate both models on the same test set with the same manifest.",
            )
    if before.asr is None or after.asr is None:
        return None
    return 100 * der(
        c_acc_before=before.c_acc.value / 100,
        c_acc_after=after.c_acc.value / 100,
        asr_before=before.asr.value / 100,
        asr_after=after.asr.value / 100,
    )


def check_class_names(classifier: Classifier, source: LabelledImages) -> None:
    """Raises DataError unless both name the same classes in the same order."""
    ours, theirs = list(classifier.class_names), list(source.class_names)
    if ours != theirs:
        same = sorted(ours) == sorted(theirs)
        raise DataError(
            f"The classifier's classes are {ours}, those of {source.name} are {theirs}"
            + (": the same names in another order." if same else "."),
            hint="Give the class names in the order of the classifier's outputs when you open the data.",
        )


def predict(
    classifier: Classifier, pixels: Pixels, *, run: Run, batch_size: int | None = None, what: str = "images"
) -> Int[np.ndarray, " n"]:
    """The class of each row, in evaluation mode; rows that are not usable get a guess that counts nowhere."""
    reference = next(classifier.module.parameters())
    size = batch_size or images_at_once(run.device, pixels.array.shape[1])
    starts = range(0, len(pixels.array), size)
    guesses = np.empty(len(pixels.array), dtype=np.int64)
    with torch.inference_mode(), evaluation_mode(classifier.module):
        for start in run.progress.track(starts, total=len(guesses), what=what, weight=size, unit="images"):
            images = to_images(np.asarray(pixels.array[start : start + size])).to(reference)
            guesses[start : start + size] = classifier.logits(images).argmax(dim=1).cpu().numpy()
    return guesses


def labelled_parts(poisoning: Poisoning | PoisoningParts) -> list[Poisoning]:
    """The parts, or the one. Raises ConfigError for parts of pairs."""
    parts = poisoning.parts if isinstance(poisoning, PoisoningParts) else (poisoning,)
    found = [part for part in parts if isinstance(part, Poisoning)]
    if len(found) < len(parts):
        raise ConfigError(
            "The manifest poisons image-caption pairs, which a classifier does not see.",
            hint="Give a manifest of labelled images.",
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class AttackedGuesses:
    """Guesses with and without the trigger on the samples that count for one attack; only ``usable`` rows count.

    ``where`` names the samples in errors.
    """

    attack: str
    target: str
    attacked: Int[np.ndarray, " k"]
    clean: Int[np.ndarray, " k"]
    labels: Int[np.ndarray, " k"]
    attack_labels: Int[np.ndarray, " k"]
    usable: Bool[np.ndarray, " k"]
    where: str

    def rates(self) -> dict[str, Interval]:
        """ASR, its floor and RA ("asr", "floor", "ra"). Raises NotEnoughDataError when there is no usable row."""
        check_attackable(self.usable, self.where)
        return {
            "asr": rate((self.attacked == self.attack_labels)[self.usable]),
            "floor": rate((self.clean == self.attack_labels)[self.usable]),
            "ra": rate((self.attacked == self.labels)[self.usable]),
        }


def join_guesses(parts: Sequence[AttackedGuesses]) -> AttackedGuesses:
    """The samples of all parts, one after the other."""
    arrays = ("attacked", "clean", "labels", "attack_labels", "usable")
    return AttackedGuesses(
        attack=" + ".join(part.attack for part in parts),
        target=" + ".join(part.target for part in parts),
        where=parts[0].where,
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
    )


def rates_of_parts(parts: Sequence[AttackedGuesses]) -> tuple[PartRates, ...]:
    """The rates of each part. Raises NotEnoughDataError for a part without a usable row."""
    found = [(part, part.rates()) for part in parts]
    return tuple(
        PartRates(
            attack=part.attack,
            target=part.target,
            asr=rates["asr"],
            asr_floor=rates["floor"],
            asr_excess=excess_asr(rates["asr"].value, rates["floor"].value),
            ra=rates["ra"],
        )
        for part, rates in found
    )


def _attacked(
    classifier: Classifier,
    source: LabelledImages,
    clean: Pixels,
    guesses: np.ndarray,
    poisoning: Poisoning,
    *,
    run: Run,
    batch_size: int | None,
) -> AttackedGuesses:
    triggered, rows, attack_labels = trigger_test_source(source, poisoning)
    where = f"{source.name}: samples outside the target class {poisoning.target_name!r}"
    check_attackable(clean.usable[rows], where)
    pixels = load_pixels(triggered, classifier.image_size, cache=run.cache, progress=run.progress)
    return AttackedGuesses(
        attack=poisoning.trigger,
        target=poisoning.target_name,
        attacked=predict(classifier, pixels, run=run, batch_size=batch_size, what="triggered images"),
        clean=guesses[rows],
        labels=triggered.labels,
        attack_labels=attack_labels,
        usable=pixels.usable & clean.usable[rows],
        where=where,
    )


def check_attackable(usable: Bool[np.ndarray, " k"], where: str) -> None:
    """Raises NotEnoughDataError where no sample is left to measure the attack on."""
    if not usable.any():
        raise NotEnoughDataError(
            where,
            have=0,
            need=1,
            hint="The attack success is measured on samples of other classes: give a test set that has some.",
        )


def purity_of(split: Split, poisoning: Poisoning | PoisoningParts) -> dict[str, float | None]:
    """Percent of each class's trusted samples that the manifest of this very set does not name; None without any.

    Raises ResultError for a manifest that names no sample of the set.
    """
    poisoned = np.isin(split.ids, poisoning.ids)
    if not poisoned.any():
        raise ResultError(
            f"the manifest names no sample of this set ({len(poisoning.ids)} ids, none of them here).",
            hint="Give the manifest that was written with the training set.",
        )
    shares = purity_per_class(split.labels, split.region == CLEAN, poisoned, len(split.class_names))
    percents = [None if share is None else 100 * share for share in shares]
    return dict(zip(split.class_names, percents, strict=True))
