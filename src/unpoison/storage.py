"""How results get to disk and back: one JSON object, or a parquet table with a header, each with its schema's version.

A file of another version is refused (``SchemaVersionError``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unpoison.errors import ResultError, SchemaVersionError

SCHEMA_VERSION = 1

Result = TypeVar("Result", bound="JsonResult")


class JsonResult:
    """Results that are dataclasses and one JSON object on disk, of the schema that each class names."""

    schema: ClassVar[str]

    def save(self, path: Path) -> None:
        write_atomically(path, msgspec.json.format(to_json(self), indent=2))

    @classmethod
    def load(cls: type[Result], path: Path) -> Result:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ResultError(f"{path}: cannot be read ({error.strerror}).", hint="Repeat the step.") from error
        return from_json(data, cls, name=str(path))


def to_json(result: JsonResult) -> bytes:
    """One JSON object that starts with ``schema`` and ``schema_version``."""
    body = {entry.name: getattr(result, entry.name) for entry in fields(result)}  # pyright: ignore[reportArgumentType] # every result is a dataclass
    head = {"schema": f"unpoison/{result.schema}", "schema_version": SCHEMA_VERSION}
    return msgspec.json.encode(head | body, enc_hook=_encode_numpy)


def from_json(data: bytes, kind: type[Result], *, name: str = "result") -> Result:
    """Read what :func:`to_json` wrote. Raises ResultError, SchemaVersionError."""
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{name}: not JSON ({error}).", hint="Write the result again.") from error
    expected = f"unpoison/{kind.schema}"
    if not isinstance(body, dict):
        raise ResultError(f"{name}: expected an object, found {type(body).__name__}.", hint="Write it again.")
    _check_schema(name, expected, body.pop("schema", None), body.pop("schema_version", None))
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ResultError(f"{name}: {error}.", hint="Write the result again.") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write the whole file or nothing: readers and killed runs never see half of it."""
    partial = partial_of(path)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """A name beside ``path`` for a half-written file, which no other thread, process or machine has."""
    return path.with_name(f".{path.name}.{uuid4().hex}.partial")


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be read to one that nothing reads, NAME.damaged; what stands there stays too."""
    other, count = path.with_suffix(".damaged"), 1
    while other.exists():
        count += 1
        other = path.with_suffix(f".damaged-{count}")
    return path.rename(other)


def remove_partials(*folders: Path) -> None:
    """Remove what killed processes left half-written directly in ``folders``: files and folders named .*.partial."""
    for folder in folders:
        for path in folder.glob(".*.partial"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


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


def write_table(path: Path, schema: str, columns: dict[str, Any], header: dict[str, Any]) -> None:
    write_atomically(path, table_bytes(schema, columns, header))


def table_bytes(schema: str, columns: dict[str, Any], header: dict[str, Any]) -> bytes:
    """The whole file that :func:`write_table` writes."""
    table = pa.table(columns).replace_schema_metadata(
        {
            "schema": f"unpoison/{schema}",
            "schema_version": str(SCHEMA_VERSION),
            "header": msgspec.json.encode(header, enc_hook=_encode_numpy),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def read_table(path: Path, schema: str) -> tuple[pa.Table, dict[str, Any]]:
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
def complete(path: Path) -> Iterator[None]:
    """Columns and header entries that a damaged or foreign file lacks, as one ResultError."""
    try:
        yield
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise ResultError(f"{path}: incomplete or damaged ({error!r}).", hint="Repeat the step.") from error
