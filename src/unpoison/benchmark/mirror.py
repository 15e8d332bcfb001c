"""Results at an address of fsspec (s3://, gs://, memory://, file://), beside the folder that a runner works in.

Locks, victims and logs are of one machine and stay in its folder. Plans and finished cells go to the address as they
come; what stands there is fetched before anything runs, so that any machine goes on where another one was.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from unpoison.errors import UsageError
from unpoison.storage import set_aside, write_atomically

MARKER, KEPT = "bench.json", ("plans", "cells")


def is_url(place: str | Path) -> bool:
    """Whether results belong at an address and not in a folder."""
    return "://" in str(place)


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """Plans and cells at ``url``."""

    url: str
    files: Any
    root: str

    @classmethod
    def at(cls, url: str) -> Mirror:
        """Raises UsageError for an address of no kind that is installed."""
        try:
            files, root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            hint = "Any kind that fsspec knows will do, with its own package: s3fs for s3://, gcsfs for gs://."
            raise UsageError(f"{url}: {error}.", hint=hint) from error
        return cls(url=url.rstrip("/"), files=files, root=root.rstrip("/"))

    def meet(self, folder: Path) -> None:
        """Fetch what ``folder`` lacks and send what the address lacks; of a cell that both have the done one counts.

        Raises UsageError where the address cannot be reached or holds something else.
        """
        self.fetch(folder)
        with self._reached():
            there = self._sizes()
        for file in _kept(folder):
            name = file.relative_to(folder).as_posix()
            body = file.read_bytes()
            better = name in there and there[name] != len(body) and _is_done(body) and not _is_done(self.read(name))
            if name not in there or better:
                self.put(name, body)

    def fetch(self, folder: Path) -> None:
        """Everything that ``folder`` lacks, or has a failure of. Raises UsageError as :meth:`meet`."""
        with self._reached():
            there = self._sizes()
        if there and MARKER not in there:
            raise UsageError(f"{self.url} holds no benchmark's results.", hint="Choose another address with -o.")
        for name, size in there.items():
            file = folder / name
            failed = file.exists() and name.startswith("cells/") and not _is_done(file.read_bytes())
            if not file.exists() or (failed and file.stat().st_size != size):
                file.parent.mkdir(parents=True, exist_ok=True)
                if failed and not _is_read(file.read_bytes()):
                    set_aside(file)
                write_atomically(file, self.read(name))

    def fetch_cell(self, folder: Path, key: str) -> None:
        """A cell that another machine may have finished meanwhile."""
        name = f"cells/{key}.json"
        if self.has(name):
            write_atomically(folder / name, self.read(name))

    def has(self, name: str) -> bool:
        with self._reached():
            self.files.invalidate_cache()
            return self.files.exists(f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        with self._reached():
            return self.files.cat_file(f"{self.root}/{name}")

    def put(self, name: str, body: bytes) -> None:
        """Write one file, whole or not at all."""
        path = f"{self.root}/{name}"
        with self._reached():
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.files.transaction, self.files.open(path, "wb") as file:
                file.write(body)

    def _sizes(self) -> dict[str, int]:
        self.files.invalidate_cache()
        if not self.files.exists(self.root):
            return {}
        found = self.files.find(self.root, detail=True)
        names = {path[len(self.root) + 1 :]: entry["size"] for path, entry in found.items()}
        kept = {name: size for name, size in names.items() if name == MARKER or _is_kept(name)}
        return kept or dict.fromkeys(names, 0)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every store's client has errors of its own
            raise UsageError(
                f"{self.url} cannot be reached: {type(error).__name__}: {error}.",
                hint="Check the address and your rights there. What is done stays in the folder that the run works "
                "in: the same command sends it.",
            ) from error


@contextmanager
def local_copy(place: Path | str) -> Iterator[Path]:
    """The folder itself, or for the time of the block what stands at the address. Raises UsageError."""
    if not is_url(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="unpoison-bench-") as name:
        Mirror.at(str(place)).fetch(Path(name))
        yield Path(name)


def _kept(folder: Path) -> list[Path]:
    return [folder / MARKER, *(file for name in KEPT for file in sorted((folder / name).glob("*.json")))]


def _is_kept(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder in KEPT and file.endswith(".json") and not file.startswith(".")


def _is_read(body: bytes) -> bool:
    """Whether it is an object at all: half of one is kept under another name."""
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


def _is_done(body: bytes) -> bool:
    try:
        return json.loads(body)["status"] == "done"
    except (ValueError, KeyError, TypeError):
        return False


__all__ = ["MARKER", "Mirror", "is_url", "local_copy"]
