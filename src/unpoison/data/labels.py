"""From a column of labels, whatever its type, to class indices, and a reason for each label that is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from unpoison.errors import LabelRangeError, SourceFormatError

MAX_UNNAMED_CLASSES = 100_000
"""Numbers without a class list name the classes "0", "1", ... up to here; a larger one is no label."""
_WHOLE = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True, kw_only=True)
class ResolvedLabels:
    """``labels`` index ``class_names``; rows in ``reasons`` have no label and hold -1."""

    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]
    reasons: dict[int, str]


def resolve_labels(
    column: pa.Array | pa.ChunkedArray, *, path: str, names: Sequence[str] | None, given: Sequence[str] | None
) -> ResolvedLabels:
    """``names`` come with the column (a ClassLabel feature or folder names), ``given`` from the user and win.

    Whole numbers index the class list, and without one they name the classes "0", "1", ...; texts are looked up in the
    class list, and without one the sorted texts are the class list. Texts that are all whole numbers count as numbers
    unless the class list holds them. Raises SourceFormatError for a column of another type or a class list with
    repeats, LabelRangeError when no label at all is in the class list.
    """
    class_list = tuple(given) if given is not None else None if names is None else tuple(names)
    if class_list is not None and len(set(class_list)) < len(class_list):
        twice = sorted({name for name in class_list if class_list.count(name) > 1})[:3]
        raise SourceFormatError(
            f"the class list names {', '.join(map(repr, twice))} more than once.",
            path=path,
            hint="Give each class a name of its own.",
        )
    values = column.to_pylist()
    if pa.types.is_floating(column.type):
        values = [int(value) if value is not None and np.isfinite(value) and value == int(value) else None
                  for value in values]  # fmt: skip
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = _numbers_in(values, class_list)
    elif not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise SourceFormatError(
            f"expected labels to be whole numbers or texts, found {column.type}.",
            path=path,
            hint="Name another column with --label-column.",
        )
    resolved = _look_up(values, class_list)
    if values and len(resolved.reasons) == len(values):
        first = next(iter(resolved.reasons.values()))
        raise LabelRangeError(
            f"{path}: no label is in the class list of {len(resolved.class_names)} classes; row 0: {first}.",
            hint="Check the label column and the class list (--label-column, --class-names).",
        )
    return resolved


def _numbers_in(values: list[str | None], class_list: tuple[str, ...] | None) -> list[str | int | None]:
    """Texts, or the numbers they spell when they all do and no class is named so (a CSV file knows only texts)."""
    texts = {value for value in values if value is not None}
    named = class_list is not None and any(text in class_list for text in texts)
    if texts and not named and all(_WHOLE.fullmatch(text) for text in texts):
        return [None if value is None else int(value) for value in values]
    return list(values)


def _look_up(values: Sequence[str | int | None], class_list: tuple[str, ...] | None) -> ResolvedLabels:
    if class_list is None:
        present = {value for value in values if value is not None}
        if all(isinstance(value, int) for value in present):
            usable = [int(value) for value in present if 0 <= int(value) < MAX_UNNAMED_CLASSES]
            class_list = tuple(str(index) for index in range(max(usable, default=-1) + 1))
        else:
            class_list = tuple(sorted(str(value) for value in present))
    index_of = {name: index for index, name in enumerate(class_list)}
    labels = np.full(len(values), -1, dtype=np.int64)
    reasons: dict[int, str] = {}
    for row, value in enumerate(values):
        if value is None:
            reasons[row] = "the row has no label"
        elif isinstance(value, int):
            if 0 <= value < len(class_list):
                labels[row] = value
            else:
                reasons[row] = f"label {value} is outside the class list of {len(class_list)} classes"
        elif value in index_of:
            labels[row] = index_of[value]
        else:
            reasons[row] = f"label {value[:80]!r} is not in the class list of {len(class_list)} classes"
    return ResolvedLabels(labels=labels, class_names=class_list, reasons=reasons)
