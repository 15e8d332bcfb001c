"""Every data set opens as ``LabelledImages``: rows of encoded images, each with a stable id and its given label."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from jaxtyping import Int64
from PIL import Image

from unpoison.data.encoded import EncodedImages, Overlay, as_rows
from unpoison.data.encoded import Picture as Picture
from unpoison.data.labels import resolve_labels
from unpoison.data.layouts import Layout, open_layout
from unpoison.data.shapes import SHAPES_CLASSES, ShapesWorld, make_shapes
from unpoison.errors import ConfigError, NotEnoughDataError, SourceFormatError
from unpoison.results import SkippedRow

MAX_SKIPPED_SHARE = 0.10
_ROWS_SUFFIX = re.compile(r"(?P<source>.+)\[(?P<start>\d*):(?P<stop>\d*)\]")
_SHAPES = re.compile(r"shapes(:(?P<count>\d{1,9}))?(:(?P<seed>\d{1,9}))?")
_SHAPES_COUNT = 5000


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LabelledImages(EncodedImages):
    """Encoded images with ids and given labels, which stand beside the rows and index ``class_names``."""

    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]

    def __repr__(self) -> str:
        return f"LabelledImages({self.name!r}, {len(self)} rows, {len(self.class_names)} classes)"

    def select(self, indices: Iterable[int] | np.ndarray) -> LabelledImages:
        """The rows at ``indices`` (from 0, repeats allowed) in that order. Raises IndexError outside 0..n-1."""
        rows = as_rows(indices, len(self))
        return replace(self, **self._chosen(rows), labels=self.labels[rows])

    def with_labels(self, labels: Int64[np.ndarray, " n"], overlay: Overlay | None = None) -> LabelledImages:
        """The same images under other labels; ``overlay``, if given, is applied after the one already there."""
        return replace(self, labels=labels, overlay=self._stacked(overlay))

    def fingerprint(self) -> str:
        """Hash of ids, labels, class names and images: by their bytes where the rows hold them, else by each file's
        size and time of change, so that no file is read. The overlay does not count."""
        digest = hashlib.blake2b(repr((self.ids, self.class_names)).encode(errors="surrogatepass"), digest_size=16)
        digest.update(self.labels.tobytes())
        for content in self.image_stamps():
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


def open_images(
    source: str | Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    split: str | None = None,
    rows: slice | None = None,
    limit: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> LabelledImages:
    """Open a labelled image set.

    ``source``: a folder of class folders; a .parquet, .csv, .jsonl or WebDataset .tar file or a folder of parquet files
    or shards; a Hugging Face data set id; or "shapes", "shapes:N", "shapes:N:SEED", the built-in world. A suffix
    "[25000:35000]" (or ``rows``) takes those rows; ids do not depend on it. ``limit`` keeps a random sample of the
    usable rows, in their order, drawn by ``seed`` (which is also the shapes world's unless the source names one).

    Rows without an image that may be read, with a label outside the class list, or with an id that came before are left
    out and listed in ``skipped``; with ``strict`` any of them is fatal, else more than a tenth.

    Raises SourceFormatError (a layout we do not read; too many bad rows), LabelRangeError (no label in the class list),
    NotEnoughDataError (fewer than two classes), ConfigError (``limit`` < 1 or a slice with a step).
    """
    opening = read_request(source, rows=rows, limit=limit, seed=seed)
    if opening.shapes is not None:
        layout = _open_shapes(*opening.shapes)
    else:
        layout = open_layout(opening.place, image_column=image_column, label_column=label_column, split=split)
    opened = _usable_rows(layout, opening.name, opening.rows, class_names, strict=strict)
    return opened if limit is None or limit >= len(opened) else opened.select(draw(len(opened), limit, seed))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user's source asks for. ``shapes`` are the count and the seed where it is the built-in world."""

    name: str
    place: str
    rows: slice
    shapes: tuple[int, int] | None


def read_request(source: str | Path, *, rows: slice | None, limit: int | None, seed: int) -> Request:
    """Take "path[start:stop]" and "shapes:N:SEED" apart. Raises ConfigError (``limit`` < 1, a slice with a step)."""
    name = str(source)
    if limit is not None and limit < 1:
        raise ConfigError(f"expected a limit of at least 1, got {limit}.", hint="Leave the limit away for all rows.")
    if rows is not None and rows.step not in (None, 1):
        raise ConfigError(f"expected rows without a step, got step {rows.step}.", hint="Use rows START:STOP.")
    place, rows = _split_rows(name, rows)
    match = _SHAPES.fullmatch(place)
    shapes = None
    if match is not None and not Path(place).exists():
        shapes = int(match["count"] or _SHAPES_COUNT), int(match["seed"] or seed)
    return Request(name=name, place=place, rows=rows or slice(None), shapes=shapes)


def window(name: str, rows: slice, total: int) -> range:
    """The rows of ``total`` that were asked for. Raises NotEnoughDataError where there are none."""
    chosen = range(total)[rows]
    if not chosen:
        raise NotEnoughDataError(
            f"{name}: rows", have=0, need=1, hint=f"The source holds {total:,} rows; choose others."
        )
    return chosen


def draw(total: int, limit: int, seed: int) -> Int64[np.ndarray, " limit"]:
    """``limit`` of ``total`` rows at random, in order."""
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))


