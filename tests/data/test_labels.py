"""Label columns of every type, and what is outside the class list."""

from collections.abc import Sequence

import pyarrow as pa
import pytest

from unpoison.data.labels import ResolvedLabels, resolve_labels
from unpoison.errors import LabelRangeError, SourceFormatError


def resolve(
    values: list,
    *,
    names: Sequence[str] | None = None,
    given: Sequence[str] | None = None,
    kind: pa.DataType | None = None,
) -> ResolvedLabels:
    return resolve_labels(pa.array(values, kind), path="x.parquet", names=names, given=given)


def test_names_of_the_column_are_used() -> None:
    found = resolve([1, 0], names=("cat", "<b>dog</b>"))
    assert found.class_names == ("cat", "<b>dog</b>")
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize("values", [[0, 2, 1], [0.0, 2.0, 1.0], ["0", "2", "1"]])
def test_numbers_without_names_are_named_by_themselves(values: list) -> None:
    found = resolve(values)
    assert found.class_names == ("0", "1", "2")
    assert found.labels.tolist() == [0, 2, 1]


def test_texts_are_sorted_into_a_class_list() -> None:
    found = resolve(["dog", "a/b", "dog", "日本"])
    assert found.class_names == ("a/b", "dog", "日本")
    assert found.labels.tolist() == [1, 0, 1, 2]


def test_given_class_list_wins_and_orders() -> None:
    assert resolve(["dog", "cat"], given=["dog", "cat"]).labels.tolist() == [0, 1]
    assert resolve(["7", "9"], given=["9", "7"]).labels.tolist() == [1, 0]
    assert resolve([0, 1], names=("a", "b"), given=["x", "y"]).class_names == ("x", "y")


def test_labels_outside_are_listed_with_reasons() -> None:
    found = resolve([0, -1, 5, None, 1], names=("a", "b"))
    assert found.labels.tolist() == [0, -1, -1, -1, 1]
    assert sorted(found.reasons) == [1, 2, 3]
    assert "outside the class list of 2" in found.reasons[2]
    assert "no label" in found.reasons[3]
    assert "'cow'" in resolve(["cow", "cat"], given=["cat", "dog"]).reasons[0]


def test_a_huge_label_makes_no_huge_class_list() -> None:
    found = resolve([0, 1, 10**12])
    assert found.class_names == ("0", "1")
    assert list(found.reasons) == [2]


def test_no_label_at_all_in_the_class_list() -> None:
    for values, names in (([5, 6, -1], ("a", "b")), ([None, None], ("a", "b"))):
        with pytest.raises(LabelRangeError, match="no label is in the class list of 2 classes") as caught:
            resolve(values, names=names, kind=pa.int64())
        assert "--label-column" in caught.value.hint


def test_other_types_and_repeated_names_are_refused() -> None:
    with pytest.raises(SourceFormatError, match="whole numbers or texts"):
        resolve([[1], [2]])
    with pytest.raises(SourceFormatError, match="more than once"):
        resolve([0, 1], given=["a", "a"])
