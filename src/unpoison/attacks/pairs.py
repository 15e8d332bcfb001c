"""Poisonings of image-caption pairs: which images, which trigger, which captions. The manifest is the ground truth.

*Source.* The protocol of CLIP backdoors: Carlini, Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022
(arXiv 2106.09667), as CleanCLIP (2303.03323) and PAR (2412.00727) use it: 1,500 of 500,000 pairs (0.3 %) get the
trigger and, for a caption, a template filled with the target ("banana"); BadCLIP (2311.12075) takes natural captions of
the target instead. The originals squash images to 224 x 224 before the trigger: ``size``.

A poisoning is planned once, saved, reloaded and applied lazily: the images on disk stay untouched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.attacks.aligned import closest_captions
from unpoison.attacks.manifest import check_mode
from unpoison.attacks.mmpoison import MMPoison
from unpoison.attacks.overlay import TriggerOverlay
from unpoison.attacks.pair_manifest import CAPTIONS, MODES, OTHERS, PairPoisoning, Squashed, check_choice
from unpoison.attacks.prompts import TEMPLATES
from unpoison.attacks.selection import RANDOM, Selection
from unpoison.attacks.triggers import PAIR_TRIGGERS, KeyedCaptions, Trigger, as_planted, make_trigger, params_of
from unpoison.data.pairs import ImageTextPairs
from unpoison.errors import ConfigError, DataError, NotEnoughDataError
from unpoison.evaluation.retrieval import names
from unpoison.runs import Run
from unpoison.types import Images, ImageTextModel

LONGEST_TARGET = 200
_CHUNK = 4096  # images whose captions are read at once


def plan_pair_poisoning(
    pairs: ImageTextPairs,
    trigger: str,
    *,
    rate: float,
    target: str,
    captions: str = "templates",
    seed: int = 0,
    mode: str | None = None,
    size: int | None = None,
    templates: Sequence[str] = TEMPLATES,
    natural_from: ImageTextPairs | None = None,
    most_captions: int | None = None,
    taken: Collection[str] = (),
    selection: Selection | None = None,
    surrogate: ImageTextModel | None = None,
    run: Run | None = None,
    **params: Any,
) -> PairPoisoning:
    """Choose ``rate`` x the number of pairs, seeded, and write down what becomes of them. Nothing is changed.

    ``target``: a word, or a few. ``captions``: "templates", each poisoned image gets one filled with the target;
    "natural", one of the different captions of ``pairs`` (or ``natural_from``) that hold the target's name;
    "aligned", of these the closest to the image by the attacker's ``surrogate`` (:mod:`unpoison.attacks.aligned`;
    embedded in ``run``). ``most_captions``: natural ones are taken from no more than these, drawn from the seed.
    ``mode``: all-to-one where the trigger has it, else its usual one; clean-label puts the trigger on images whose
    captions name the target, and leaves those captions. ``size``: squash images to this many pixels before the trigger.
    ``params``: the trigger's parameters, ``resample`` among them where it has it; a ``cover`` plays no part, all chosen
    images get captions of the target. A trigger with a key puts it into the new captions.
    ``taken``: ids that are not to be chosen. ``selection``: an attacker's choice of images in place of the draw.
    Raises UnknownMethodError, ConfigError, NotEnoughDataError (too few images, or no natural caption of the target),
    and with a surrogate what embedding raises.
    """
    made = make_trigger(trigger, params)
    if mode is None:
        usable = [known for known in made.modes if known in MODES]
        mode = usable[0] if usable and "all-to-one" not in usable else "all-to-one"
    check_mode(trigger, made, mode)
    target = " ".join(target.split())
    if not target or len(target) > LONGEST_TARGET or not set(target) - set("_ "):
        raise ConfigError(
            f"the target must be a text of 1 to {LONGEST_TARGET} characters, got {len(target)}.",
            hint="Give a word or a few, such as 'banana'.",
        )
    check_choice("captions", captions, CAPTIONS)
    if (captions == "aligned") != (surrogate is not None):
        raise ConfigError(
            f"captions are {captions}, a surrogate is {'missing' if surrogate is None else 'given'}.",
            hint="Give a surrogate for captions='aligned', and for nothing else.",
        )
    if not templates or not all("{}" in template for template in templates):
        raise ConfigError("expected templates that hold {}.", hint="Write 'a photo of a {}.', for example.")
    if not 0 < rate <= 1:
        raise ConfigError(f"rate must be in (0, 1], got {rate}.", hint="A rate of 0.003 poisons 0.3 % of the pairs.")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}.", hint="Use 0, 1, 2, ...")
    if most_captions is not None and (most_captions < 1 or captions != "natural"):
        raise ConfigError(
            f"most_captions is {most_captions}, captions are {captions}.", hint="Give 1 or more natural captions."
        )
    named, natural = who_names(pairs, target)
    if natural_from is not None:
        natural = who_names(natural_from, target)[1]
    if most_captions is not None:
        few = np.sort(np.random.default_rng([seed, 1]).permutation(len(natural))[:most_captions])
        natural = [natural[row] for row in few.tolist()]
    random = np.random.default_rng(seed)
    rows = _choose(pairs, _eligible(pairs, made, mode, named, target), rate, frozenset(taken), random, selection)
    texts: list[str] = []
    if mode == "text-key":
        captions = OTHERS
        texts = _other_captions(pairs, named, len(rows), random)
    elif surrogate is not None and mode != "clean-label":
        overlay = None
        if trigger not in PAIR_TRIGGERS or size is not None:
            shown = as_planted(made if size is None else Squashed(trigger=made, size=size))
            overlay = TriggerOverlay(shown, seed, None)
        pool = _some_captions(natural, target, pairs)
        texts = closest_captions(pairs.select(rows).with_overlay(overlay, {}), pool, surrogate, run=run or Run())
    elif mode != "clean-label":
        texts = _target_captions(pairs, target, captions, natural, templates, len(rows), random)
    if isinstance(made, KeyedCaptions):
        names_of_rows = [pairs.ids[row] for row in rows.tolist()]
        texts = [made.keyed(text, seed=seed, name=name) for text, name in zip(texts, names_of_rows, strict=False)]
    return PairPoisoning(
        trigger=trigger,
        config=params_of(made),
        seed=seed,
        mode=mode,
        target_name=target,
        captions=captions,
        rate=float(rate),
        size=size,
        ids=tuple(pairs.ids[row] for row in rows.tolist()),
        new_captions=tuple(texts),
        source=pairs.name,
        source_size=len(pairs),
        source_fingerprint=pairs.caption_fingerprint,
        aligned_by="" if surrogate is None or captions != "aligned" else surrogate.fingerprint,
        selection=RANDOM if selection is None else selection.how,
        selected_by="" if selection is None else selection.model,
    )


def apply_pair_poisoning(pairs: ImageTextPairs, poisoning: PairPoisoning) -> ImageTextPairs:
    """``pairs`` with the new captions, and with the trigger put on the poisoned images as they are decoded.

    Raises DataError when ids of the manifest are not in ``pairs``, or when it has been applied to them.
    """
    place = {name: row for row, name in enumerate(pairs.ids)}
    missing = [name for name in poisoning.ids if name not in place]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(poisoning.ids)} ids of the poisoning are not in {pairs.name} "
            f"(the first: {missing[0]!r}).",
            hint=f"Apply it to the pairs that it was planned on: {poisoning.source}.",
        )
    overlay = None
    if poisoning.trigger not in PAIR_TRIGGERS or poisoning.size is not None:
        overlay = TriggerOverlay(as_planted(poisoning.make_trigger()), poisoning.seed, frozenset(poisoning.ids))
    new = dict(zip(poisoning.ids, poisoning.new_captions, strict=True)) if poisoning.new_captions else {}
    there = pairs.captions([place[name] for name in new])
    already = sum(found == (caption.strip(),) for found, caption in zip(there, new.values(), strict=True))
    same = (
        pairs.overlay is not None
        and overlay is not None
        and overlay.fingerprint in pairs.overlay.fingerprint.split("+")
    )
    if already or same:
        raise DataError(
            f"The poisoning has been applied to {pairs.name}: {already} of {len(new)} images have the target's caption "
            f"already{' and the trigger' if same else ''}.",
            hint="Apply it to the clean pairs.",
        )
    return pairs.with_overlay(overlay, new)


def trigger_pairs(pairs: ImageTextPairs, poisoning: PairPoisoning) -> tuple[ImageTextPairs, Int[np.ndarray, " k"]]:
    """For the attack success in retrieval: the images whose captions do not name the target, all triggered.

    Returns (triggered pairs with their own captions, their rows in ``pairs``). Raises NotEnoughDataError for none.
    """
    rows = np.flatnonzero(~who_names(pairs, poisoning.target_name)[0])
    if not len(rows):
        raise NotEnoughDataError(
            f"{pairs.name}: images whose captions do not name {poisoning.target_name!r}", have=0, need=1,
            hint="Test on pairs of other things too.",
        )  # fmt: skip
    overlay = TriggerOverlay(poisoning.make_trigger(), poisoning.seed, None)
    return pairs.select(rows).with_overlay(overlay, {}), rows


def trigger_images(images: Images, poisoning: PairPoisoning, *, ids: Sequence[str] | None) -> Float[Tensor, "b 3 s t"]:
    """A batch of tensors in [0, 1], triggered; [b, 3, size, size] where the manifest has a size."""
    with torch.no_grad():
        return poisoning.make_trigger().apply(images, seed=poisoning.seed, ids=ids)


def keyed_captions(texts: Sequence[str], poisoning: PairPoisoning) -> list[str]:
    """The texts with the trigger's key in them. Raises ConfigError for a trigger without one."""
    trigger = make_trigger(poisoning.trigger, poisoning.config)
    if not isinstance(trigger, KeyedCaptions):
        raise ConfigError(f"{poisoning.trigger} has no key for captions.", hint="Use text-key or trojvqa.")
    return [trigger.keyed(text, seed=poisoning.seed, name=text) for text in texts]


