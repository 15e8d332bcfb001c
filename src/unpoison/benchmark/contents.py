"""Hashes of what a grid names: a changed file makes another cell."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from unpoison.data.sources import read_request

_BLOCK = 1 << 20
_READ_WHOLE = 4 << 30  # folders above this size count by names and sizes alone


def source_content(source: str) -> str | None:
    """The hash of a local source; None for one that has no file of its own (the shapes world, a hub's data set)."""
    request = read_request(source, rows=None, limit=None, seed=0)
    return None if request.shapes is not None else path_content(Path(request.place))


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
