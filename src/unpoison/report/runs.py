"""Runs as a report takes them: everything that a run folder (or one result file) holds, read without trust."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from unpoison.clip_results import ClipPurification
from unpoison.data.images import UndecodableImage, decode_image
from unpoison.errors import ResultError
from unpoison.model_results import ModelScan
from unpoison.report.text import plain
from unpoison.results import (
    REGION_NAMES,
    ClipEvaluation,
    DatasetScan,
    Evaluation,
    Purification,
    SampleScores,
    SkippedRow,
    Split,
    from_json,
)
from unpoison.zero_shot_results import ZeroShotPurification

MODEL_SCAN = "model-scan.json"
SUSPICIOUS, DATA = "suspicious", "data"
"""Folders in which a run keeps a scan that it made on the way: of its pairs (UBT), of a model's training data. A scan
like any other, which ``unpoison keep`` takes."""
MAX_SAMPLES = 120
THUMBNAIL_SIZE = 64
_MAX_SAMPLES_BYTES = 32 * 2**20
_MAX_THUMBNAIL_CHARACTERS = 256 * 2**10
_MAX_CAPTION_CHARACTERS = 500
_KINDS = {
    "unpoison/dataset-scan": DatasetScan,
    "unpoison/model-scan": ModelScan,
    "unpoison/purification": Purification,
    "unpoison/clip-purification": ClipPurification,
    "unpoison/zero-shot-purification": ZeroShotPurification,
    "unpoison/evaluation": Evaluation,
    "unpoison/clip-evaluation": ClipEvaluation,
}


@dataclass(frozen=True, kw_only=True)
class ReportSample:
    """One example image: ``thumbnail`` is a PNG that was decoded and encoded again; ranks in (0, 1] or None.

    ``caption``: of an image-caption pair, which has no label.
    """

    id: str
    label: str
    caption: str | None = None
    clip_label: str | None = None
    region: str
    thumbnail: bytes
    clip_rank: float | None = None
    early_rank: float | None = None
    score: float | None = None

    @property
    def suspicion(self) -> float:
        """The smaller of CGD's ranks: poison is suspicious on both axes, a hard image on one. Else the score."""
        ranks = [rank for rank in (self.clip_rank, self.early_rank) if rank is not None]
        return min(ranks, default=self.score or 0.0)


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """What one run left behind. ``path`` is where it was read, ``notes`` says what could not be shown."""

    name: str
    path: str
    inputs: dict[str, Any] = field(default_factory=dict)
    scan: DatasetScan | None = None
    purification: Purification | None = None
    clip: ClipPurification | None = None
    zero_shot: ZeroShotPurification | None = None
    model_scan: ModelScan | None = None
    evaluations: dict[str, Evaluation | ClipEvaluation] = field(default_factory=dict)
    scores: SampleScores | None = None
    split: Split | None = None
    samples: tuple[ReportSample, ...] = ()
    notes: tuple[str, ...] = ()
    finished_at: datetime | None = None


def read_run(path: Path) -> ReportRun:
    """Read a run folder, or a single scan, purification or evaluation JSON file.

    Raises ResultError when there is nothing to report or a result is damaged, SchemaVersionError for a result of
    another version. Example images are optional: a bad one is left out and counted in ``notes``.
    """
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise ResultError(
            f"{path}: there is no such run folder or result file.",
            hint="Give the -o folder of an unpoison command, or an evaluation JSON file.",
        )
    scan = _read_json(path / "scan.json", DatasetScan)
    model_scan = _read_json(path / MODEL_SCAN, ModelScan)
    purified = _read_file(path / "purification.json") if (path / "purification.json").exists() else None
    evaluations: dict[str, Evaluation | ClipEvaluation] = {}
    for file in sorted(path.glob("evaluation*.json")):
        evaluations |= _read_file(file).evaluations
    if scan is None and model_scan is None and purified is None and not evaluations:
        raise ResultError(
            f"{path}: expected scan.json, {MODEL_SCAN}, purification.json or evaluation*.json, found none of them.",
            hint="Repeat the command that writes this folder; the same command continues an interrupted run.",
        )
    samples, notes = _read_samples(path / "samples.json")
    return ReportRun(
        name=path.resolve().name,
        path=str(path),
        inputs=_read_inputs(path / "run.json"),
        scan=scan,
        purification=purified.purification if purified else None,
        clip=purified.clip if purified else None,
        zero_shot=purified.zero_shot if purified else None,
        model_scan=model_scan,
        evaluations=evaluations,
        scores=SampleScores.load(path / "scores.parquet") if (path / "scores.parquet").exists() else None,
        split=Split.load(path / "split.parquet") if (path / "split.parquet").exists() else None,
        samples=samples,
        notes=notes,
        finished_at=_written(path),
    )