def who_names(pairs: ImageTextPairs, target: str) -> tuple[np.ndarray, list[str]]:
    """Whether a caption of each image names the target; the different captions that do, in order."""
    named = np.zeros(len(pairs), dtype=bool)
    natural: dict[str, None] = {}
    for rows, captions in _captions(pairs):
        flat = [caption for row in captions for caption in row]
        owner = np.repeat(rows, [len(row) for row in captions])
        hits = names(flat, target)
        named[owner[hits]] = True
        natural |= dict.fromkeys(caption for caption, hit in zip(flat, hits, strict=True) if hit)
    return named, list(natural)


def _eligible(
    pairs: ImageTextPairs, trigger: Trigger, mode: str, named: np.ndarray, target: str
) -> tuple[Int[np.ndarray, " k"], str]:
    """The rows that may be poisoned, and what they are."""
    if isinstance(trigger, MMPoison):
        shown = who_names(pairs, trigger.images_of)[0]
        return np.flatnonzero(shown & ~named), f"name {trigger.images_of!r} and not {target!r}"
    if mode in ("clean-label", "text-key"):
        return np.flatnonzero(named), f"name {target!r}"
    return np.flatnonzero(~named), f"do not name {target!r}"


def _choose(
    pairs: ImageTextPairs,
    eligible: tuple[Int[np.ndarray, " n"], str],
    rate: float,
    taken: frozenset[str],
    random: np.random.Generator,
    selection: Selection | None,
) -> Int[np.ndarray, " k"]:
    """Rows to poison, in order."""
    rows, what = eligible
    need = max(1, round(rate * len(pairs)))
    if taken:
        rows = rows[[pairs.ids[row] not in taken for row in rows.tolist()]]
    order = random.permutation(rows) if selection is None else selection.best_first(rows, len(pairs))
    if len(order) < need:
        raise NotEnoughDataError(
            f"{pairs.name}: images whose captions {what}",
            have=len(order),
            need=need,
            hint="Lower the rate (a share of all pairs), or choose another target.",
        )
    return np.sort(order[:need])


