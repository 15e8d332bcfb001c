"""Every data set opens as ``LabelledImages``: rows of encoded images, each with a stable id and its given label."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from jaxtyping import Int64
from PIL import Image

from unpoison.data.images import UndecodableImage, decode_image, quiet_pillow
from unpoison.data.labels import resolve_labels
from unpoison.data.layouts import Layout, open_layout
from unpoison.data.paths import InsideFolder, PathRefused
from unpoison.data.shapes import SHAPES_CLASSES, make_shapes
from unpoison.errors import ConfigError, NotEnoughDataError, SourceFormatError
from unpoison.results import SkippedRow

MAX_SKIPPED_SHARE = 0.10
_ROWS_SUFFIX = re.compile(r"(?P<source>.+)\[(?P<start>\d*):(?P<stop>\d*)\]")
_SHAPES = re.compile(r"shapes(:(?P<count>\d{1,9}))?(:(?P<seed>\d{1,9}))?")
_SHAPES_COUNT = 5000
_HASHED_AT_ONCE = 1024

Picture = Image.Image | SkippedRow


@runtime_checkable
class Overlay(Protocol):
    """A change to some images of a set, applied when they are decoded; files and bytes stay as they are."""

    @property
    def fingerprint(self) -> str:
        """Content hash of the change: equal fingerprints give equal pictures for the same ids and bytes."""
        ...

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]: ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LabelledImages:
    """Encoded images with ids and given labels. Opening one decodes nothing and copies no image.

    ``dataset`` has the column "image" of {"bytes", "path"}; its rows stand beside ``ids`` and ``labels``. Images named
    by a path are read only inside ``root``. ``skipped`` are the rows left out when opening.
    """

    name: str
    dataset: datasets.Dataset
    ids: list[str]
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]
    root: Path | None = None
    skipped: tuple[SkippedRow, ...] = ()
    overlay: Overlay | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"LabelledImages({self.name!r}, {len(self)} rows, {len(self.class_names)} classes)"

    def select(self, indices: Iterable[int] | np.ndarray) -> LabelledImages:
        """The rows at ``indices`` (from 0, repeats allowed) in that order. Raises IndexError outside 0..n-1."""
        rows = _as_rows(indices, len(self))
        return replace(
            self,
            dataset=self.dataset.select(rows),
            ids=[self.ids[row] for row in rows.tolist()],
            labels=self.labels[rows],
        )

    def with_labels(self, labels: Int64[np.ndarray, " n"], overlay: Overlay | None = None) -> LabelledImages:
        """The same images under other labels; ``overlay``, if given, is applied after the one already there."""
        if overlay is None or self.overlay is None:
            stacked = overlay or self.overlay
        else:
            stacked = _Stacked(first=self.overlay, second=overlay)
        return replace(self, labels=labels, overlay=stacked)

    def raw(self, indices: Iterable[int] | np.ndarray) -> list[bytes | SkippedRow]:
        """The encoded bytes of each row, not decoded, without the overlay; SkippedRow where there are none."""
        rows = _as_rows(indices, len(self))
        if len(rows) == 0:
            return []
        first, last = int(rows[0]), int(rows[-1])
        in_order = last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all())
        table = self._arrow[first : last + 1] if in_order else self._arrow[rows]
        content: list[bytes | SkippedRow] = []
        for row, cell in zip(rows.tolist(), _cells(table), strict=True):
            content.append(cell if isinstance(cell, bytes) else self._read(row, cell))
        return content

    def decode(self, indices: Iterable[int] | np.ndarray) -> list[Picture]:
        """RGB images with the overlay applied; SkippedRow with the reason where an image cannot be used."""
        rows = _as_rows(indices, len(self))
        images: list[Picture] = []
        with quiet_pillow:
            for row, content in zip(rows.tolist(), self.raw(rows), strict=True):
                if isinstance(content, SkippedRow):
                    images.append(content)
                    continue
                try:
                    images.append(decode_image(content))
                except UndecodableImage as error:
                    images.append(SkippedRow(id=self.ids[row], reason=error.reason))
        if self.overlay is None or not images:
            return images
        return self.overlay([self.ids[row] for row in rows.tolist()], images)

    def fingerprint(self) -> str:
        """Hash of ids, labels, class names and images: by their bytes where the rows hold them, else by each file's
        size and time of change, so that no file is read. The overlay does not count."""
        digest = hashlib.blake2b(repr((self.ids, self.class_names)).encode(errors="surrogatepass"), digest_size=16)
        digest.update(self.labels.tobytes())
        for table in self._arrow.iter(_HASHED_AT_ONCE):
            for cell in _cells(table):
                content = cell if isinstance(cell, bytes) else self._inside.stamp(cell or "").encode()
                digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()

    def _read(self, row: int, path: str | None) -> bytes | SkippedRow:
        if path is None:
            return SkippedRow(id=self.ids[row], reason="the row has no image")
        try:
            return self._inside.read(path)
        except PathRefused as refused:
            return SkippedRow(id=self.ids[row], reason=refused.reason)

    @cached_property
    def _arrow(self) -> datasets.Dataset:
        return self.dataset.with_format("arrow")

    @cached_property
    def _inside(self) -> InsideFolder:
        return InsideFolder(self.root)


@dataclass(frozen=True, kw_only=True)
class _Stacked:
    first: Overlay
    second: Overlay

    @property
    def fingerprint(self) -> str:
        return f"{self.first.fingerprint}+{self.second.fingerprint}"

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]:
        return self.second(ids, self.first(ids, images))


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
    name = str(source)
    if limit is not None and limit < 1:
        raise ConfigError(f"expected a limit of at least 1, got {limit}.", hint="Leave the limit away for all rows.")
    if rows is not None and rows.step not in (None, 1):
        raise ConfigError(f"expected rows without a step, got step {rows.step}.", hint="Use rows START:STOP.")
    place, rows = _split_rows(name, rows)
    shapes = _SHAPES.fullmatch(place)
    if shapes and not Path(place).exists():
        layout = _open_shapes(shapes, seed)
    else:
        layout = open_layout(place, image_column=image_column, label_column=label_column, split=split)
    opened = _usable_rows(layout, name, rows or slice(None), class_names, strict=strict)
    if limit is None or limit >= len(opened):
        return opened
    return opened.select(np.sort(np.random.default_rng(seed).choice(len(opened), limit, replace=False)))


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
    window = range(total)[rows]
    if not window:
        raise NotEnoughDataError(
            f"{name}: rows", have=0, need=1, hint=f"The source holds {total:,} rows; choose others."
        )
    seen: set[str] = set()
    kept: list[int] = []
    skipped: list[SkippedRow] = []
    for row in window:
        sample = layout.ids[row]
        reason = layout.reasons.get(row) or resolved.reasons.get(row)
        if reason is None and sample in seen:
            reason = "two rows of one id; this is the later one"
        if reason is None:
            seen.add(sample)
            kept.append(row)
        else:
            skipped.append(SkippedRow(id=sample, reason=reason))
    check_skips(skipped, len(window), name, strict=strict)
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


def _open_shapes(match: re.Match[str], seed: int) -> Layout:
    count, seed = int(match["count"] or _SHAPES_COUNT), int(match["seed"] or seed)
    world = make_shapes(count, seed=seed)
    encoded = []
    for pixels in world.images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        encoded.append(buffer.getvalue())
    images = pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.nulls(count, pa.string())], ["bytes", "path"]
    )
    dataset = datasets.Dataset(InMemoryTable(pa.table({"image": images})))
    return Layout(
        dataset=dataset.cast_column("image", datasets.Image(decode=False)),
        ids=[f"shapes-{seed}:{row}" for row in range(count)],
        labels=pa.array(world.labels),
        names=SHAPES_CLASSES,
        root=None,
    )


def _split_rows(source: str, rows: slice | None) -> tuple[str, slice | None]:
    """Cut a "[start:stop]" suffix off, unless a file of that very name exists."""
    match = _ROWS_SUFFIX.fullmatch(source)
    if match is None or Path(source).exists():
        return source, rows
    if rows is not None:
        raise ConfigError(f"{source} names rows, and rows are given as well.", hint="Name them once.")
    start, stop = (int(text) if text else None for text in (match["start"], match["stop"]))
    return match["source"], slice(start, stop)


def _as_rows(indices: Iterable[int] | np.ndarray, total: int) -> np.ndarray:
    rows = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.dtype == np.bool_ or not np.issubdtype(rows.dtype, np.integer):
        raise TypeError(f"expected whole-number indices, got {rows.dtype}")
    if rows.min() < 0 or rows.max() >= total:
        raise IndexError(f"expected indices in 0..{total - 1}, got {rows.min()}..{rows.max()}")
    return rows.astype(np.int64)


def _cells(table: pa.Table) -> Iterable[bytes | str | None]:
    """Of each cell of the image column: its bytes, else its path, else None."""
    for chunk in table.column("image").chunks:
        absent = chunk.is_null().to_pylist()
        content, paths = chunk.field("bytes").to_pylist(), chunk.field("path").to_pylist()
        for missing, data, path in zip(absent, content, paths, strict=True):
            yield None if missing else path if data is None else data
