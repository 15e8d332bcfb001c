"""The one place that decides whether a path found in a data set may be read: only inside the data set's folder."""

from __future__ import annotations

import os
from pathlib import Path

_LARGEST_FILE = 1 << 28  # bytes; a picture of the most pixels that we decode is smaller than this in every format


class PathRefused(Exception):
    """The file is not read; ``reason`` is one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class InsideFolder:
    """Resolves paths against ``root`` and refuses those that lead out of it, by ``..`` or by symlinks."""

    def __init__(self, root: Path | None) -> None:
        self._root = None if root is None else os.path.realpath(root)
        self._folders: dict[str, str] = {}

    def resolve(self, path: str) -> str:
        """The real path of an existing regular file inside the root. Raises PathRefused."""
        shown = repr(path[:120])
        if self._root is None:
            raise PathRefused(f"the row holds no image bytes, only the path {shown}, and the source has no folder")
        if "://" in path:
            raise PathRefused(f"{shown} is a URL; images are not fetched")
        if not path or "\0" in path:
            raise PathRefused(f"{shown} is no path")
        try:
            joined = os.path.join(self._root, path)  # noqa: PTH118 - a plain string, for a million rows
            folder, name = os.path.split(joined)
            if folder not in self._folders:
                self._folders[folder] = os.path.realpath(folder)
            real = os.path.join(self._folders[folder], name)  # noqa: PTH118
            if name in ("..", ".") or os.path.islink(real):  # noqa: PTH114
                real = os.path.realpath(real)
            if not real.startswith(self._root.rstrip(os.sep) + os.sep):
                raise PathRefused(f"{shown} leads out of the data set's folder")
            if not os.path.isfile(real):  # noqa: PTH113
                raise PathRefused(f"there is no file {shown}")
        except (OSError, ValueError) as error:
            raise PathRefused(f"{shown} cannot be looked up: {type(error).__name__}") from error
        return real

    def stamp(self, path: str) -> str:
        """Size and time of change of a file inside the root; the reason where it is refused."""
        try:
            status = Path(self.resolve(path)).stat()
        except PathRefused as refused:
            return refused.reason
        except OSError as error:
            return str(error.strerror)
        return f"{status.st_size} {status.st_mtime_ns}"

    def read(self, path: str, largest: int = _LARGEST_FILE) -> bytes:
        """The bytes of a file inside the root. Raises PathRefused, also for one that cannot be read or has more."""
        real = Path(self.resolve(path))
        try:
            size = real.stat().st_size
            if size > largest:
                raise PathRefused(f"{path[:120]!r} has {size:,} bytes, more than {largest:,}")
            return real.read_bytes()
        except OSError as error:
            raise PathRefused(f"{path[:120]!r} cannot be read: {error.strerror}") from error
