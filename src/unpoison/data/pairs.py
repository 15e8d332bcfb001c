"""Every captioned set opens as ``ImageTextPairs``: encoded images, each with a stable id and one or more captions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np

from unpoison.data.captions import (
    BLOCK,
    PairLayout,
    caption_blocks,
    captions_dataset,
    clean_captions,
    open_pair_layout,
    rows_without_caption,
)
from unpoison.data.encoded import EncodedImages, Overlay, as_rows, image_cells, take
from unpoison.data.sources import LabelledImages, check_skips, draw, read_request, shapes_rows, window
from unpoison.errors import ConfigError, DataError
from unpoison.results import SkippedRow
from unpoison.types import ImageTextModel

_COMPARED = 128  # images read at once to see whether rows of one id show the same


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageTextPairs(EncodedImages):
    """Encoded images with ids and captions. Opening them decodes no image; captions stay in Arrow's memory.

    ``texts`` has the column "captions", a list of texts; its rows stand beside ``ids``. ``replaced`` holds captions
    that are put in the place of all captions of an id.
    """

    texts: datasets.Dataset
    replaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"ImageTextPairs({self.name!r}, {len(self)} images)"

    def select(self, indices: Iterable[int] | np.ndarray) -> ImageTextPairs:
        """The rows at ``indices`` (from 0, repeats allowed) in that order. Raises IndexError outside 0..n-1."""
        rows = as_rows(indices, len(self))
        return replace(self, **self._chosen(rows), texts=self.texts.select(rows))

    def with_overlay(self, overlay: Overlay | None, captions: Mapping[str, str]) -> ImageTextPairs:
        """The same pairs with other pictures and, by id, another caption in the place of all captions of an image.

        ``overlay``, if given, is applied after the one already there; files stay as they are. Raises DataError for an
        id that is not in the set and for an empty caption.
        """
        unknown = captions.keys() - set(self.ids)
        if unknown:
            raise DataError(
                f"{len(unknown)} of {len(captions)} captions are for ids that are not in {self.name}, "
                f"the first is {min(unknown)!r}.",
                hint="Give captions for ids of this set.",
            )
        new = {name: clean_captions([text]) for name, text in captions.items()}
        empty = [name for name, texts in new.items() if not texts]
        if empty:
            raise DataError(f"The caption for {empty[0]!r} is empty.", hint="Give each image a caption with letters.")
        return replace(self, overlay=self._stacked(overlay), replaced={**self.replaced, **new})

    def captions(self, indices: Iterable[int] | np.ndarray) -> list[tuple[str, ...]]:
        """At least one caption of each row, without blanks around it; whatever characters it holds are left alone."""
        rows = as_rows(indices, len(self))
        cleaned = zip(rows.tolist(), _clean_rows(self.texts, rows), strict=True)
        return [self.replaced.get(self.ids[row]) or captions for row, captions in cleaned]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ids, captions, overlay and images: by their bytes where the rows hold them, else by each file's size
        and time of change, so that no file is read. It tells a changed set, also one in which only an image changed."""
        digest = hashlib.blake2b(self.caption_fingerprint.encode(), digest_size=16)
        for stamp in self.image_stamps():
            digest.update(len(stamp).to_bytes(8, "little") + stamp)
        return digest.hexdigest()

    @cached_property
    def caption_fingerprint(self) -> str:
        """Hash of ids, captions and overlay alone: names what is kept of a set whose images are known another way."""
        digest = hashlib.blake2b(digest_size=16)
        if self.overlay is not None:
            digest.update(self.overlay.fingerprint.encode())
        for rows in _blocks(len(self)):
            found = [(self.ids[row], texts) for row, texts in zip(rows, self.captions(rows), strict=True)]
            digest.update(repr(found).encode(errors="surrogatepass"))
        return digest.hexdigest()


