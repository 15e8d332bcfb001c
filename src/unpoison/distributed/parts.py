"""A part of a set: some rows, judged by CLIP and the early models in one pass, and what of it is kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from jaxtyping import Float, Int
from PIL import Image

from unpoison.data.encoded import take
from unpoison.data.pixels import Pixels, fit
from unpoison.data.sources import LabelledImages
from unpoison.detection.cgd import apply_classifier, first_choices
from unpoison.detection.ranks import label_cross_entropy
from unpoison.errors import ResultError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.zero_shot import cosines_of, read_ahead, rows_at_once
from unpoison.runs import Run
from unpoison.storage import read_table, table_bytes
from unpoison.types import Classifier, Embeddings, ZeroShotModel

_SCHEMA, _VERSION = "scan-part", b"scan-part-1"  # raised when what a part holds, or how it is computed, changes


@dataclass(frozen=True, kw_only=True, eq=False)
class Judges:
    """What every worker holds: CLIP, the early models, and the factor on CLIP's cosines."""

    clip: ZeroShotModel
    early: tuple[Classifier, ...]
    clip_logit_scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """The rows from ``start`` on: losses against the given label (NaN where skipped), CLIP's choice (then -1).

    ``skipped`` are places in the part with their reasons.
    """

    start: int
    clip_loss: Float[np.ndarray, " k"]
    early_loss: Float[np.ndarray, " k"]
    choice: Int[np.ndarray, " k"]
    skipped: tuple[tuple[int, str], ...]


def judge(judges: Judges, texts: Embeddings, source: LabelledImages, start: int, run: Run) -> Part:
    """One part: each image is decoded once, for CLIP and for the early models."""
    clip, size = judges.clip, judges.early[0].image_size
    cosines = np.full((len(source), len(source.class_names)), np.nan, dtype=np.float32)
    array = np.zeros((len(source), size, size, 3), dtype=np.uint8)
    usable = np.zeros(len(source), dtype=bool)
    skipped: list[tuple[int, str]] = []

    def decoded() -> Iterator[tuple[np.ndarray, Any]]:
        for first in range(0, len(source), rows_at_once(clip)):
            rows = np.arange(first, min(first + rows_at_once(clip), len(source)))
            good, images = [], []
            for row, picture in zip(rows.tolist(), source.decode(rows), strict=True):
                if isinstance(picture, Image.Image):
                    good.append(row)
                    images.append(picture)
                    array[row] = np.asarray(fit(picture, size))
                else:
                    skipped.append((row, picture.reason))
            if good:
                yield np.array(good), clip.preprocess(images)

    for rows, images in read_ahead(decoded()):
        cosines[rows] = cosines_of(clip, images, texts)
        usable[rows] = True
    pixels = Pixels(array=array, usable=usable, skipped=())
    logits = np.zeros(cosines.shape, dtype=np.float64)
    rows = np.flatnonzero(usable)
    for early in judges.early if len(rows) else ():
        logits[rows] += apply_classifier(early, pixels, rows, run=run)
    logits[~usable] = np.nan
    return Part(
        start=start,
        clip_loss=label_cross_entropy(judges.clip_logit_scale * cosines, source.labels),
        early_loss=label_cross_entropy(logits / len(judges.early), source.labels),
        choice=first_choices(cosines),
        skipped=tuple(skipped),
    )


def portable(source: LabelledImages, rows: slice) -> LabelledImages:
    """These rows for another process. What is in files is named, what is in memory goes along, these rows of it."""
    root = None if source.root is None else source.root.absolute()  # the other process may stand elsewhere
    part = replace(source.select(np.arange(rows.start, rows.stop)), skipped=(), root=root)
    if part.dataset.cache_files:
        return part
    table = take(part.dataset.with_format("arrow"), np.arange(len(part)))
    copied = table.take(pa.array(np.arange(len(part)))).combine_chunks()  # a slice would carry the whole along
    return replace(part, dataset=datasets.Dataset(InMemoryTable(copied), info=part.dataset.info))


def encode(part: Part, source: LabelledImages, key: str) -> bytes:
    """The parquet file of a part; ``source`` holds its rows and no others."""
    columns = {
        "id": source.ids,
        "label": source.labels,
        "clip_loss": part.clip_loss,
        "early_loss": part.early_loss,
        "clip_label": part.choice,
    }
    return table_bytes(_SCHEMA, columns, {"key": key, "skipped": part.skipped})


def file_of(folder: Path, rows: slice) -> Path:
    return folder / f"{rows.start:010d}-{rows.stop:010d}.parquet"


def key_of(judges: Judges, source: LabelledImages) -> str:
    """What a part's numbers depend on beside its rows."""
    parts = (
        judges.clip.fingerprint,
        judges.clip_logit_scale,
        source.class_names,
        [(hash_weights(early.weights()), early.image_size) for early in judges.early],
        None if source.overlay is None else source.overlay.fingerprint,
    )
    return hashlib.blake2b(_VERSION + msgspec.json.encode(parts), digest_size=16).hexdigest()


def stored(folder: Path, source: LabelledImages, rows: slice, key: str, run: Run) -> Part | None:
    """A part that an earlier run left; None where there is none, or it is damaged or of something else."""
    path = file_of(folder, rows)
    if not path.exists():
        return None
    try:
        table, header = read_table(path, _SCHEMA)
        found = Part(
            start=rows.start,
            clip_loss=table["clip_loss"].to_numpy(),
            early_loss=table["early_loss"].to_numpy(),
            choice=table["clip_label"].to_numpy(),
            skipped=msgspec.convert(header["skipped"], tuple[tuple[int, str], ...]),
        )
        same = table["id"].to_pylist() == source.ids[rows] and np.array_equal(table["label"], source.labels[rows])
    except (ResultError, KeyError, msgspec.ValidationError):
        same, found, header = False, None, {}
    if same and header.get("key") == key:
        return found
    run.progress.log(f"{path.name} is damaged or of another set, and is computed again")
    return None