def check_skips(skipped: Sequence[SkippedRow], total: int, name: str, *, strict: bool = False) -> None:
    """Stop when more than a tenth of ``total`` rows of the source ``name`` are skipped (``strict``: any at all).

    Raises SourceFormatError with the first reasons.
    """
    if not skipped or (not strict and len(skipped) <= MAX_SKIPPED_SHARE * total):
        return
    reasons = "; ".join(f"{row.id}: {row.reason}" for row in skipped[:3])
    bound = "none, as asked" if strict else f"at most {MAX_SKIPPED_SHARE:.0%}"
    raise SourceFormatError(
        f"{len(skipped):,} of {total:,} rows cannot be used, expected {bound}. The first: {reasons}.",
        path=name,
        hint="Mend or remove these rows, or check that the right columns are read.",
    )


def _usable_rows(
    layout: Layout, name: str, rows: slice, class_names: Sequence[str] | None, *, strict: bool
) -> LabelledImages:
    resolved = resolve_labels(layout.labels, path=name, names=layout.names, given=class_names)
    total = len(layout.ids)
    seen: set[str] = set()
    kept: list[int] = []
    skipped: list[SkippedRow] = []
    chosen = window(name, rows, total)
    for row in chosen:
        sample = layout.ids[row]
        reason = layout.reasons.get(row) or resolved.reasons.get(row)
        if reason is None and sample in seen:
            reason = "two rows of one id; this is the later one"
        if reason is None:
            seen.add(sample)
            kept.append(row)
        else:
            skipped.append(SkippedRow(id=sample, reason=reason))
    check_skips(skipped, len(chosen), name, strict=strict)
    labels = resolved.labels[kept]
    present = len(np.unique(labels))
    if present < 2:
        raise NotEnoughDataError(
            f"{name}: classes with images", have=present, need=2, hint="A classifier needs two classes to tell apart."
        )
    whole = len(kept) == total
    return LabelledImages(
        name=name,
        dataset=layout.dataset if whole else layout.dataset.select(kept),
        ids=layout.ids if whole else [layout.ids[row] for row in kept],
        labels=labels,
        class_names=resolved.class_names,
        root=layout.root,
        skipped=tuple(skipped),
    )


def shapes_rows(count: int, seed: int) -> tuple[datasets.Dataset, list[str], ShapesWorld]:
    """The built-in world as PNG images in a column "image", with ids, and all that is true of them."""
    world = make_shapes(count, seed=seed)
    encoded = []
    for pixels in world.images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        encoded.append(buffer.getvalue())
    return images_in_memory(encoded), [f"shapes-{seed}:{row}" for row in range(count)], world


def images_in_memory(encoded: Sequence[bytes]) -> datasets.Dataset:
    """A data set with the column "image" of encoded images, held in Arrow's memory."""
    images = pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.nulls(len(encoded), pa.string())], ["bytes", "path"]
    )
    dataset = datasets.Dataset(InMemoryTable(pa.table({"image": images})))
    return dataset.cast_column("image", datasets.Image(decode=False))


def _open_shapes(count: int, seed: int) -> Layout:
    dataset, ids, world = shapes_rows(count, seed)
    return Layout(dataset=dataset, ids=ids, labels=pa.array(world.labels), names=SHAPES_CLASSES, root=None)


def _split_rows(source: str, rows: slice | None) -> tuple[str, slice | None]:
    """Cut a "[start:stop]" suffix off, unless a file of that very name exists."""
    match = _ROWS_SUFFIX.fullmatch(source)
    if match is None or Path(source).exists():
        return source, rows
    if rows is not None:
        raise ConfigError(f"{source} names rows, and rows are given as well.", hint="Name them once.")
    start, stop = (int(text) if text else None for text in (match["start"], match["stop"]))
    return match["source"], slice(start, stop)
