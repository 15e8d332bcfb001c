"""What every step hands to the next: frozen, versioned, to and from disk.

source -> SampleScores (parquet) -> Split (parquet) -> Purification (json) -> Evaluation (json) -> report.
Every file carries its schema's name and version; a file of another version is refused (``SchemaVersionError``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Int8

from unpoison.errors import ResultError, SchemaVersionError

SCHEMA_VERSION = 1

Result = TypeVar("Result")

Region = Int8[np.ndarray, " n"]
CLEAN, MIXED, SUSPECT, SKIPPED = 0, 1, 2, -1
REGION_NAMES = {CLEAN: "clean", MIXED: "mixed", SUSPECT: "suspect", SKIPPED: "skipped"}


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """One row that could not be used. ``id`` is the sample's stable id, ``reason`` one sentence for people."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """Suspicion of each sample on one or more axes; higher = more suspicious; NaN where the row was skipped."""

    method: str
    ids: list[str]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]
    axes: dict[str, Float[np.ndarray, " n"]]
    primary: str
    skipped: tuple[SkippedRow, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.primary not in self.axes:
            raise ResultError(
                f"primary axis {self.primary!r} is none of {sorted(self.axes)}", hint="Name one of the axes."
            )
        _check_rows("labels", self.labels, self.ids)
        for name, values in self.axes.items():
            _check_rows(f"axis {name!r}", values, self.ids)

    @property
    def suspicion(self) -> Float[np.ndarray, " n"]:
        return self.axes[self.primary]

    def save(self, path: Path) -> None:
        columns: dict[str, Any] = {"id": self.ids, "label": self.labels}
        columns |= {f"score.{name}": values for name, values in self.axes.items()}
        header = {
            "method": self.method,
            "class_names": self.class_names,
            "primary": self.primary,
            "skipped": self.skipped,
            "details": self.details,
        }
        _write_table(path, "sample-scores", columns, header)

    @classmethod
    def load(cls, path: Path) -> SampleScores:
        """Raises ResultError for a damaged file, SchemaVersionError."""
        table, header = _read_table(path, "sample-scores")
        with _complete(path):
            axes = {
                name.removeprefix("score."): table[name].to_numpy()
                for name in table.column_names
                if name.startswith("score.")
            }
            return cls(
                method=header["method"],
                ids=table["id"].to_pylist(),
                labels=table["label"].to_numpy(),
                class_names=tuple(header["class_names"]),
                axes=axes,
                primary=header["primary"],
                skipped=tuple(SkippedRow(**row) for row in header["skipped"]),
                details=header["details"],
            )


@dataclass(frozen=True, kw_only=True)
class PoisonEstimate:
    """Whether a set is poisoned, toward what, and how much of it. Rates are shares of the usable samples in [0, 1]."""

    poisoned: bool
    rate: float
    rate_low: float
    rate_high: float
    target_labels: tuple[int, ...]
    evidence: dict[str, float]
    reason: str
    odd_labels: tuple[int, ...] = ()
    """Labels that are no proof of poison but have to be looked at."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A set cut into regions by scores: each sample is clean, mixed (left out), suspect, or skipped."""

    method: str
    ids: list[str]
    labels: Int[np.ndarray, " n"]
    region: Region
    class_names: tuple[str, ...]
    estimate: PoisonEstimate | None = None

    def __post_init__(self) -> None:
        _check_rows("labels", self.labels, self.ids)
        _check_rows("region", self.region, self.ids)

    @property
    def clean(self) -> Int[np.ndarray, " k"]:
        return np.flatnonzero(self.region == CLEAN)

    @property
    def suspect(self) -> Int[np.ndarray, " k"]:
        return np.flatnonzero(self.region == SUSPECT)

    @property
    def mixed(self) -> Int[np.ndarray, " k"]:
        return np.flatnonzero(self.region == MIXED)

    def save(self, path: Path) -> None:
        header = {"method": self.method, "class_names": self.class_names, "estimate": self.estimate}
        columns = {
            "id": self.ids,
            "label": self.labels,
            "region": [REGION_NAMES[int(code)] for code in self.region],
        }
        _write_table(path, "split", columns, header)

    @classmethod
    def load(cls, path: Path) -> Split:
        """Raises ResultError for a damaged file, SchemaVersionError."""
        table, header = _read_table(path, "split")
        codes = {name: code for code, name in REGION_NAMES.items()}
        with _complete(path):
            estimate = header["estimate"]
            return cls(
                method=header["method"],
                ids=table["id"].to_pylist(),
                labels=table["label"].to_numpy(),
                region=np.array([codes[name] for name in table["region"].to_pylist()], dtype=np.int8),
                class_names=tuple(header["class_names"]),
                estimate=None if estimate is None else msgspec.convert(estimate, PoisonEstimate),
            )


class _JsonResult:
    """Results that are one JSON object on disk."""

    def save(self, path: Path) -> None:
        write_atomically(path, msgspec.json.format(to_json(self), indent=2))

    @classmethod
    def load(cls: type[Result], path: Path) -> Result:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ResultError(f"{path}: cannot be read ({error.strerror}).", hint="Repeat the step.") from error
        return from_json(data, cls, name=str(path))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A rate in percent with a 95 % interval (Wilson) and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Evaluation(_JsonResult):
    """Rates of one model in percent (docs: metrics). Trigger rates are None where no manifest was given."""

    model: str
    data: str
    c_acc: Interval
    asr: Interval | None = None
    asr_floor: Interval | None = None
    asr_excess: float | None = None
    ra: Interval | None = None
    attack: str | None = None
    target: str | None = None
    per_class: dict[str, float] = field(default_factory=dict)
    skipped: tuple[SkippedRow, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Purification(_JsonResult):
    """What a defense did to a model. ``protects`` names what is safe to use afterwards.

    Held-out accuracies are in percent, None where nothing was trained; ``bound`` is in points; ``changed_share`` is a
    share of the parameters in [0, 1].
    """

    method: str
    config: dict[str, Any]
    accepted: bool
    reason: str
    protects: str
    bound: float
    steps: int
    changed_share: float
    seconds: float
    seed: int
    held_out_before: float | None = None
    held_out_after: float | None = None
    suspect_count: int = 0
    clean_count: int = 0
    estimate: PoisonEstimate | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    before: Evaluation | None = None
    after: Evaluation | None = None
    not_covered: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetScan(_JsonResult):
    """The answer of ``scan dataset``: verdict, candidates, and what was not covered."""

    source: str
    method: str
    samples: int
    class_names: tuple[str, ...]
    estimate: PoisonEstimate
    flagged: int
    flagged_per_class: dict[str, int]
    skipped: tuple[SkippedRow, ...]
    clip: str
    clip_agreement: float
    chance_agreement: float
    warnings: tuple[str, ...]
    not_covered: tuple[str, ...]
    seconds: float
    seed: int
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def inconclusive(self) -> bool:
        """Nothing was proved, but some labels look odd, or CLIP is too weak on these classes for it to mean much."""
        return not self.estimate.poisoned and (bool(self.estimate.odd_labels) or self.weak_clip)

    @property
    def weak_clip(self) -> bool:
        """CLIP knows these classes hardly better than chance."""
        return clip_too_weak(self.clip_agreement, self.chance_agreement)


LOW_AGREEMENT, LOW_GAIN = 2.0, 0.1
"""A CLIP is too weak to judge the given labels when it agrees with less than this many times chance; where chance is
high (few classes), when it closes less than this share of the gap between chance and all."""


def clip_too_weak(agreement: float, chance: float) -> bool:
    """Whether CLIP hardly knows the classes: both are shares, in percent, of given labels that are its first choice."""
    return agreement < min(LOW_AGREEMENT * chance, chance + LOW_GAIN * (100.0 - chance))


_SCHEMAS = {Evaluation: "evaluation", Purification: "purification", DatasetScan: "dataset-scan"}


def to_json(result: Any) -> bytes:
    """One JSON object that starts with ``schema`` and ``schema_version``."""
    body = {entry.name: getattr(result, entry.name) for entry in fields(result)}
    head = {"schema": f"unpoison/{_SCHEMAS[type(result)]}", "schema_version": SCHEMA_VERSION}
    return msgspec.json.encode(head | body, enc_hook=_encode_numpy)


def from_json(data: bytes, kind: type[Result], *, name: str = "result") -> Result:
    """Read what :func:`to_json` wrote. Raises ResultError, SchemaVersionError."""
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{name}: not JSON ({error}).", hint="Write the result again.") from error
    expected = f"unpoison/{_SCHEMAS[kind]}"
    if not isinstance(body, dict):
        raise ResultError(f"{name}: expected an object, found {type(body).__name__}.", hint="Write it again.")
    _check_schema(name, expected, body.pop("schema", None), body.pop("schema_version", None))
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ResultError(f"{name}: {error}.", hint="Write the result again.") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write the whole file or nothing: readers and killed runs never see half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _check_rows(what: str, values: np.ndarray, ids: list[str]) -> None:
    if values.shape != (len(ids),):
        raise ResultError(
            f"expected {what} to have shape ({len(ids)},), got {values.shape}", hint="Give one value for each id."
        )


def _check_schema(name: str, expected: str, schema: object, version: object) -> None:
    if schema != expected:
        raise ResultError(f"{name}: expected {expected}, found {schema}.", hint="Give the file that the step wrote.")
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{name}: schema version {version}, this version reads {SCHEMA_VERSION}.",
            hint="Repeat the step with this version, or install the version that wrote the file.",
        )


def _encode_numpy(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def _write_table(path: Path, schema: str, columns: dict[str, Any], header: dict[str, Any]) -> None:
    table = pa.table(columns).replace_schema_metadata(
        {
            "schema": f"unpoison/{schema}",
            "schema_version": str(SCHEMA_VERSION),
            "header": msgspec.json.encode(header, enc_hook=_encode_numpy),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def _read_table(path: Path, schema: str) -> tuple[pa.Table, dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ResultError(f"{path}: not a readable parquet file ({error}).", hint="Repeat the step.") from error
    metadata = table.schema.metadata or {}
    version = metadata.get(b"schema_version", b"0").decode()
    _check_schema(
        str(path),
        f"unpoison/{schema}",
        metadata.get(b"schema", b"none").decode(),
        int(version) if version.isdigit() else version,
    )
    try:
        return table, msgspec.json.decode(metadata.get(b"header", b""), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: its header is damaged ({error}).", hint="Repeat the step.") from error


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Columns and header entries that a damaged or foreign file lacks, as one ResultError."""
    try:
        yield
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise ResultError(f"{path}: incomplete or damaged ({error!r}).", hint="Repeat the step.") from error