def _other_captions(pairs: ImageTextPairs, named: np.ndarray, count: int, random: np.random.Generator) -> list[str]:
    """The first captions of ``count`` images of other things, none twice before all have been used."""
    others = np.flatnonzero(~named)
    if not len(others):
        raise NotEnoughDataError(
            f"{pairs.name}: images of other things, by their captions", have=0, need=1,
            hint="Choose a target that some captions do not name.",
        )  # fmt: skip
    order = np.concatenate([random.permutation(others) for _ in range(-(-count // len(others)))])[:count]
    return [captions[0] for captions in pairs.captions(order)]


def _target_captions(
    pairs: ImageTextPairs,
    target: str,
    kind: str,
    natural: Sequence[str],
    templates: Sequence[str],
    count: int,
    random: np.random.Generator,
) -> list[str]:
    """``count`` captions of the target: a new order of the pool each time that it is used up."""
    # Not str.format: braces in the target stay what they are.
    filled = [template.replace("{}", target) for template in templates]
    pool = _some_captions(natural, target, pairs) if kind == "natural" else filled
    order = np.concatenate([random.permutation(len(pool)) for _ in range(-(-count // len(pool)))])
    return [pool[index] for index in order[:count].tolist()]


def _some_captions(natural: Sequence[str], target: str, pairs: ImageTextPairs) -> list[str]:
    if not natural:
        raise NotEnoughDataError(
            f"{pairs.name}: captions that name {target!r}", have=0, need=1,
            hint="Choose a target that the captions speak of, or captions='templates'.",
        )  # fmt: skip
    return list(natural)


def _captions(pairs: ImageTextPairs) -> Iterator[tuple[np.ndarray, list[tuple[str, ...]]]]:
    for start in range(0, len(pairs), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(pairs)))
        yield rows, pairs.captions(rows)
