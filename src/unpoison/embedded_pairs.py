"""Image-caption pairs as detectors see them: what the suspicious CLIP and a reference make of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from unpoison.data.pairs import ImageTextPairs, count_cut_captions
from unpoison.errors import NoSeparationError
from unpoison.evaluation.embeddings import ImageEmbeddings, embed_images, embed_texts
from unpoison.results import SkippedRow
from unpoison.runs import Run
from unpoison.types import ImageTextModel

WEAK_REFERENCE = 0.6
"""Share of pairs more similar to their own caption than to another's under which a reference is called weak; chance
is one half."""
STRANGERS, SAME_CONCEPT = 16, 0.8
"""Other pairs whose captions an image is asked about; those with a cosine over this with its own are left out."""
_TEXTS_AT_ONCE = 4096
_SPREAD = 1e-4
"""Least difference in any dimension of unit embeddings, in float32 or half of it, that is more than rounding."""
_TOLD_AT_ONCE, _APART = 64, 0.01
"""Rows whose captions are looked at together, and the least distance of unit embeddings that tells two of them apart:
the same tokens beside longer texts come out up to 0.003 away in bfloat16."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedded:
    """The usable pairs: ``rows`` of ``pairs``, and what the models make of these.

    ``clip``: the suspicious CLIP. ``suspect``: its unit image embeddings. ``cosines``: of image and caption under the
    reference, the mean over an image's captions, in [-1, 1]; ``captions``: these means, not of length 1; ``misfit``:
    share of other pairs' captions that fit better, in [0, 1]. None where nobody asked. ``alone``: the reference is the
    suspect itself, so that the two cannot bear each other out.
    """

    pairs: ImageTextPairs
    rows: Int[np.ndarray, " k"]
    clip: ImageTextModel
    suspect: Float[np.ndarray, "k d"] | None
    cosines: Float[np.ndarray, " k"] | None
    captions: Float[np.ndarray, "k e"] | None = None
    misfit: Float[np.ndarray, " k"] | None = None
    alone: bool = False
    skipped: tuple[SkippedRow, ...] = ()
    warnings: tuple[str, ...] = ()

    def spread(self, values: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
        """``values`` at their rows of the whole set, NaN elsewhere."""
        whole = np.full(len(self.pairs), np.nan)
        whole[self.rows] = values
        return whole


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionFit:
    """Mean cosine of each image with its ``own`` captions and with those of one ``other`` image, in [-1, 1]; ``misfit``
    as in ``Embedded``; ``means`` of each image's caption embeddings, not of length 1, where they were asked for."""

    own: Float[np.ndarray, " k"]
    other: Float[np.ndarray, " k"]
    misfit: Float[np.ndarray, " k"]
    means: Float[np.ndarray, "k d"] | None


def see_pairs(
    pairs: ImageTextPairs,
    *,
    clip: ImageTextModel,
    reference: ImageTextModel | None,
    suspect: bool = True,
    captions: bool = False,
    run: Run,
) -> Embedded:
    """Embed the pairs. ``suspect``: whether ``clip``'s embeddings are wanted; ``captions``: the reference's of these.

    Raises SourceFormatError (too many unusable rows), NotEnoughDataError, ModelError, NoSeparationError where a model
    gives all images one embedding.
    """
    asked = {"suspect": clip} if suspect else {}
    if reference is not None:
        asked["reference"] = reference
    images = _embed(asked, pairs, run)
    first = next(iter(images.values()))
    rows = np.flatnonzero(first.usable)
    for role, found in images.items():
        check_spread(found.array[rows], role)
    cosines = means = misfit = None
    warnings: tuple[str, ...] = ()
    if reference is not None:
        known = images["reference"].array[rows]
        fit = caption_cosines(reference, pairs, rows, known, means=captions, run=run)
        cosines, means, misfit = fit.own, fit.means, fit.misfit
        warnings = _warnings(clip if suspect else None, reference, pairs, cosines, fit.other)
    return Embedded(
        pairs=pairs,
        rows=rows,
        clip=clip,
        suspect=images["suspect"].array[rows] if suspect else None,
        cosines=cosines,
        captions=means,
        misfit=misfit,
        alone=suspect and reference is not None and clip.fingerprint == reference.fingerprint,
        skipped=tuple({row.id: row for row in (*pairs.skipped, *first.skipped)}.values()),
        warnings=warnings,
    )


def check_spread(embeddings: Float[np.ndarray, "k d"], role: str) -> None:
    """Raises NoSeparationError where all rows are one, as far as rounding lets that be seen; zeros are too."""
    if len(embeddings) and float(np.ptp(embeddings, axis=0).max()) < _SPREAD:
        raise NoSeparationError(
            f"The {role} gives all {len(embeddings):,} images the same embedding: no pair can be told from another.",
            hint="Give a model that tells these images apart, or images that differ.",
        )


def check_captions(pairs: ImageTextPairs, rows: Int[np.ndarray, " k"]) -> None:
    """Raises NoSeparationError where every caption is the same."""
    seen: set[str] = set()
    for start in range(0, len(rows), _TEXTS_AT_ONCE):
        seen.update(text for group in pairs.captions(rows[start : start + _TEXTS_AT_ONCE]) for text in group)
        if len(seen) > 1:
            return
    raise NoSeparationError(
        f"All {len(rows):,} pairs of {pairs.name} have the same caption: nothing can be learnt or unlearnt from them.",
        hint="Give pairs whose captions say what their images show.",
    )


def check_texts(
    pairs: ImageTextPairs, rows: Int[np.ndarray, " k"], models: Mapping[str, ImageTextModel], *, run: Run
) -> None:
    """:func:`check_captions`, and NoSeparationError where one of ``models``, by role, gives all captions one embedding.

    Few captions are embedded, unless the first ones are all alike. Raises ModelError for what is no number.
    """
    check_captions(pairs, rows)
    for role, model in models.items():
        if not _tells_apart(model, pairs, rows, run):
            raise NoSeparationError(
                f"The {role} gives all captions of {pairs.name} the same embedding: no pair can be told from another.",
                hint="Give captions that differ in more than case or what the tokenizer cuts off, or another model.",
            )


def _tells_apart(model: ImageTextModel, pairs: ImageTextPairs, rows: Int[np.ndarray, " k"], run: Run) -> bool:
    first: np.ndarray | None = None
    for start in range(0, len(rows), _TOLD_AT_ONCE):
        texts = {text for group in pairs.captions(rows[start : start + _TOLD_AT_ONCE]) for text in group}
        embedded = embed_texts(model, sorted(texts), run=run)
        first = embedded[0] if first is None else first
        if float(np.linalg.norm(embedded - first, axis=1).max()) > _APART:
            return True
    return False


def caption_cosines(
    reference: ImageTextModel,
    pairs: ImageTextPairs,
    rows: Int[np.ndarray, " k"],
    images: Float[np.ndarray, "k d"],
    *,
    means: bool = False,
    run: Run,
) -> CaptionFit:
    """How each image fits its own captions and those of others: the next ones in an order that the run's seed draws
    within a block of rows."""
    own, other, misfit = np.empty(len(rows)), np.empty(len(rows)), np.empty(len(rows))
    kept = np.empty((len(rows), images.shape[1]), dtype=np.float32) if means else None
    random = np.random.default_rng(run.seed_of("other captions"))
    starts = range(0, len(rows), _TEXTS_AT_ONCE)
    for start in run.progress.track(starts, total=len(rows), what="captions", weight=_TEXTS_AT_ONCE, unit="pairs"):
        part = slice(start, start + _TEXTS_AT_ONCE)
        captions = pairs.captions(rows[part])
        texts = embed_texts(reference, [text for group in captions for text in group], run=run).astype(np.float64)
        ends = np.cumsum([len(group) for group in captions])
        each = np.add.reduceat(texts, np.concatenate([[0], ends[:-1]])) / np.diff(ends, prepend=0)[:, None]
        order = random.permutation(len(each))
        if kept is not None:
            kept[part] = each
        own[part] = np.einsum("nd,nd->n", images[part], each)
        other[part] = np.einsum("nd,nd->n", images[part], each[_next(order, 1)])
        misfit[part] = _misfit(images[part], each, own[part], order)
    return CaptionFit(own=own, other=other, misfit=misfit, means=kept)


def _next(order: Int[np.ndarray, " b"], steps: int) -> Int[np.ndarray, " b"]:
    """For each row the one so many steps before it in ``order``, around the end."""
    found = np.empty_like(order)
    found[order] = np.roll(order, steps)
    return found


def _misfit(
    images: Float[np.ndarray, "b d"],
    texts: Float[np.ndarray, "b d"],
    own: Float[np.ndarray, " b"],
    order: Int[np.ndarray, " b"],
) -> Float[np.ndarray, " b"]:
    """Share of 16 strangers' captions that fit better than the own; 0 where all of them say the same as it."""
    units = texts / np.maximum(np.linalg.norm(texts, axis=1, keepdims=True), np.finfo(float).tiny)
    better, asked = np.zeros(len(own)), np.zeros(len(own))
    for step in range(1, STRANGERS + 1):
        stranger = _next(order, step)
        differs = np.einsum("nd,nd->n", units, units[stranger]) <= SAME_CONCEPT
        better += differs & (np.einsum("nd,nd->n", images, texts[stranger]) > own)
        asked += differs
    return better / np.maximum(asked, 1)


def _embed(models: Mapping[str, ImageTextModel], pairs: ImageTextPairs, run: Run) -> dict[str, ImageEmbeddings]:
    """Image embeddings by role; a model with two roles is asked once, each image decoded once."""
    different = {model.fingerprint: model for model in models.values()}
    found = dict(zip(different, embed_images(list(different.values()), pairs, run=run), strict=True))
    return {role: found[model.fingerprint] for role, model in models.items()}


def _warnings(
    clip: ImageTextModel | None,
    reference: ImageTextModel,
    pairs: ImageTextPairs,
    own: Float[np.ndarray, " k"],
    other: Float[np.ndarray, " k"],
) -> tuple[str, ...]:
    warnings = []
    if clip is not None and clip.fingerprint == reference.fingerprint:
        warnings.append(
            "The reference is the suspect itself: a model that learnt the poison finds poisoned pairs similar."
        )
    knows = float((own > other).mean())
    if knows < WEAK_REFERENCE:
        warnings.append(
            f"The reference finds {100 * knows:.0f} percent of the images more similar to their own captions than to "
            "another's, chance is 50: it hardly knows such pairs. Give a larger one."
        )
    cut = count_cut_captions(reference, pairs)
    if cut.images_without_whole:
        warnings.append(
            f"The reference's tokenizer cuts off every caption of {cut.images_without_whole:,} of {len(pairs):,} "
            "images: these are judged by their beginning."
        )
    return tuple(warnings)
