"""Image files of a folder: listed here and not with ``imagefolder``, which would take folder names for glob patterns,
splits or URL chains and unpack archives it finds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from unpoison.data.paths import InsideFolder, PathRefused
from unpoison.errors import SourceFormatError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation"}  # fmt: skip


def split_folder(folder: Path, source: str, split: str | None, *, of_classes: bool) -> Path:
    """The folder of one split where all folders are named after splits, else ``folder`` itself.

    ``of_classes``: a split's folder is known by the class folders it holds; else by there being no image beside it.
    Raises SourceFormatError for a split that is not there.
    """
    folders = visible_folders(folder)
    named = bool(folders) and all(entry.name.lower() in SPLITS for entry in folders)
    if of_classes:
        named = named and all(visible_folders(entry) for entry in folders)
    else:
        named = named and not any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries(folder))
    if not named:
        return folder
    by_split = {SPLITS[entry.name.lower()]: entry for entry in folders}
    wanted = SPLITS.get((split or "train").lower(), split)
    if wanted not in by_split:
        raise SourceFormatError(
            f"there is no split {split or 'train'!r}, only {', '.join(sorted(by_split))}.",
            path=source,
            hint="Name one of them with --split.",
        )
    return by_split[wanted]


def list_images(folder: Path, root: Path) -> Iterator[tuple[Path, str | None]]:
    """Image files below ``folder`` in sorted order, each with the reason why it may not be read, if there is one.

    Only files inside ``root`` may be; linked folders are given once and not entered.
    """
    inside = InsideFolder(root)
    for path, reason in _walk(folder):
        if reason is None:
            relative = path.relative_to(root)
            try:
                inside.resolve(str(relative))
                relative.as_posix().encode()
            except PathRefused as refused:
                reason = refused.reason
            except UnicodeEncodeError:
                reason = "the file's name is not UTF-8"
        yield path, reason


def images_by_path(paths: Sequence[str]) -> datasets.Dataset:
    """A data set with the column "image" of files that are named and not read."""
    table = InMemoryTable(pa.table({"image": pa.array(paths, pa.string())}))
    return datasets.Dataset(table).cast_column("image", datasets.Image(decode=False))


def visible_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in entries(folder) if entry.is_dir() and not hidden(entry.name))


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it is none. Raises SourceFormatError where it cannot be read."""
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except PermissionError as error:
        raise SourceFormatError(
            "the folder cannot be read.", path=str(folder), hint="Check the folder's permissions."
        ) from error


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def as_text(name: str) -> str:
    """A file name as text that can be stored: bytes that are not UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in folders:
            if (Path(parent) / name).is_symlink():
                yield Path(parent) / name, "linked folders are not entered"
        for name in sorted(files):
            if not hidden(name) and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent) / name, None
