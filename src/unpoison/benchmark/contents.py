"""Hashes of what a grid names: a changed file, or other defaults of a method, make another cell."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from jaxtyping import Int

from unpoison.benchmark.cell import digest
from unpoison.benchmark.outcomes import call_with
from unpoison.catalog import DEFENSES, find, resolve
from unpoison.data.shapes import SHAPES_CLASSES, shapes_labels
from unpoison.data.sources import read_request

_BLOCK = 1 << 20
_READ_WHOLE = 4 << 30  # folders above this size count by names and sizes alone
_SIZES = {"parameters": 10_000_000, "samples": 10_000}  # any that are always the same


def source_content(source: str) -> str | None:
    """The hash of a local source; None for one that has no file of its own (the shapes world, a hub's data set)."""
    request = read_request(source, rows=None, limit=None, seed=0)
    return None if request.shapes is not None else path_content(Path(request.place))


def known_classes(source: str) -> tuple[str, ...] | None:
    """The class names that a source says without being opened: the shapes world, a parquet file with a ClassLabel."""
    request = read_request(source, rows=None, limit=None, seed=0)
    if request.shapes is not None:
        return SHAPES_CLASSES
    named = _class_column(request.place)
    return None if named is None else tuple(named[1].names)


def class_counts(source: str) -> Int[np.ndarray, " classes"] | None:
    """How many samples each of the :func:`known_classes` has, by a look at the labels alone; None where they are not
    known."""
    request = read_request(source, rows=None, limit=None, seed=0)
    if request.shapes is not None:
        labels = shapes_labels(request.shapes[0], seed=request.shapes[1])[request.rows]
        return np.bincount(labels, minlength=len(SHAPES_CLASSES))
    named = _class_column(request.place)
    if named is None:
        return None
    path = Path(request.place)
    labels = _column(path, named[0], path.stat().st_mtime_ns)[request.rows]
    known = labels[(labels >= 0) & (labels < len(named[1].names))]
    return np.bincount(known, minlength=len(named[1].names))


def _class_column(place: str) -> tuple[str, ClassLabel] | None:
    """The column of a parquet file that names its classes, where it has one."""
    if not place.endswith(".parquet") or not Path(place).is_file():
        return None
    try:
        features = Features.from_arrow_schema(pq.read_schema(place))
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or a header of another version: said when opened
        return None
    named = [(name, feature) for name, feature in features.items() if isinstance(feature, ClassLabel)]
    return named[0] if len(named) == 1 else None


@lru_cache(maxsize=16)
def _column(path: Path, name: str, changed: int) -> Int[np.ndarray, " n"]:
    """A column of whole numbers, -1 where there is none."""
    column = pq.read_table(path, columns=[name]).column(name)
    return column.cast(pa.int64()).fill_null(-1).to_numpy()


def path_content(path: Path) -> str | None:
    """The hash of a file, or of all names, sizes and bytes of a folder (over 4 GiB no bytes); None where nothing is."""
    if path.is_file():
        return _file(path, path.stat().st_mtime_ns)
    if not path.is_dir():
        return None
    files = [(entry, entry.stat()) for entry in sorted(path.rglob("*")) if entry.is_file()]
    whole = sum(found.st_size for _, found in files) <= _READ_WHOLE
    total = hashlib.blake2b(digest_size=8)
    for entry, found in files:
        total.update(f"{entry.relative_to(path).as_posix()}\0{found.st_size}\0".encode(errors="surrogatepass"))
        if whole:
            total.update(_file(entry, found.st_mtime_ns).encode())
    return total.hexdigest()


@lru_cache
def method_defaults(method: str, *, published: bool) -> str:
    """The hash of the constants that the package itself gives a defense. Raises UnknownMethodError."""
    kind: Any = resolve(find(method, DEFENSES).config)
    found = [kind()]
    if published and hasattr(kind, "as_published"):
        found.append(call_with(kind.as_published, offered=_SIZES))
    if hasattr(kind, "scaled"):
        found.append((kind.scaled if published else kind.recommended)(**_SIZES))
    return digest([asdict(config) for config in found])


def looks_local(source: str) -> bool:
    """Whether a source or a model can only be a path: it starts like one or ends like a file."""
    place = source.partition("[")[0]
    return place.startswith(("/", ".", "~")) or bool(Path(place).suffix) or place.count("/") > 1


@lru_cache(maxsize=4096)
def _file(path: Path, changed: int) -> str:
    found = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