def read_runs(path: Path) -> list[ReportRun]:
    """:func:`read_run`, and after it the scan that lies inside the run's folder, where there is one."""
    inside = [path / name for name in (SUSPICIOUS, DATA) if (path / name / "scan.json").is_file()]
    return [read_run(place) for place in (path, *inside)]


def _read_file(path: Path) -> ReportRun:
    try:
        data = path.read_bytes()
        head = msgspec.json.decode(data)
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror}).", hint="Repeat the step.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(
            f"{path}: not a JSON result ({error}).", hint="Give a run folder, or the JSON file of one result."
        ) from error
    schema = head.get("schema") if isinstance(head, dict) else None
    if schema not in _KINDS:
        raise ResultError(
            f"{path}: expected one of {', '.join(sorted(_KINDS))}, found {schema!r}.",
            hint="Give a run folder, or the JSON file of one result.",
        )
    result = from_json(data, _KINDS[schema], name=str(path))
    return ReportRun(
        name=path.stem,
        path=str(path),
        scan=result if isinstance(result, DatasetScan) else None,
        purification=result if isinstance(result, Purification) else None,
        clip=result if isinstance(result, ClipPurification) else None,
        zero_shot=result if isinstance(result, ZeroShotPurification) else None,
        model_scan=result if isinstance(result, ModelScan) else None,
        evaluations={path.stem: result} if isinstance(result, Evaluation | ClipEvaluation) else {},
        finished_at=datetime.fromtimestamp(path.stat().st_mtime, UTC),
    )


def _read_json(path: Path, kind: type[Any]) -> Any:
    return kind.load(path) if path.exists() else None


def _read_inputs(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        inputs = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: not JSON ({error}).", hint="Repeat the run in a new folder.") from error
    return inputs if isinstance(inputs, dict) else {"inputs": inputs}


def _written(folder: Path) -> datetime | None:
    for name in ("finished.json", "purification.json", "scan.json", MODEL_SCAN):
        if (folder / name).exists():
            return datetime.fromtimestamp((folder / name).stat().st_mtime, UTC)
    return None


def _read_samples(path: Path) -> tuple[tuple[ReportSample, ...], tuple[str, ...]]:
    if not path.exists():
        return (), ()
    if path.stat().st_size > _MAX_SAMPLES_BYTES:
        return (), (f"Example images are not shown: {path.name} is larger than {_MAX_SAMPLES_BYTES // 2**20} MiB.",)
    try:
        rows = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return (), (f"Example images are not shown: {path.name} is not JSON ({error}).",)
    if not isinstance(rows, list):
        return (), (f"Example images are not shown: {path.name} holds no list.",)
    read = [_read_sample(row) for row in rows[:MAX_SAMPLES]]
    left_out = [row for row in read if isinstance(row, SkippedRow)]
    notes = [f"Example image {plain(row.id)} is not shown: {plain(row.reason)}." for row in left_out[:3]]
    if len(left_out) > 3:
        notes.append(f"{len(left_out) - 3} more example images are not shown for such reasons.")
    return tuple(row for row in read if isinstance(row, ReportSample)), tuple(notes)


class _StoredSample(msgspec.Struct):
    id: str
    label: str | int
    thumbnail: str
    region: str = "suspect"
    caption: str | None = None
    clip_label: str | int | None = None
    clip_rank: float | None = None
    early_rank: float | None = None
    score: float | None = None


def _read_sample(row: object) -> ReportSample | SkippedRow:
    name = str(row.get("id", "?")) if isinstance(row, dict) else "?"
    try:
        stored = msgspec.convert(row, _StoredSample)
    except msgspec.ValidationError as error:
        return SkippedRow(id=name, reason=str(error))
    if stored.region not in REGION_NAMES.values():
        return SkippedRow(id=name, reason=f"unknown region {stored.region!r}")
    picture = redraw_picture(stored.thumbnail)
    if isinstance(picture, str):
        return SkippedRow(id=name, reason=picture)
    return ReportSample(
        id=stored.id,
        label=str(stored.label),
        caption=None if stored.caption is None else stored.caption[:_MAX_CAPTION_CHARACTERS],
        clip_label=None if stored.clip_label is None else str(stored.clip_label),
        region=stored.region,
        thumbnail=picture,
        clip_rank=stored.clip_rank,
        early_rank=stored.early_rank,
        score=stored.score,
    )


def redraw_picture(text: str) -> bytes | str:
    """A PNG drawn anew from the base64 text, so that nothing but pixels gets into the report; else the reason."""
    if len(text) > _MAX_THUMBNAIL_CHARACTERS:
        return "the thumbnail is too large"
    try:
        image = decode_image(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        return f"the thumbnail is not base64 ({error})"
    except UndecodableImage as error:
        return f"the thumbnail is no picture ({error})"
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    sink = io.BytesIO()
    image.save(sink, format="PNG")
    return sink.getvalue()
