"""A poisoned copy on disk: parquet in the layout that Hugging Face ``datasets`` writes, and the manifest."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unpoison.data.sources import LabelledImages, check_skips
from unpoison.errors import UsageError
from unpoison.results import SkippedRow
from unpoison.storage import partial_of

DATA, MANIFEST = "data.parquet", "manifest.json"
ROW_GROUP = 256


@runtime_checkable
class WritableManifest(Protocol):
    """A manifest of labelled images, of one part or of several."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    @property
    def changed(self) -> frozenset[str]:
        """Ids of the samples whose pixels change."""
        ...

    def without(self, left_out: Collection[str]) -> WritableManifest: ...

    def save(self, path: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class WrittenPoisoning:
    """What was written. ``data`` is None with the manifest only; ``rows`` counts the rows of the parquet file."""

    manifest: Path
    data: Path | None
    rows: int
    poisoned: int
    skipped: tuple[SkippedRow, ...]


def write_copy(
    poisoned: LabelledImages | None, poisoning: WritableManifest, folder: Path, *, overlaid: bool
) -> WrittenPoisoning:
    """Both files, each whole or not at all; the manifest only when ``poisoned`` is None.

    ``overlaid``: the source had an overlay before the poisoning, so that no image is as it is on disk.
    """
    manifest, data = folder / MANIFEST, folder / DATA
    if poisoned is None:
        poisoning.save(manifest)
        return WrittenPoisoning(manifest=manifest, data=None, rows=0, poisoned=len(poisoning.ids), skipped=())
    skipped: list[SkippedRow] = []
    partial = partial_of(data)
    try:
        rows = _write_rows(poisoned, set(poisoned.ids) if overlaid else set(poisoning.changed), partial, skipped)
        check_skips(skipped, len(poisoned), poisoned.name)
        left_out = {row.id for row in skipped}
        kept = poisoning.without(left_out) if left_out.intersection(poisoning.ids) else poisoning
        kept.save(manifest)
        partial.replace(data)
    finally:
        partial.unlink(missing_ok=True)  # our own unfinished file
    return WrittenPoisoning(manifest=manifest, data=data, rows=rows, poisoned=len(kept.ids), skipped=tuple(skipped))


def prepare_folder(folder: Path) -> None:
    """Create the folder. Raises UsageError when it is not empty or cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(entry for entry in folder.iterdir() if not entry.name.endswith(".partial")):
            raise UsageError(f"{folder} is not empty.", hint="Choose another -o folder; nothing there was touched.")
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}.", hint="Choose an -o folder that you may write to."
        ) from error


def _write_rows(source: LabelledImages, changed: set[str], path: Path, skipped: list[SkippedRow]) -> int:
    """Stream all readable rows into ``path``, those in ``changed`` through the overlay; returns their number."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(source.class_names)),
            "id": datasets.Value("string"),
        }
    )
    schema = features.arrow_schema
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        for rows in _groups(source, changed, skipped):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def _groups(source: LabelledImages, changed: set[str], skipped: list[SkippedRow]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(source), ROW_GROUP):
        indices = list(range(start, min(start + ROW_GROUP, len(source))))
        through = [row for row in indices if source.ids[row] in changed]
        found: dict[int, bytes | SkippedRow] = {
            row: image if isinstance(image, SkippedRow) else _png(image)
            for row, image in zip(through, source.decode(through), strict=True)
        }
        untouched = [row for row in indices if row not in found]
        found |= zip(untouched, source.raw(untouched), strict=True)
        group: list[dict[str, Any]] = []
        for row in indices:
            content = found[row]
            if isinstance(content, SkippedRow):
                skipped.append(content)
            else:
                image = {"bytes": content, "path": None}
                group.append({"image": image, "label": int(source.labels[row]), "id": source.ids[row]})
        if group:
            yield group


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
