"""A clean copy of a scanned set: which rows stay, and the parquet file that holds them. Nothing is ever deleted."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, List, Value
from jaxtyping import Int

from unpoison.data.pairs import ImageTextPairs
from unpoison.data.sources import LabelledImages
from unpoison.errors import DataError, ResultError, UsageError
from unpoison.results import CLEAN, MIXED, SKIPPED, SUSPECT, SkippedRow, Split
from unpoison.runs import Progress, Silent
from unpoison.storage import partial_of

KEEP, DROP = "keep", "drop"
_ROWS = 1000  # written at once: bounds memory
_SCHEMA = "unpoison/decisions"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows of a split that stay, and how many went where."""

    rows: Int[np.ndarray, " k"]
    kept: int
    kept_mixed: int
    kept_by_decision: int
    dropped_suspect: int
    dropped_by_decision: int
    skipped: int


def select_clean(split: Split, decisions: Mapping[str, str]) -> Selection:
    """Clean and mixed rows stay, suspect and skipped ones go; a decision of keep or drop by id overrules the scan.

    A skipped row cannot be kept: it holds no image. Raises UsageError for a decision about an id not in the split.
    """
    places = {name: row for row, name in enumerate(split.ids)}
    unknown = [name for name in decisions if name not in places]
    if unknown:
        raise UsageError(
            f"{len(unknown)} decisions are about ids that the scan does not hold, the first is {unknown[0]!r}.",
            hint="Give the decisions file that was exported from this run's report.",
        )
    stays = np.isin(split.region, (CLEAN, MIXED))
    by_scan = stays.copy()
    for name, decision in decisions.items():
        stays[places[name]] = decision == KEEP
    stays &= split.region != SKIPPED
    return Selection(
        rows=np.flatnonzero(stays),
        kept=int(stays.sum()),
        kept_mixed=int((stays & (split.region == MIXED)).sum()),
        kept_by_decision=int((stays & ~by_scan).sum()),
        dropped_suspect=int((~stays & (split.region == SUSPECT)).sum()),
        dropped_by_decision=int((~stays & by_scan).sum()),
        skipped=int((split.region == SKIPPED).sum()),
    )


def read_decisions(path: Path) -> dict[str, str]:
    """Decisions by id: the report's JSON export, or a CSV file with the columns ``id`` and ``decision``.

    Raises UsageError where the file is neither or a decision is not keep or drop.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({error}).", hint="Give the decisions file that the report exports."
        ) from error
    found = _from_json(path, text) if text.lstrip().startswith("{") else _from_csv(path, text)
    for name, decision in found.items():
        if decision not in (KEEP, DROP):
            raise UsageError(
                f"{path}: expected keep or drop for {name!r}, found {decision!r}.", hint="Correct that decision."
            )
    return found


def _from_json(path: Path, text: str) -> dict[str, str]:
    try:
        body = msgspec.json.decode(text)
        if body.get("schema") != _SCHEMA:
            raise UsageError(
                f"{path}: expected schema {_SCHEMA}, found {body.get('schema')!r}.",
                hint="Give the decisions file that the report exports.",
            )
        return msgspec.convert(body.get("decisions"), dict[str, str])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{path}: {error}.", hint="Give the decisions file that the report exports.") from error


def _from_csv(path: Path, text: str) -> dict[str, str]:
    reader = csv.DictReader(text.splitlines())
    if not {"id", "decision"} <= set(reader.fieldnames or ()):
        raise UsageError(
            f"{path}: expected the columns id and decision, found {reader.fieldnames or 'none'}.",
            hint="Give the decisions file that the report exports, or a CSV with these two columns.",
        )
    found: dict[str, str] = {}
    for row in reader:
        name, decision = row["id"] or "", (row["decision"] or "").strip().lower()
        if found.get(name, decision) != decision:
            raise UsageError(f"{path}: {name!r} is to be kept and dropped.", hint="Leave one of the two lines.")
        if decision:
            found[name] = decision
    return found


def locate(source: LabelledImages | ImageTextPairs, split: Split, rows: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Where the split's ``rows`` are in ``source``. Raises DataError when the source is no longer what was scanned."""
    places = {name: row for row, name in enumerate(source.ids)}
    found = np.array([places.get(split.ids[row], -1) for row in rows], dtype=np.int64)
    gone = np.flatnonzero(found < 0)
    if len(gone):
        raise DataError(
            f"{source.name}: {len(gone)} of {len(rows)} scanned samples are not there, "
            f"the first is {split.ids[int(rows[gone[0]])]!r}.",
            hint="Give the scanned source with --data.",
        )
    if isinstance(source, ImageTextPairs):
        return found
    if source.class_names != split.class_names or not np.array_equal(source.labels[found], split.labels[rows]):
        raise DataError(f"{source.name}: labels are not those that were scanned.", hint="Scan the source again.")
    return found


def write_clean_copy(
    source: LabelledImages | ImageTextPairs,
    rows: Int[np.ndarray, " k"],
    path: Path,
    *,
    progress: Progress | None = None,
) -> list[SkippedRow]:
    """Write ``rows`` of ``source`` to a new parquet file, whole or not at all.

    Columns: image (bytes as they are), label or captions (a list of texts), id.
    Returns the rows that could not be read. Raises UsageError when ``path`` exists or cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path} exists.", hint="Choose another -o file; nothing was overwritten.")
    told = (
        {"captions": List(Value("string"))}
        if isinstance(source, ImageTextPairs)
        else {"label": ClassLabel(names=list(source.class_names))}
    )
    features = Features({"image": Image(), **told, "id": Value("string")})
    partial = partial_of(path)
    skipped: list[SkippedRow] = []
    chunks = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, features.arrow_schema) as writer:
            for chunk in (progress or Silent()).track(
                chunks, total=len(rows), what="writing", weight=_ROWS, unit="images"
            ):
                writer.write_table(_table(source, chunk, features.arrow_schema, skipped))
        os.link(partial, path)  # unlike a rename, fails where the file has appeared meanwhile
    except FileExistsError as error:
        raise UsageError(f"{path} exists.", hint="Choose another -o file; nothing was overwritten.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", hint="Choose another -o file.") from error
    finally:
        partial.unlink(missing_ok=True)
    return skipped


def read_split(folder: Path) -> Split:
    """The split of a scan's or purification's run folder. Raises ResultError."""
    path = folder / "split.parquet"
    if not path.is_file():
        raise ResultError(
            f"{path} is not there: {folder} is no finished scan.",
            hint="Give the -o folder of `unpoison scan dataset`; the same scan command continues an interrupted one.",
        )
    return Split.load(path)


def _table(
    source: LabelledImages | ImageTextPairs, rows: np.ndarray, schema: pa.Schema, skipped: list[SkippedRow]
) -> pa.Table:
    images = source.raw(rows)
    good = [place for place, image in enumerate(images) if not isinstance(image, SkippedRow)]
    skipped += [image for image in images if isinstance(image, SkippedRow)]
    chosen = [int(rows[place]) for place in good]
    columns = {
        "image": [{"bytes": images[place], "path": None} for place in good],
        "id": [source.ids[row] for row in chosen],
    }
    if isinstance(source, ImageTextPairs):
        columns["captions"] = [list(captions) for captions in source.captions(chosen)]
    else:
        columns["label"] = [int(source.labels[row]) for row in chosen]
    return pa.table(columns, schema=schema)
