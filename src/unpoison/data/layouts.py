"""How each kind of source becomes one ``datasets.Dataset`` with an image column, ids and a column of labels.

Tables, shards and hub data sets are read by ``datasets``. A folder of class folders is listed here and not with
``imagefolder``, which would take folder names for glob patterns, splits or URL chains and unpack archives it finds.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from unpoison.data.paths import InsideFolder, PathRefused
from unpoison.errors import SourceFormatError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".tar": "webdataset",
}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "path", "file", "file_name", "filename", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "labels", "cls")
ID_COLUMNS = ("id", "__key__")
SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation"}  # fmt: skip
_IMAGES = datasets.Image(decode=False)
_HUB_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All rows of a source; those in ``reasons`` are known to be unusable."""

    dataset: datasets.Dataset
    ids: list[str]
    labels: pa.Array | pa.ChunkedArray
    names: tuple[str, ...] | None
    root: Path | None
    reasons: dict[int, str] = field(default_factory=dict)


def open_layout(source: str, *, image_column: str | None, label_column: str | None, split: str | None) -> Layout:
    """Find out what ``source`` is and open it. Raises SourceFormatError for what is no data set we read."""
    path = Path(source).expanduser()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):
        exists = is_folder = False
    if is_folder:
        files = _table_files(path, split)
        if not files:
            return open_folder(path, source, split)
        builder = BUILDERS[files[0].suffix.lower()]
        return open_table(builder, files, source, image_column=image_column, label_column=label_column)
    if exists:
        builder = BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise SourceFormatError(
                f"the suffix {path.suffix!r} is none of {', '.join(BUILDERS)}.",
                path=source,
                hint="Give a folder of class folders, or one of these files.",
            )
        return open_table(builder, [path], source, image_column=image_column, label_column=label_column)
    if path.suffix.lower() in BUILDERS or not _HUB_ID.fullmatch(source):
        raise SourceFormatError("there is no such file or folder.", path=source, hint="Check the path.")
    return _open_hub(source, image_column=image_column, label_column=label_column, split=split or "train")


def open_folder(folder: Path, source: str, split: str | None) -> Layout:
    """One folder per class; deeper folders belong to the class they are in; other files are not images and not rows.

    When the folders are named after splits (train, test, ...), the class folders are looked for inside one of them.
    """
    root = folder
    folders = _visible_folders(folder)
    if folders and all(entry.name.lower() in SPLITS and _visible_folders(entry) for entry in folders):
        by_split = {SPLITS[entry.name.lower()]: entry for entry in folders}
        wanted = SPLITS.get((split or "train").lower(), split)
        if wanted not in by_split:
            raise SourceFormatError(
                f"there is no split {split or 'train'!r}, only {', '.join(sorted(by_split))}.",
                path=source,
                hint="Name one of them with --split.",
            )
        folder = by_split[wanted]
        folders = _visible_folders(folder)
    names = tuple(sorted(_text(entry.name) for entry in folders))
    if not names:
        found = "files but no folders" if any(folder.iterdir()) else "nothing"
        raise SourceFormatError(
            f"expected one folder for each class, found {found}.",
            path=source,
            hint="Sort the images into folders named after their classes, or list them in a CSV file.",
        )
    paths: list[str] = []
    labels: list[int | None] = []
    reasons: dict[int, str] = {}
    inside = InsideFolder(root)
    index_of = {name: index for index, name in enumerate(names)}
    for path, reason in _list_images(folder):
        relative = path.relative_to(root)
        if reason is None:
            try:
                inside.resolve(str(relative))
                relative.as_posix().encode()
            except PathRefused as refused:
                reason = refused.reason
            except UnicodeEncodeError:
                reason = "the file's name is not UTF-8"
        in_class = path.parent != folder
        if not in_class:
            reason = reason or "the image is in no class folder"
        if reason is not None:
            reasons[len(paths)] = reason
        labels.append(index_of.get(_text(path.relative_to(folder).parts[0])) if in_class else None)
        paths.append(_text(relative.as_posix()))
    if not paths:
        raise SourceFormatError(
            f"there is no image in its folders; image files end in {', '.join(sorted(IMAGE_SUFFIXES))}.",
            path=source,
            hint="Check that this is the folder that holds the class folders.",
        )
    table = InMemoryTable(pa.table({"image": pa.array(paths, pa.string())}))
    dataset = datasets.Dataset(table).cast_column("image", _IMAGES)
    return Layout(
        dataset=dataset, ids=paths, labels=pa.array(labels, pa.int64()), names=names, root=root, reasons=reasons
    )