def open_pairs(
    source: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str | None = None,
    rows: slice | None = None,
    limit: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> ImageTextPairs:
    """Open a set of captioned images.

    ``source``: a .parquet, .csv, .jsonl or WebDataset .tar file; a folder of parquet files or shards; a folder of
    images with a captions.csv, captions.jsonl, metadata.csv or metadata.jsonl, or with a .txt file of the same name
    beside each (every line a caption); a Hugging Face data set id; or "shapes:N:SEED", the built-in world.
    A suffix "[0:25000]" (or ``rows``) takes those rows of a table or images of a folder. ``limit`` keeps a random
    sample of the usable images, in their order, drawn by ``seed``.

    Several captions of an image are a list in its cell, or several rows that share the row's id or name one file; such
    a file's path is then the id. Blank ones are left out. Rows without an image that may be read, without a caption, or
    with another image than an earlier row of their id are listed in ``skipped``; with ``strict`` any of them is fatal,
    else more than a tenth.

    Raises SourceFormatError (a layout we do not read; too many bad rows), NotEnoughDataError (no row), ConfigError
    (``limit`` < 1 or a slice with a step).
    """
    request = read_request(source, rows=rows, limit=limit, seed=seed)
    if request.shapes is not None:
        layout = _open_shapes(*request.shapes)
    else:
        layout = open_pair_layout(request.place, image_column=image_column, caption_column=caption_column, split=split)
    opened = _usable_pairs(layout, request.name, request.rows, strict=strict)
    return opened if limit is None or limit >= len(opened) else opened.select(draw(len(opened), limit, seed))


def pairs_of_labels(images: LabelledImages, templates: Sequence[str], *, seed: int = 0) -> ImageTextPairs:
    """Captions from class names: each image gets one template, chosen by its id and ``seed``, filled with its label.

    Rows, ids and overlay stay as they are. Raises ConfigError for templates without {}.
    """
    if not templates or not all("{}" in template for template in templates):
        raise ConfigError(
            f"expected templates that hold {{}}, got {list(templates)}.", hint="Write 'a photo of a {}.', for example."
        )

    def captions() -> Iterator[tuple[str, ...]]:
        for name, label in zip(images.ids, images.labels.tolist(), strict=True):
            digest = hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogatepass"), digest_size=8).digest()
            template = templates[int.from_bytes(digest, "little") % len(templates)]
            yield clean_captions([template.replace("{}", images.class_names[label])])

    return ImageTextPairs(
        name=images.name,
        dataset=images.dataset,
        ids=images.ids,
        root=images.root,
        roots=images.roots,
        skipped=images.skipped,
        overlay=images.overlay,
        texts=captions_dataset(captions()),
    )


def join_pairs(parts: Mapping[str, ImageTextPairs]) -> ImageTextPairs:
    """Several sets as one, in order; the ids get the part's name before them ("flickr8k/train:0").

    Images named by a path are read only inside the folder of their own part. Raises ConfigError for no part or a part
    with an overlay.
    """
    if not parts or any(part.overlay is not None or part.replaced for part in parts.values()):
        raise ConfigError("expected sets without an overlay.", hint="Join the clean sets and change what comes out.")
    return ImageTextPairs(
        name=" + ".join(part.name for part in parts.values()),
        dataset=datasets.concatenate_datasets([part.dataset for part in parts.values()]),
        ids=[f"{name}/{sample}" for name, part in parts.items() for sample in part.ids],
        roots=[root for part in parts.values() for root in part.roots or [part.root] * len(part)],
        skipped=tuple(
            SkippedRow(id=f"{name}/{row.id}", reason=row.reason) for name, part in parts.items() for row in part.skipped
        ),
        texts=datasets.concatenate_datasets([part.texts for part in parts.values()]),
    )


@dataclass(frozen=True, kw_only=True)
class CutCaptions:
    """How many of ``total`` captions the tokenizer cuts off; how many images have no caption that it leaves whole."""

    cut: int
    total: int
    images_without_whole: int


def count_cut_captions(clip: ImageTextModel, pairs: ImageTextPairs) -> CutCaptions:
    """Count the captions that lose their end (or what follows a mark of the end) on the way into the text tower."""
    cut = total = images = 0
    for rows in _blocks(len(pairs)):
        captions = pairs.captions(rows)
        lost = iter(clip.truncated([text for texts in captions for text in texts]))
        per_image = [[next(lost) for _ in texts] for texts in captions]
        cut += sum(map(sum, per_image))
        total += sum(map(len, per_image))
        images += sum(map(all, per_image))
    return CutCaptions(cut=cut, total=total, images_without_whole=images)


def _usable_pairs(layout: PairLayout, name: str, rows: slice, *, strict: bool) -> ImageTextPairs:
    chosen = window(name, rows, len(layout.ids))
    blank = rows_without_caption(layout.texts, chosen)
    kept: list[int] = []
    place_of: dict[str, int] = {}
    more: list[tuple[int, int]] = []  # (place in kept, row) of further captions
    skipped: dict[int, str] = {}
    for row in chosen:
        reason = layout.reasons.get(row) or blank.get(row)
        if reason is not None:
            skipped[row] = reason
        elif (place := place_of.setdefault(layout.ids[row], len(kept))) < len(kept):
            more.append((place, row))
        else:
            kept.append(row)
    for row in _other_images(layout, [(kept[place], row) for place, row in more]):
        skipped[row] = "two images of one id; this is the later one"
    more = [(place, row) for place, row in more if row not in skipped]
    left_out = tuple(SkippedRow(id=layout.ids[row], reason=skipped[row]) for row in sorted(skipped))
    check_skips(left_out, len(chosen), name, strict=strict)
    whole = len(kept) == len(layout.ids)
    return ImageTextPairs(
        name=name,
        dataset=layout.dataset if whole else layout.dataset.select(kept),
        ids=layout.ids if whole else [layout.ids[row] for row in kept],
        root=layout.root,
        skipped=left_out,
        texts=_gathered(layout.texts, kept, more) if more else layout.texts if whole else layout.texts.select(kept),
    )


def _other_images(layout: PairLayout, rows: Sequence[tuple[int, int]]) -> set[int]:
    """Of (first row of an id, later row), the later ones that show another image."""
    doubtful = [pair for pair in rows if not layout.by_path[list(pair)].all()]
    arrow = layout.dataset.with_format("arrow")
    others: set[int] = set()
    for start in range(0, len(doubtful), _COMPARED):
        block = np.array(doubtful[start : start + _COMPARED], dtype=np.int64)
        first, later = (image_cells(take(arrow, column)) for column in block.T)
        others |= {row for row, a, b in zip(block[:, 1].tolist(), first, later, strict=True) if a != b}
    return others


def _gathered(texts: datasets.Dataset, kept: Sequence[int], more: Sequence[tuple[int, int]]) -> datasets.Dataset:
    """The captions of the ``kept`` rows, each followed by those of the further rows of its id."""
    further: dict[int, list[int]] = {}
    for place, row in more:
        further.setdefault(place, []).append(row)

    def captions() -> Iterator[list[str]]:
        for block in _blocks(len(kept)):
            members = [[kept[place], *further.get(place, ())] for place in block]
            rows = np.array([row for group in members for row in group], dtype=np.int64)
            cells = _clean_rows(texts, rows)
            for group in members:
                yield [text for _ in group for text in next(cells)]

    return captions_dataset(captions())


def _clean_rows(texts: datasets.Dataset, rows: np.ndarray) -> Iterator[tuple[str, ...]]:
    for _, cells in caption_blocks(texts, rows):
        for cell in cells:
            if isinstance(cell, UnicodeDecodeError):  # such rows are left out when a source is opened
                raise DataError("A caption is not UTF-8.", hint="Open the source again.") from cell
            yield clean_captions(cell)


def _open_shapes(count: int, seed: int) -> PairLayout:
    dataset, ids, world = shapes_rows(count, seed)
    texts = captions_dataset([caption] for caption in world.captions)
    by_path = np.zeros(count, dtype=bool)
    return PairLayout(dataset=dataset, ids=ids, texts=texts, by_path=by_path, root=None, reasons={})


def _blocks(total: int) -> Iterator[range]:
    for start in range(0, total, BLOCK):
        yield range(start, min(start + BLOCK, total))
