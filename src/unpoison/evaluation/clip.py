"""Figures of a CLIP with and without a trigger: zero-shot accuracy, retrieval, drift from a suspect, and rebound."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.overlay import TriggerOverlay
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.pairs import keyed_captions
from unpoison.attacks.parts import PoisoningParts
from unpoison.attacks.poison import trigger_test_source
from unpoison.attacks.triggers import Trigger
from unpoison.data.pairs import ImageTextPairs, count_cut_captions
from unpoison.data.sources import LabelledImages
from unpoison.errors import DataError, MethodError
from unpoison.evaluation.classifier import AttackedGuesses, check_attackable, join_guesses, rates_of_parts
from unpoison.evaluation.drift import aligned_cosine, mean_cosine
from unpoison.evaluation.embeddings import ImageEmbeddings, embed_images, embed_texts, ready
from unpoison.evaluation.intervals import rate
from unpoison.evaluation.metrics import excess_asr
from unpoison.evaluation.retrieval import CaptionPool, flagged_on_top, names, pool_captions, recall
from unpoison.models.zero_shot import TEMPLATES, class_embeddings, cut_off
from unpoison.results import ClipEvaluation, Drift, Interval, PartRates, Rebound, SkippedRow
from unpoison.runs import Run
from unpoison.types import ImageTextModel

TOP = 5
"""Captions of an image that count for the retrieval ASR."""


@runtime_checkable
class TargetedAttack(Protocol):
    """What is known of a poisoning: the manifest of labelled images or of pairs."""

    @property
    def trigger(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def target_name(self) -> str: ...

    def make_trigger(self) -> Trigger: ...


def evaluate_clip(
    clip: ImageTextModel,
    images: LabelledImages,
    *,
    templates: Sequence[str] = TEMPLATES,
    classes: Float[np.ndarray, "c d"] | None = None,
    poisoning: TargetedAttack | PoisoningParts | None = None,
    retrieval: ImageTextPairs | None = None,
    suspect: ImageTextModel | None = None,
    run: Run,
    batch_size: int | None = None,
    name: str = "clip",
) -> ClipEvaluation:
    """C-Acc and, with a manifest, ASR, its floor, its excess and RA; R@k and retrieval ASR on ``retrieval``; drift from
    ``suspect``. Rates in percent.

    ``images`` are clean test images under their true labels, whose names fill ``templates`` (the classes' embeddings
    are the means over them), unless ``classes`` gives the embeddings in the names' order. The trigger is put on each
    image at its own size, before the model's preprocessing, and samples of the target class count nowhere; parts of a
    poisoning are measured one by one and all together. Drift is measured on the same images and on the captions of
    ``retrieval``, or on the filled templates without it. Every picture is decoded and encoded once, clean and
    triggered; models and sets are left as they are. Rows that do not decode count nowhere and are listed.
    Raises DataError (the target is no class; embeddings of two widths; class names that CLIP cannot tell apart),
    SourceFormatError (over 10 % bad rows), NotEnoughDataError, ModelError (embeddings that are no numbers).
    """
    began = time.perf_counter()
    models = [clip] if suspect is None else [clip, suspect]
    embedded = embed_images(models, images, run=run, batch_size=batch_size, what="clean images")
    if classes is None:
        with ready(clip, run):
            classes = class_embeddings(clip, images.class_names, templates).float().cpu().numpy()
    _check_classes(classes, embedded[0].array, images.class_names)
    guesses, usable = zero_shot_guesses(embedded[0], classes), embedded[0].usable
    hits = guesses == images.labels
    present = [label for label in range(len(images.class_names)) if (usable & (images.labels == label)).any()]
    rates: dict[str, Interval] = {}
    parts: tuple[PartRates, ...] = ()
    if poisoning is not None:
        attacked = [
            _attacked(clip, images, embedded[0], guesses, classes, part, run=run, batch_size=batch_size)
            for part in (poisoning.parts if isinstance(poisoning, PoisoningParts) else (poisoning,))
        ]
        rates = join_guesses(attacked).rates()
        parts = rates_of_parts(attacked) if isinstance(poisoning, PoisoningParts) else ()
    found = _Retrieved()
    if retrieval is not None:
        found = _retrieve(clip, retrieval, poisoning, run=run, batch_size=batch_size)
    drift = None
    if suspect is not None:
        texts = [template.replace("{}", name) for name in images.class_names for template in templates]
        if found.pool is not None:
            texts = found.pool.texts
        drift = _drift(clip, suspect, embedded, texts, found.texts, run=run)
    return ClipEvaluation(
        model=name,
        data=images.name,
        templates=len(templates),
        c_acc=rate(hits[usable]),
        asr=rates.get("asr"),
        asr_floor=rates.get("floor"),
        asr_excess=excess_asr(rates["asr"].value, rates["floor"].value) if rates else None,
        ra=rates.get("ra"),
        attack=None if poisoning is None else poisoning.trigger,
        target=None if poisoning is None else poisoning.target_name,
        per_class={
            images.class_names[label]: 100 * float(hits[usable & (images.labels == label)].mean()) for label in present
        },
        parts=parts,
        truncated_classes=cut_off(clip, images.class_names, templates),
        retrieval_data=None if retrieval is None else retrieval.name,
        **found.figures,
        drift=drift,
        skipped=images.skipped + embedded[0].skipped + found.skipped,
        notes=found.notes,
        seconds=time.perf_counter() - began,
    )


def rebound(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    fine_tune: Callable[[ImageTextModel, ImageTextPairs], ImageTextModel],
    *,
    evaluate: Callable[[ImageTextModel], ClipEvaluation],
    before: ClipEvaluation | None = None,
) -> Rebound:
    """Fine-tune briefly on clean pairs, as the model's next owner would, and evaluate again.

    ``fine_tune`` gives back another model; 1 to 3 epochs of ordinary fine-tuning are meant. ``before``: what
    ``evaluate`` said of ``clip``, where that is known. Raises MethodError when ``fine_tune`` trains the model it is
    given, and whatever the two raise.
    """
    began = time.perf_counter()
    before = before or evaluate(clip)
    mark = clip.fingerprint
    tuned = fine_tune(clip, pairs)
    if clip.fingerprint != mark:
        raise MethodError(
            "The fine-tuning changed the model that it was given, so there is nothing left to compare with.",
            hint="Train a copy and give that back.",
        )
    return Rebound(pairs=pairs.name, before=before, after=evaluate(tuned), seconds=time.perf_counter() - began)


def _check_classes(classes: np.ndarray, images: np.ndarray, names: Sequence[str]) -> None:
    expected = (len(names), images.shape[1])
    if classes.shape != expected:
        raise DataError(
            f"expected class embeddings of shape {expected}, got {classes.shape}.",
            hint="Give one row for each class of the test images, made with the same model.",
        )


def zero_shot_guesses(images: ImageEmbeddings, classes: Float[np.ndarray, "c d"]) -> Int[np.ndarray, " n"]:
    """The class nearest to each image; -1 where the image could not be used."""
    guesses = np.full(len(images.array), -1, dtype=np.int64)
    guesses[images.usable] = (images.array[images.usable] @ classes.T).argmax(axis=1)
    return guesses


def triggered_images(
    images: LabelledImages, attack: TargetedAttack
) -> tuple[LabelledImages, Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """The samples that count for the attack success, triggered as they are decoded; their rows; the attack's labels.

    A manifest of pairs names its target in words: the class of that name. Raises DataError where there is none.
    """
    if isinstance(attack, Poisoning):
        return trigger_test_source(images, attack)
    target = _class_of(images.class_names, attack.target_name)
    if target is None:
        raise DataError(
            f"The target {attack.target_name!r} is none of the {len(images.class_names)} classes of {images.name}.",
            hint="Give test images whose class list has the target: the attack success is measured on its name.",
        )
    rows = np.flatnonzero(images.labels != target)
    chosen = images.select(rows)
    overlay = TriggerOverlay(attack.make_trigger(), attack.seed, None)
    return chosen.with_labels(chosen.labels, overlay), rows, np.full(len(rows), target, dtype=np.int64)


def _class_of(class_names: Sequence[str], words: str) -> int | None:
    """The class of that very name, else the first that differs in case, spaces and "_" alone."""
    if words in class_names:
        return class_names.index(words)
    plain = [" ".join(name.replace("_", " ").casefold().split()) for name in (*class_names, words)]
    return next((label for label, name in enumerate(plain[:-1]) if name == plain[-1]), None)


def _attacked(
    clip: ImageTextModel,
    images: LabelledImages,
    clean: ImageEmbeddings,
    guesses: np.ndarray,
    classes: np.ndarray,
    attack: TargetedAttack,
    *,
    run: Run,
    batch_size: int | None,
) -> AttackedGuesses:
    triggered, rows, attack_labels = triggered_images(images, attack)
    where = f"{images.name}: samples outside the target class {attack.target_name!r}"
    check_attackable(clean.usable[rows], where)
    (attacked,) = embed_images([clip], triggered, run=run, batch_size=batch_size, what="triggered images")
    return AttackedGuesses(
        attack=attack.trigger,
        target=attack.target_name,
        attacked=zero_shot_guesses(attacked, classes),
        clean=guesses[rows],
        labels=triggered.labels,
        attack_labels=attack_labels,
        usable=attacked.usable & clean.usable[rows],
        where=where,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Retrieved:
    """Fields of the evaluation, and the captions with their embeddings for what else is measured on them."""

    figures: dict[str, Any] = field(default_factory=dict)
    pool: CaptionPool | None = None
    texts: np.ndarray | None = None
    skipped: tuple[SkippedRow, ...] = ()
    notes: tuple[str, ...] = ()


def _retrieve(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    attack: TargetedAttack | PoisoningParts | None,
    *,
    run: Run,
    batch_size: int | None,
) -> _Retrieved:
    (embedded,) = embed_images([clip], pairs, run=run, batch_size=batch_size, what="captioned images")
    rows = np.flatnonzero(embedded.usable)
    captions = pairs.captions(rows)
    pool = pool_captions(captions)
    texts = embed_texts(clip, pool.texts, run=run)
    clean = embedded.array[rows]
    figures: dict[str, Any] = {
        "image_to_text": recall(clean, texts, pool.owners, pool.owned),
        "text_to_image": recall(texts, clean, pool.owned, pool.owners),
        "cut_captions": count_cut_captions(clip, pairs).cut,
    }
    notes: tuple[str, ...] = ()
    if isinstance(attack, PoisoningParts):
        notes = ("Retrieval ASR is not measured: the poisoning has several parts.",)
    elif attack is not None:
        flagged = names(pool.texts, attack.target_name)
        figures["target_captions"] = int(flagged.sum())
        # images whose own captions name the target are no proof of anything
        own = np.zeros(len(rows), dtype=bool)
        own[pool.owners[flagged[pool.owned]]] = True
        notes = _why_no_retrieval_asr(attack, pairs, flagged, own)
        if isinstance(attack, PairPoisoning) and attack.mode == "text-key":
            plain = [text for text, of_target in zip(pool.texts, flagged, strict=True) if not of_target]
            if own.any() and plain:
                keyed = embed_texts(clip, keyed_captions(plain, attack), run=run)
                figures["text_asr"] = rate(flagged_on_top(keyed, clean, own, TOP))
                figures["text_asr_floor"] = rate(flagged_on_top(texts[~flagged], clean, own, TOP))
            notes = ("Retrieval ASR of images is not measured: the trigger is in the text.",)
        if not notes:
            overlay = TriggerOverlay(attack.make_trigger(), attack.seed, None)
            triggered = pairs.select(rows[~own]).with_overlay(overlay, {})
            (attacked,) = embed_images([clip], triggered, run=run, batch_size=batch_size, what="triggered images")
            on_top = flagged_on_top(attacked.array[attacked.usable], texts, flagged, TOP)
            figures["retrieval_asr"] = rate(on_top)
            figures["retrieval_asr_floor"] = rate(flagged_on_top(clean[~own][attacked.usable], texts, flagged, TOP))
    return _Retrieved(figures=figures, pool=pool, texts=texts, skipped=pairs.skipped + embedded.skipped, notes=notes)


def _why_no_retrieval_asr(
    attack: TargetedAttack, pairs: ImageTextPairs, flagged: np.ndarray, own: np.ndarray
) -> tuple[str, ...]:
    if isinstance(attack, Poisoning) and attack.all_to_all:
        return ("Retrieval ASR is not measured: an all-to-all attack has no one target to look for.",)
    if not flagged.any():
        return (f"Retrieval ASR is not measured: no caption of {pairs.name} names {attack.target_name!r}.",)
    if own.all():
        return (f"Retrieval ASR is not measured: every image of {pairs.name} is captioned {attack.target_name!r}.",)
    return ()


def _drift(
    clip: ImageTextModel,
    suspect: ImageTextModel,
    embedded: Sequence[ImageEmbeddings],
    texts: Sequence[str],
    new_texts: np.ndarray | None,
    *,
    run: Run,
) -> Drift:
    """``new_texts``: the embeddings of ``texts`` by ``clip`` where they have been computed."""
    new, old = (part.array[part.usable] for part in embedded)
    if old.shape[1] != new.shape[1]:
        raise DataError(
            f"The suspect's embeddings have {old.shape[1]} numbers, the model's {new.shape[1]}.",
            hint="Drift is measured between a model and the suspect that it was made from.",
        )
    new_texts = embed_texts(clip, texts, run=run) if new_texts is None else new_texts
    old_texts = embed_texts(suspect, texts, run=run)
    return Drift(
        image_raw=mean_cosine(old, new),
        image_aligned=aligned_cosine(old, new),
        text_raw=mean_cosine(old_texts, new_texts),
        text_aligned=aligned_cosine(old_texts, new_texts),
        images=len(new),
        texts=len(texts),
        width=new.shape[1],
    )