def open_table(
    builder: str, files: Sequence[Path], source: str, *, image_column: str | None, label_column: str | None
) -> Layout:
    """Parquet, CSV, JSON lines or WebDataset shards; ids are an id column or "<file stem>:<row in the file>"."""
    paths = [glob.escape(str(file.absolute())) for file in files]
    if any("::" in path for path in paths):
        raise SourceFormatError(
            "its path holds '::', which the reader takes for a chain of archives.",
            path=source,
            hint="Rename the file or the folder.",
        )
    with _quiet_datasets(), _reading(source):
        options = _csv_options(files[0]) if builder == "csv" else {}
        dataset = datasets.load_dataset(builder, data_files={"train": paths}, split="train", **options)
    assert isinstance(dataset, datasets.Dataset)  # noqa: S101 - what split= returns
    if builder == "parquet":
        counts = [pq.read_metadata(file).num_rows for file in files]
        ids = [f"{_text(file.stem)}:{row}" for file, rows in zip(files, counts, strict=True) for row in range(rows)]
    else:
        ids = [f"{_text(files[0].stem)}:{row}" for row in range(len(dataset))]
    root = files[0].absolute().parent
    return _from_columns(dataset, ids, source, root, image_column=image_column, label_column=label_column)


def _csv_options(file: Path) -> dict[str, Any]:
    """All columns as texts and only empty cells as missing: else "007" or a class named "NA" would change."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        columns = next(csv.reader(lines), [])
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _open_hub(name: str, *, image_column: str | None, label_column: str | None, split: str) -> Layout:
    with _quiet_datasets():
        try:
            dataset = datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub, the network, the repository's files: many kinds
            raise SourceFormatError(
                f"it is no file or folder here, and the Hugging Face data set could not be opened: {_cause(error)}",
                path=name,
                hint="Check the path, or the data set's id, its --split and the network.",
            ) from error
    assert isinstance(dataset, datasets.Dataset)  # noqa: S101 - what split= returns
    stem = name.rsplit("/", 1)[-1]
    ids = [f"{stem}:{row}" for row in range(len(dataset))]
    # A hub data set of image files names them by path, in the cache folder that they were downloaded to.
    root = Path(datasets.config.HF_CACHE_HOME)
    return _from_columns(dataset, ids, name, root, image_column=image_column, label_column=label_column)


def _from_columns(
    dataset: datasets.Dataset,
    ids: list[str],
    source: str,
    root: Path,
    *,
    image_column: str | None,
    label_column: str | None,
) -> Layout:
    features = dataset.features
    image_column = _choose(
        "image", image_column, IMAGE_COLUMNS, [name for name in features if isinstance(features[name], datasets.Image)],
        features, source,
    )  # fmt: skip
    label_column = _choose(
        "label", label_column, LABEL_COLUMNS,
        [name for name in features if isinstance(features[name], datasets.ClassLabel)], features, source,
    )  # fmt: skip
    feature = features[label_column]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    labels = dataset.data.column(label_column)
    id_column = next((name for name in ID_COLUMNS if name in features), None)
    if id_column is not None:
        given = dataset.data.column(id_column).to_pylist()
        ids = [row if value is None else str(value) for row, value in zip(ids, given, strict=True)]
    try:
        images = dataset.select_columns([image_column])
        if image_column != "image":
            images = images.rename_column(image_column, "image")
        images = images.cast_column("image", _IMAGES)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError) as error:
        raise SourceFormatError(
            f"the column {image_column!r} holds {features[image_column]}, not images, image bytes or paths.",
            path=source,
            hint="Name another column with --image-column.",
        ) from error
    return Layout(
        dataset=images, ids=ids, labels=labels, names=names, root=root, reasons=_rows_without_image(images, root)
    )


def _choose(
    what: str,
    wanted: str | None,
    known: Sequence[str],
    typed: Sequence[str],
    features: datasets.Features,
    source: str,
) -> str:
    """The user's column, else one whose name is known, best of the right type, else the first of the right type."""
    by_name = [name for name in known if name in features]
    choices = [name for name in by_name if name in typed] or list(typed) or by_name
    if wanted is None and choices:
        return choices[0]
    if wanted is not None and wanted in features:
        return wanted
    missing = f"no {what} column" if wanted is None else f"no column {wanted!r}"
    raise SourceFormatError(
        f"there is {missing} among the columns {', '.join(map(repr, features)) or '(none)'}.",
        path=source,
        hint=f"Name the column that holds the {what}s with --{what}-column.",
    )


