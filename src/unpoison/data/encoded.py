"""Rows of encoded images with stable ids: what labelled images and image-text pairs have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from unpoison.data.images import UndecodableImage, decode_image, quiet_pillow
from unpoison.data.paths import InsideFolder, PathRefused
from unpoison.results import SkippedRow

Picture = Image.Image | SkippedRow
_AT_ONCE = 1024


@runtime_checkable
class Overlay(Protocol):
    """A change to some images of a set, applied when they are decoded; files and bytes stay as they are."""

    @property
    def fingerprint(self) -> str:
        """Content hash of the change: equal fingerprints give equal pictures for the same ids and bytes."""
        ...

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]: ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EncodedImages:
    """Encoded images with ids. Opening them decodes nothing and copies no image.

    ``dataset`` has the column "image" of {"bytes", "path"}; its rows stand beside ``ids``. Images named by a path are
    read only inside ``root``, or inside the row's own of ``roots``. ``skipped`` are the rows left out when opening.
    """

    name: str
    dataset: datasets.Dataset
    ids: list[str]
    root: Path | None = None
    roots: Sequence[Path | None] | None = None
    skipped: tuple[SkippedRow, ...] = ()
    overlay: Overlay | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def raw(self, indices: Iterable[int] | np.ndarray) -> list[bytes | SkippedRow]:
        """The encoded bytes of each row, not decoded, without the overlay; SkippedRow where there are none."""
        rows = as_rows(indices, len(self))
        if len(rows) == 0:
            return []
        content: list[bytes | SkippedRow] = []
        for row, cell in zip(rows.tolist(), image_cells(take(self._arrow, rows)), strict=True):
            content.append(cell if isinstance(cell, bytes) else self._read(row, cell))
        return content

    def decode(self, indices: Iterable[int] | np.ndarray) -> list[Picture]:
        """RGB images with the overlay applied; SkippedRow with the reason where an image cannot be used."""
        rows = as_rows(indices, len(self))
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

    def image_stamps(self) -> Iterable[bytes]:
        """What tells that an image changed: its bytes where the rows hold them, else its file's size and time."""
        tables = self._arrow.iter(_AT_ONCE)
        for row, cell in enumerate(chain.from_iterable(map(image_cells, tables))):
            yield cell if isinstance(cell, bytes) else self._inside(row).stamp(cell or "").encode()

    def _chosen(self, rows: np.ndarray) -> dict[str, Any]:
        """The fields of these rows alone, for ``dataclasses.replace``."""
        roots = None if self.roots is None else [self.roots[row] for row in rows.tolist()]
        return {"dataset": self.dataset.select(rows), "ids": [self.ids[row] for row in rows.tolist()], "roots": roots}

    def _stacked(self, overlay: Overlay | None) -> Overlay | None:
        """``overlay``, if given, applied after the one already there."""
        if overlay is None or self.overlay is None:
            return overlay or self.overlay
        return _Stacked(first=self.overlay, second=overlay)

    def _read(self, row: int, path: str | None) -> bytes | SkippedRow:
        if path is None:
            return SkippedRow(id=self.ids[row], reason="the row has no image")
        try:
            return self._inside(row).read(path)
        except PathRefused as refused:
            return SkippedRow(id=self.ids[row], reason=refused.reason)

    @cached_property
    def _arrow(self) -> datasets.Dataset:
        return self.dataset.with_format("arrow")

    def _inside(self, row: int) -> InsideFolder:
        return self._folders[self.root if self.roots is None else self.roots[row]]

    @cached_property
    def _folders(self) -> dict[Path | None, InsideFolder]:
        return {root: InsideFolder(root) for root in {self.root, *(self.roots or ())}}


@dataclass(frozen=True, kw_only=True)
class _Stacked:
    first: Overlay
    second: Overlay

    @property
    def fingerprint(self) -> str:
        return f"{self.first.fingerprint}+{self.second.fingerprint}"

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]:
        return self.second(ids, self.first(ids, images))


def as_rows(indices: Iterable[int] | np.ndarray, total: int) -> np.ndarray:
    """Row numbers as int64. Raises TypeError for what are no whole numbers, IndexError outside 0..total-1."""
    rows = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.dtype == np.bool_ or not np.issubdtype(rows.dtype, np.integer):
        raise TypeError(f"expected whole-number indices, got {rows.dtype}")
    if rows.min() < 0 or rows.max() >= total:
        raise IndexError(f"expected indices in 0..{total - 1}, got {rows.min()}..{rows.max()}")
    return rows.astype(np.int64)


def take(arrow: datasets.Dataset, rows: np.ndarray) -> pa.Table:
    """At least one row of a data set in Arrow format; neighbours are sliced, which copies nothing."""
    first, last = int(rows[0]), int(rows[-1])
    in_order = last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all())
    return arrow[first : last + 1] if in_order else arrow[rows]


def image_cells(table: pa.Table) -> Iterable[bytes | str | None]:
    """Of each cell of the image column: its bytes, else its path, else None."""
    for chunk in table.column("image").chunks:
        absent = chunk.is_null().to_pylist()
        content, paths = chunk.field("bytes").to_pylist(), chunk.field("path").to_pylist()
        for missing, data, path in zip(absent, content, paths, strict=True):
            yield None if missing else path if data is None else data
