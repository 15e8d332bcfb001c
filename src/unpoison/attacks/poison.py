"""Poisonings: which samples, which trigger, which labels. The manifest is the ground truth of an experiment.

A poisoning is planned once, saved, reloaded and applied lazily: the images on disk stay untouched unless a poisoned
copy is written. Only attacks, evaluation and benchmark may read it; methods never see it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from unpoison.attacks.clean_image import RANKING_SIZE, CleanImage
from unpoison.attacks.manifest import Poisoning, check_labelled, check_mode
from unpoison.attacks.overlay import TriggerOverlay, to_tensor
from unpoison.attacks.selection import RANDOM, Selection
from unpoison.attacks.triggers import CoveredOtherwise, Trigger, as_planted, make_trigger, params_of
from unpoison.attacks.write import WrittenPoisoning, prepare_folder, write_copy
from unpoison.data.sources import LabelledImages
from unpoison.errors import ConfigError, DataError, LabelRangeError, NotEnoughDataError
from unpoison.results import SkippedRow
from unpoison.types import Images

_CHUNK = 512  # images decoded at once


def plan_poisoning(
    source: LabelledImages,
    trigger: str,
    *,
    rate: float,
    target: int = 0,
    seed: int = 0,
    mode: str | None = None,
    taken: Collection[str] = (),
    selection: Selection | None = None,
    **params: Any,
) -> Poisoning:
    """Choose ``rate`` x the size of ``source`` samples, seeded, and write down what becomes of them.

    ``mode``: the trigger's usual one when None. ``params``: the trigger's parameters; a ``cover`` among them is the
    share of the chosen samples that keep their label. ``taken``: ids that are not to be chosen. ``selection``: an
    attacker's choice (:func:`~unpoison.attacks.boundary.near_the_boundary`) in place of the draw. Nothing is changed.
    Raises UnknownMethodError, ConfigError, LabelRangeError (target), NotEnoughDataError (too few eligible samples).
    """
    made = make_trigger(trigger, params)
    check_labelled(trigger)
    mode = made.modes[0] if mode is None else mode
    check_mode(trigger, made, mode)
    if not 0 < rate <= 1:
        raise ConfigError(f"rate must be in (0, 1], got {rate}.", hint="A rate of 0.05 poisons 5 % of the samples.")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}.", hint="Use 0, 1, 2, ...")
    if not 0 <= target < len(source.class_names):
        raise LabelRangeError(
            f"target {target} is outside the {len(source.class_names)} classes of {source.name}.",
            hint=f"Use a label from 0 to {len(source.class_names) - 1}.",
        )
    chosen = _choose(source, made, mode, rate, target, seed, frozenset(taken), selection)
    original = source.labels[chosen]
    if mode == "clean-label":
        new = original
    elif mode == "all-to-all":
        new = (original + 1) % len(source.class_names)
    else:
        new = np.full_like(original, target)
    new = _with_covers(original, new, getattr(made, "cover", 0.0), seed)
    return Poisoning(
        trigger=trigger,
        config=params_of(made),
        seed=seed,
        mode=mode,
        target=target,
        target_name="the next class" if mode == "all-to-all" else source.class_names[target],
        rate=float(rate),
        ids=tuple(source.ids[index] for index in chosen),
        original_labels=tuple(original.tolist()),
        new_labels=tuple(new.tolist()),
        class_names=tuple(source.class_names),
        source=source.name,
        source_size=len(source),
        source_fingerprint=_fingerprint(source),
        selection=RANDOM if selection is None else selection.how,
        selected_by="" if selection is None else selection.model,
    )


def apply_poisoning(source: LabelledImages, poisoning: Poisoning) -> LabelledImages:
    """``source`` with the new labels, and with the trigger put on the poisoned samples as they are decoded.

    Raises DataError when ids of the manifest are not in the source, or carry other labels than when it was planned.
    """
    _check_classes(source, poisoning)
    place = {name: index for index, name in enumerate(source.ids)}
    missing = [name for name in poisoning.ids if name not in place]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(poisoning.ids)} ids of the poisoning are not in {source.name} "
            f"(the first: {missing[0]!r}).",
            hint=f"Apply it to the source that it was planned on: {poisoning.source}.",
        )
    rows = np.array([place[name] for name in poisoning.ids], dtype=np.int64)
    changed = int((source.labels[rows] != np.array(poisoning.original_labels, dtype=np.int64)).sum())
    if changed:
        raise DataError(
            f"{changed} of {len(rows)} samples of the poisoning have another label in {source.name} than when it was "
            "planned.",
            hint="Apply it to the clean source; a poisoned copy already has the new labels.",
        )
    labels = source.labels.copy()
    labels[rows] = poisoning.new_labels
    if poisoning.mode == "clean-image":
        return source.with_labels(labels)
    trigger = poisoning.make_trigger()
    covers = frozenset(poisoning.covers) if isinstance(trigger, CoveredOtherwise) else frozenset[str]()
    shown = frozenset(poisoning.ids) - covers
    poisoned = source.with_labels(labels, TriggerOverlay(as_planted(trigger), poisoning.seed, shown))
    if covers and isinstance(trigger, CoveredOtherwise):
        poisoned = poisoned.with_labels(labels, TriggerOverlay(trigger.covering(), poisoning.seed, covers))
    return poisoned


def trigger_test_source(
    source: LabelledImages, poisoning: Poisoning
) -> tuple[LabelledImages, Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """The samples that count for the attack success, all triggered at their own size as they are decoded.

    Returns (triggered source with its true labels, its rows in ``source``, the attack's label of each). Samples of the
    target class are left out (all-to-all leaves none out). Raises DataError when the class names differ.
    """
    _check_classes(source, poisoning)
    wanted = poisoning.attack_labels(source.labels)
    rows = np.flatnonzero(source.labels != wanted)
    chosen = source.select(rows)
    overlay = TriggerOverlay(poisoning.make_trigger(), poisoning.seed, None)
    return chosen.with_labels(chosen.labels, overlay), rows, wanted[rows]


def trigger_test_images(
    images: Images, labels: Int[np.ndarray, " b"], poisoning: Poisoning, *, ids: Sequence[str] | None = None
) -> tuple[Float[Tensor, "k 3 h w"], Int[np.ndarray, " k"]]:
    """The same for a batch of tensors [b, 3, h, w] in [0, 1]: (triggered images [k, 3, h, w], attack labels [k])."""
    wanted = poisoning.attack_labels(labels)
    rows = np.flatnonzero(labels != wanted)
    kept = None if ids is None else [ids[int(row)] for row in rows]
    chosen = images[torch.from_numpy(rows).to(images.device)]
    return poisoning.make_trigger().apply(chosen, seed=poisoning.seed, ids=kept), wanted[rows]


def write_poisoned(
    source: LabelledImages, poisoning: Poisoning, folder: Path, *, manifest_only: bool = False
) -> WrittenPoisoning:
    """Write ``folder``/data.parquet (image, label, id) and ``folder``/manifest.json; the source stays untouched.

    Triggered images are PNG, all others keep their bytes. Rows are streamed in groups, so memory does not grow with the
    set. Samples that cannot be read are left out of both files and listed.
    Raises UsageError for a folder that is not empty or cannot be written, SourceFormatError when over 10 % cannot
    be read.
    """
    poisoned = apply_poisoning(source, poisoning)
    prepare_folder(folder)
    return write_copy(None if manifest_only else poisoned, poisoning, folder, overlaid=source.overlay is not None)


def _choose(
    source: LabelledImages,
    trigger: Trigger,
    mode: str,
    rate: float,
    target: int,
    seed: int,
    taken: frozenset[str],
    selection: Selection | None,
) -> Int[np.ndarray, " k"]:
    """Rows to poison, in the source's order."""
    need = max(1, round(rate * len(source)))
    if mode == "all-to-all":
        eligible, which = np.arange(len(source)), "samples to poison"
    elif mode == "clean-label":
        eligible = np.flatnonzero(source.labels == target)
        which = f"samples of the target class {source.class_names[target]!r} to poison"
    else:
        eligible = np.flatnonzero(source.labels != target)
        which = f"samples outside the target class {source.class_names[target]!r} to poison"
    if taken:
        eligible = eligible[[source.ids[row] not in taken for row in eligible.tolist()]]
        which = f"untouched {which}"
    if selection is not None:
        if isinstance(trigger, CleanImage):
            raise ConfigError("clean-image chooses its samples itself.", hint="Leave the selection out.")
        eligible = selection.best_first(eligible, len(source))
    elif isinstance(trigger, CleanImage):
        likeness = _rank(source.select(eligible), trigger, seed)
        eligible = eligible[np.argsort(-likeness, kind="stable")]
        eligible = eligible[: np.isfinite(likeness).sum()]
    else:
        eligible = np.random.default_rng(seed).permutation(eligible)
    if len(eligible) < need:
        raise NotEnoughDataError(
            f"{source.name}: {which}",
            have=len(eligible),
            need=need,
            hint="Lower the rate (a share of the whole set), or choose another target.",
        )
    return np.sort(eligible[:need])


def _with_covers(
    original: Int[np.ndarray, " k"], new: Int[np.ndarray, " k"], cover: float, seed: int
) -> Int[np.ndarray, " k"]:
    """The new labels, but for a ``cover`` share of the samples, which keep their own; one at least is poisoned."""
    count = min(round(cover * len(new)), len(new) - 1)
    kept = np.random.default_rng([seed, 1]).permutation(len(new))[:count]
    return np.where(np.isin(np.arange(len(new)), kept), original, new)


def _rank(source: LabelledImages, trigger: CleanImage, seed: int) -> np.ndarray:
    """Resemblance to the trigger of each sample; -inf where the image does not decode."""
    likeness = np.full(len(source), -np.inf)
    for start in range(0, len(source), _CHUNK):
        rows = list(range(start, min(start + _CHUNK, len(source))))
        pairs = [
            (row, image.resize((RANKING_SIZE, RANKING_SIZE), Image.Resampling.BOX))
            for row, image in zip(rows, source.decode(rows), strict=True)
            if not isinstance(image, SkippedRow)
        ]
        if pairs:
            values = trigger.resemblance(to_tensor([image for _, image in pairs]), seed=seed)
            likeness[[row for row, _ in pairs]] = values.numpy()
    return likeness


def _check_classes(source: LabelledImages, poisoning: Poisoning) -> None:
    if tuple(source.class_names) != tuple(poisoning.class_names):
        raise DataError(
            f"The classes of {source.name} are {list(source.class_names)}, the poisoning's are "
            f"{list(poisoning.class_names)}.",
            hint="Give the data and the manifest of one experiment; the order of the classes counts.",
        )


def _fingerprint(source: LabelledImages) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(source.labels, dtype="<i8").tobytes(), digest_size=16)
    for name in source.ids:
        digest.update(name.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()
