"""How each kind of source becomes images with ids and, row by row, a list of captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from jaxtyping import Bool

from unpoison.data.encoded import take
from unpoison.data.folders import IMAGE_SUFFIXES, as_text, images_by_path, list_images, split_folder
from unpoison.data.paths import InsideFolder, PathRefused
from unpoison.data.tables import Table, named_by_path, open_source, read_tables, rows_without_image
from unpoison.errors import SourceFormatError

CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "txt", "TEXT", "sentence", "sentences", "description",
                   "alt_text", "alt", "prompt", "title")  # fmt: skip
CAPTION_LISTS = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
BLOCK = 4096  # rows of captions that are Python texts at one time
_LARGEST_TEXT = 1 << 20  # bytes of one caption file
_LISTS = pa.list_(pa.large_string())
_LINE_ENDS = re.compile(r"\r\n?|\n")
# Python's white space, and characters that take no room: a caption of nothing else says nothing.
_BLANKS = "".join(map(chr, [*range(0x21), *range(0x7F, 0xA1), 0x1680, *range(0x2000, 0x2010), *range(0x2028, 0x2030),
                            0x205F, 0x2060, 0x3000, 0xFEFF]))  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class PairLayout:
    """All rows of a source; those in ``reasons`` are known to be unusable. Rows of one id belong to one image.

    ``texts`` has the column "captions", a list of texts as they were found. Where ``by_path``, the id is the path that
    the row names its image by.
    """

    dataset: datasets.Dataset
    ids: list[str]
    texts: datasets.Dataset
    by_path: Bool[np.ndarray, " n"]
    root: Path | None
    reasons: dict[int, str]


def open_pair_layout(
    source: str, *, image_column: str | None, caption_column: str | None, split: str | None
) -> PairLayout:
    """Find out what ``source`` is and open it. Raises SourceFormatError for what holds no captioned images."""
    found = open_source(source, split=split)
    if isinstance(found, Path):
        listed = _caption_list(found, source, split)
        if listed is None:
            return _open_folder(found, source, split)
        found = read_tables([listed], source)
    return _from_columns(found, image_column=image_column, caption_column=caption_column)


def clean_captions(cell: Sequence[str | None] | None) -> tuple[str, ...]:
    """The captions of one row without blanks around them, those that are nothing but blank left out."""
    stripped = (text.strip(_BLANKS) for text in cell or () if text is not None)
    return tuple(text for text in stripped if text)


def captions_dataset(cells: Iterable[Sequence[str] | None]) -> datasets.Dataset:
    """A data set with the column "captions" in Arrow's memory, taken from ``cells`` block by block."""
    rows = iter(cells)
    chunks: list[pa.Array] = []
    while block := list(islice(rows, BLOCK)):
        chunks.append(pa.array(block, _LISTS))
    return _in_arrow(chunks)


def caption_blocks(
    texts: datasets.Dataset, rows: np.ndarray | range
) -> Iterator[tuple[Sequence[int], list[list[str | None] | UnicodeDecodeError | None]]]:
    """Row numbers and their captions as they were found, some thousand rows at a time; an error for no UTF-8."""
    arrow = texts.with_format("arrow")
    for start in range(0, len(rows), BLOCK):
        block = np.asarray(rows[start : start + BLOCK])
        cells: list[list[str | None] | UnicodeDecodeError | None] = []
        for chunk in take(arrow, block).column("captions").chunks:
            try:
                cells += chunk.to_pylist()
            except UnicodeDecodeError:  # Arrow does not check the texts of a file
                cells += [_text_or_error(cell) for cell in chunk]
        yield block.tolist(), cells


def rows_without_caption(texts: datasets.Dataset, rows: range) -> dict[int, str]:
    """Of ``rows``, those with nothing to read, each with the reason."""
    reasons: dict[int, str] = {}
    for numbers, cells in caption_blocks(texts, rows):
        for row, cell in zip(numbers, cells, strict=True):
            if isinstance(cell, UnicodeDecodeError):
                reasons[row] = "the caption is not UTF-8"
            elif not clean_captions(cell):
                found = any(text is not None for text in cell or ())
                reasons[row] = "the caption is empty" if found else "the row has no caption"
    return reasons


