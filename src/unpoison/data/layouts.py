"""How each kind of source becomes one ``datasets.Dataset`` with an image column, ids and a column of labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa

from unpoison.data.folders import IMAGE_SUFFIXES, as_text, images_by_path, list_images, split_folder, visible_folders
from unpoison.data.tables import Table, open_source, rows_without_image
from unpoison.errors import SourceFormatError

LABEL_COLUMNS = ("label", "class", "target", "labels", "cls")


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
    found = open_source(source, split=split)
    if isinstance(found, Path):
        return _open_folder(found, source, split)
    return _from_columns(found, image_column=image_column, label_column=label_column)


def _open_folder(root: Path, source: str, split: str | None) -> Layout:
    """One folder per class; deeper folders belong to the class they are in; other files are not images and not rows.

    When the folders are named after splits (train, test, ...), the class folders are looked for inside one of them.
    """
    folder = split_folder(root, source, split, of_classes=True)
    names = tuple(sorted(as_text(entry.name) for entry in visible_folders(folder)))
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
    index_of = {name: index for index, name in enumerate(names)}
    for path, reason in list_images(folder, root):
        in_class = path.parent != folder
        if not in_class:
            reason = reason or "the image is in no class folder"
        if reason is not None:
            reasons[len(paths)] = reason
        labels.append(index_of.get(as_text(path.relative_to(folder).parts[0])) if in_class else None)
        paths.append(as_text(path.relative_to(root).as_posix()))
    if not paths:
        raise SourceFormatError(
            f"there is no image in its folders; image files end in {', '.join(sorted(IMAGE_SUFFIXES))}.",
            path=source,
            hint="Check that this is the folder that holds the class folders.",
        )
    labels_of = pa.array(labels, pa.int64())
    return Layout(dataset=images_by_path(paths), ids=paths, labels=labels_of, names=names, root=root, reasons=reasons)


def _from_columns(table: Table, *, image_column: str | None, label_column: str | None) -> Layout:
    features = table.dataset.features
    images = table.images(image_column)
    typed = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    label_column = table.column("label", label_column, LABEL_COLUMNS, typed)
    feature = features[label_column]
    return Layout(
        dataset=images,
        ids=table.ids,
        labels=table.dataset.data.column(label_column),
        names=tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
        root=table.root,
        reasons=rows_without_image(images, table.root),
    )
