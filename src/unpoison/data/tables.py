"""Tables, shards and hub data sets, read by ``datasets``: rows with ids, of which columns are then chosen."""

from __future__ import annotations

import contextlib
import csv
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq

from unpoison.data.folders import SPLITS, as_text, entries
from unpoison.data.paths import InsideFolder, PathRefused
from unpoison.errors import SourceFormatError

BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".tar": "webdataset",
}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "path", "file", "file_name", "filename", "image_path")
ID_COLUMNS = ("id", "__key__")
_HUB_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a source, all columns. ``ids`` come from an id column or are "<file stem>:<row in the file>".

    ``source`` is what the user named; images named by a path are read only inside ``root``.
    """

    dataset: datasets.Dataset
    ids: list[str]
    source: str
    root: Path

    def column(self, what: str, wanted: str | None, known: Sequence[str], typed: Sequence[str]) -> str:
        """The user's column, else one whose name is known, best of the right type, else the first of the right type.

        Raises SourceFormatError where there is none; ``what`` names it in the message and in the option.
        """
        features = self.dataset.features
        by_name = [name for name in known if name in features]
        choices = [name for name in by_name if name in typed] or list(typed) or by_name
        if wanted is None and choices:
            return choices[0]
        if wanted is not None and wanted in features:
            return wanted
        missing = f"no {what} column" if wanted is None else f"no column {wanted!r}"
        raise SourceFormatError(
            f"there is {missing} among the columns {', '.join(map(repr, features)) or '(none)'}.",
            path=self.source,
            hint=f"Name the column that holds the {what}s with --{what}-column.",
        )

    def images(self, wanted: str | None) -> datasets.Dataset:
        """The column "image" alone, not decoded. Raises SourceFormatError where no column holds images."""
        features = self.dataset.features
        typed = [name for name in features if isinstance(features[name], datasets.Image)]
        column = self.column("image", wanted, IMAGE_COLUMNS, typed)
        try:
            images = self.dataset.select_columns([column])
            if column != "image":
                images = images.rename_column(column, "image")
            return images.cast_column("image", datasets.Image(decode=False))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError) as error:
            raise SourceFormatError(
                f"the column {column!r} holds {features[column]}, not images, image bytes or paths.",
                path=self.source,
                hint="Name another column with --image-column.",
            ) from error


def open_source(source: str, *, split: str | None) -> Table | Path:
    """Find out what ``source`` is and read it, or give back a folder that holds neither parquet files nor shards.

    Raises SourceFormatError for what is no data set we read.
    """
    path = Path(source).expanduser()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):
        exists = is_folder = False
    if is_folder:
        files = _table_files(path, split)
        return read_tables(files, source) if files else path
    if exists:
        if path.suffix.lower() not in BUILDERS:
            raise SourceFormatError(
                f"the suffix {path.suffix!r} is none of {', '.join(BUILDERS)}.",
                path=source,
                hint="Give a folder, or one of these files.",
            )
        return read_tables([path], source)
    if path.suffix.lower() in BUILDERS or not _HUB_ID.fullmatch(source):
        raise SourceFormatError("there is no such file or folder.", path=source, hint="Check the path.")
    return _read_hub(source, split or "train")


def read_tables(files: Sequence[Path], source: str) -> Table:
    """Parquet, CSV, JSON lines or WebDataset shards, all of one kind. Raises SourceFormatError for damaged ones."""
    paths = [glob.escape(str(file.absolute())) for file in files]
    if any("::" in path for path in paths):
        raise SourceFormatError(
            "its path holds '::', which the reader takes for a chain of archives.",
            path=source,
            hint="Rename the file or the folder.",
        )
    builder = BUILDERS[files[0].suffix.lower()]
    with _quiet_datasets(), _reading(source):
        options = _csv_options(files[0]) if builder == "csv" else {}
        dataset = datasets.load_dataset(builder, data_files={"train": paths}, split="train", **options)
    assert isinstance(dataset, datasets.Dataset)  # noqa: S101 - what split= returns
    if builder == "parquet":
        counts = [pq.read_metadata(file).num_rows for file in files]
        ids = [f"{as_text(file.stem)}:{row}" for file, rows in zip(files, counts, strict=True) for row in range(rows)]
    else:
        ids = [f"{as_text(files[0].stem)}:{row}" for row in range(len(dataset))]
    root = files[0].absolute().parent
    return Table(dataset=dataset, ids=_given_ids(dataset, ids), source=source, root=root)


def rows_without_image(images: datasets.Dataset, root: Path) -> dict[int, str]:
    """Rows with neither bytes nor a path that may be read, each with the reason."""
    reasons: dict[int, str] = {}
    inside = InsideFolder(root)
    for row, path in named_by_path(images):
        if path is None:
            reasons[row] = "the row has no image"
            continue
        try:
            inside.resolve(path)
        except PathRefused as refused:
            reasons[row] = refused.reason
    return reasons


def named_by_path(images: datasets.Dataset) -> Iterator[tuple[int, str | None]]:
    """Of each row whose image has no bytes: its number and its path, None where it has neither."""
    start = 0
    for chunk in images.data.column("image").chunks:
        content, paths, absent = chunk.field("bytes"), chunk.field("path"), chunk.is_null()
        if content.null_count or absent.true_count:
            for row in range(len(chunk)):
                if not content[row].is_valid or absent[row].as_py():
                    yield start + row, None if absent[row].as_py() else paths[row].as_py()
        start += len(chunk)


def _csv_options(file: Path) -> dict[str, Any]:
    """All columns as texts and only empty cells as missing: else "007" or a class named "NA" would change."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        columns = next(csv.reader(lines), [])
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _read_hub(name: str, split: str) -> Table:
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
    return Table(dataset=dataset, ids=_given_ids(dataset, ids), source=name, root=Path(datasets.config.HF_CACHE_HOME))


def _given_ids(dataset: datasets.Dataset, ids: list[str]) -> list[str]:
    column = next((name for name in ID_COLUMNS if name in dataset.features), None)
    if column is None:
        return ids
    given = dataset.data.column(column).to_pylist()
    return [row if value is None else str(value) for row, value in zip(ids, given, strict=True)]


def _table_files(folder: Path, split: str | None) -> list[Path]:
    """The parquet files or tar shards of a folder or its ``data`` folder: those of one split where names tell."""
    for place in (folder, folder / "data"):
        for suffix in (".parquet", ".tar"):
            files = sorted(file for file in entries(place) if file.suffix.lower() == suffix and file.is_file())
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