def _from_columns(table: Table, *, image_column: str | None, caption_column: str | None) -> PairLayout:
    images = table.images(image_column)
    features, columns = table.dataset.features, table.dataset.data
    typed = [name for name in CAPTION_COLUMNS if name in features and _holds_text(columns.column(name).type)]
    caption_column = table.column("caption", caption_column, CAPTION_COLUMNS, typed)
    captions = columns.column(caption_column)
    if not _holds_text(captions.type):
        raise SourceFormatError(
            f"the column {caption_column!r} holds {features[caption_column]}, not texts or lists of texts.",
            path=table.source,
            hint="Name another column with --caption-column.",
        )
    ids = _with_shard(table)
    by_path = np.zeros(len(ids), dtype=bool)
    for row, path in named_by_path(images):
        if path is not None:
            ids[row], by_path[row] = path, True
    return PairLayout(
        dataset=images,
        ids=ids,
        texts=_in_arrow([_as_lists(chunk) for chunk in captions.chunks]),
        by_path=by_path,
        root=table.root,
        reasons=rows_without_image(images, table.root),
    )


def _with_shard(table: Table) -> list[str]:
    """The table's ids; keys of several shards, which each count from 0, get the shard's name before them."""
    if "__url__" not in table.dataset.features or "__key__" not in table.dataset.features:
        return list(table.ids)
    shards = table.dataset.data.column("__url__").to_pylist()
    if len(set(shards)) < 2:
        return list(table.ids)
    return [f"{as_text(Path(shard or '').stem)}/{row}" for shard, row in zip(shards, table.ids, strict=True)]


def _caption_list(root: Path, source: str, split: str | None) -> Path | None:
    """The file of a folder that lists images and captions. Raises SourceFormatError where there are several."""
    for folder in dict.fromkeys((root, split_folder(root, source, split, of_classes=False))):
        found = [name for name in CAPTION_LISTS if (folder / name).exists()]
        if len(found) > 1:
            raise SourceFormatError(
                f"there are several lists of captions: {', '.join(found)}.",
                path=source,
                hint="Give one of these files instead of the folder.",
            )
        if found:
            try:
                InsideFolder(folder).resolve(found[0])
            except PathRefused as refused:
                raise SourceFormatError(
                    f"{refused.reason}.", path=source, hint="Put the list itself into the folder."
                ) from refused
            return folder / found[0]
    return None


def _open_folder(root: Path, source: str, split: str | None) -> PairLayout:
    """Images with a text file of the same name beside each; every line of it is a caption."""
    folder = split_folder(root, source, split, of_classes=False)
    names: list[Path] = []
    reasons: dict[int, str] = {}
    for path, reason in list_images(folder, root):
        if reason is not None:
            reasons[len(names)] = reason
        names.append(path.relative_to(root))
    if not names:
        raise SourceFormatError(
            f"there is no image in it; image files end in {', '.join(sorted(IMAGE_SUFFIXES))}.",
            path=source,
            hint=f"Give a folder of images with captions: a .txt file for each, or one of {', '.join(CAPTION_LISTS)}.",
        )
    inside = InsideFolder(root)

    def captions() -> Iterator[list[str] | None]:
        for row, name in enumerate(names):
            if row in reasons:
                yield None
                continue
            try:
                yield _read_lines(inside, str(name.with_suffix(".txt")))
            except PathRefused as refused:
                reasons[row] = f"no caption: {refused.reason}"
                yield None

    ids = [as_text(name.as_posix()) for name in names]
    texts = captions_dataset(captions())
    by_path = np.ones(len(ids), dtype=bool)
    return PairLayout(dataset=images_by_path(ids), ids=ids, texts=texts, by_path=by_path, root=root, reasons=reasons)


def _read_lines(inside: InsideFolder, name: str) -> list[str]:
    try:
        return _LINE_ENDS.split(inside.read(name, _LARGEST_TEXT).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise PathRefused(f"{name[:120]!r} is not UTF-8") from None


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _as_lists(chunk: pa.Array) -> pa.Array:
    """Texts or lists of texts as lists of large texts; the characters themselves are not copied."""
    if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type) or pa.types.is_fixed_size_list(chunk.type):
        return chunk.cast(_LISTS)
    return pa.ListArray.from_arrays(pa.array(np.arange(len(chunk) + 1, dtype=np.int32)), chunk.cast(pa.large_string()))


def _in_arrow(chunks: Sequence[pa.Array]) -> datasets.Dataset:
    table = pa.table({"captions": pa.chunked_array(chunks, _LISTS)})
    # A fingerprint of its own: computing one would copy all texts.
    return datasets.Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint())


def _text_or_error(cell: pa.Scalar) -> list[str | None] | UnicodeDecodeError | None:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error