def _rows_without_image(images: datasets.Dataset, root: Path) -> dict[int, str]:
    """Rows with neither bytes nor a path that may be read."""
    reasons: dict[int, str] = {}
    inside = InsideFolder(root)
    start = 0
    for chunk in images.data.column("image").chunks:
        content, paths, absent = chunk.field("bytes"), chunk.field("path"), chunk.is_null()
        if content.null_count or absent.true_count:
            for row in range(len(chunk)):
                if content[row].is_valid and not absent[row].as_py():
                    continue
                path = None if absent[row].as_py() else paths[row].as_py()
                if path is None:
                    reasons[start + row] = "the row has no image"
                    continue
                try:
                    inside.resolve(path)
                except PathRefused as refused:
                    reasons[start + row] = refused.reason
        start += len(chunk)
    return reasons


def _table_files(folder: Path, split: str | None) -> list[Path]:
    """The parquet files or tar shards of a folder or its ``data`` folder: those of one split where names tell."""
    for place in (folder, folder / "data"):
        for suffix in (".parquet", ".tar"):
            files = sorted(file for file in _entries(place) if file.suffix.lower() == suffix and file.is_file())
            if not files:
                continue
            of_split = {file: SPLITS.get(re.split(r"[-_.]", file.stem.lower())[0]) for file in files}
            wanted = SPLITS.get((split or "train").lower(), split)
            chosen = [file for file in files if of_split[file] == wanted]
            if split is not None and not chosen:
                raise SourceFormatError(
                    f"there is no {suffix} file of the split {split!r} among {', '.join(f.name for f in files[:5])}.",
                    path=str(folder),
                    hint="Name a split that is there with --split.",
                )
            return chosen or files
    return []


def _list_images(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Image files below ``folder`` in sorted order; linked folders are given once, with the reason, and not entered."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in folders:
            if (Path(parent) / name).is_symlink():
                yield Path(parent) / name, "linked folders are not entered"
        for name in sorted(files):
            if not _hidden(name) and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent) / name, None


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in _entries(folder) if entry.is_dir() and not _hidden(entry.name))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except PermissionError as error:
        raise SourceFormatError(
            "the folder cannot be read.", path=str(folder), hint="Check the folder's permissions."
        ) from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _text(name: str) -> str:
    """A file name as text that can be stored: bytes that are not UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars and no log lines of ``datasets``; its settings are put back."""
    bars_off, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars_off:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged files of any format: the readers raise many kinds
        raise SourceFormatError(
            f"the file cannot be read: {_cause(error)}",
            path=source,
            hint="Check that the file is whole and of the format its suffix says.",
        ) from error


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
