"""The hierarchy: every error says what to do, and can be caught by its family."""

import inspect

import pytest

from unpoison import errors
from unpoison.errors import (
    CheckpointMismatchError,
    DataError,
    DivergedError,
    MethodError,
    MissingExtraError,
    ModelError,
    NotEnoughDataError,
    ResultError,
    RunFolderMismatchError,
    SourceFormatError,
    UnknownMethodError,
    UnpoisonError,
    UsageError,
)

FAMILIES = {UsageError, DataError, ModelError, MethodError, ResultError}
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, UnpoisonError)]
MADE = [
    UnknownMethodError("cdg", ["cgd", "par"]),
    MissingExtraError("Ray", "ray"),
    SourceFormatError("no image column", path="a.parquet", row=3, hint="Name it."),
    NotEnoughDataError("samples", have=3, need=50, hint="Give more."),
    CheckpointMismatchError("does not fit", missing=["a"], unexpected=["b", "c"], hint="Check --arch."),
    DivergedError("Training", step=7, loss=float("nan")),
    RunFolderMismatchError("out", ["seed: 0 there, 1 now"]),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_belongs_to_one_family(kind: type[UnpoisonError]) -> None:
    families = [family for family in FAMILIES if issubclass(kind, family)]
    assert len(families) == (0 if kind is UnpoisonError else 1)


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_errors_carry_a_message_and_a_hint(error: UnpoisonError) -> None:
    assert str(error) == error.message
    assert error.message
    assert error.hint


def test_a_message_names_what_was_found() -> None:
    unknown, _, source, few, mismatch, diverged, folder = MADE
    assert isinstance(unknown, UnknownMethodError)
    assert unknown.closest == "cgd"
    assert "Did you mean 'cgd'?" in unknown.hint
    far = UnknownMethodError("xyz", ["par", "cgd"], kind="attack")
    assert far.closest is None
    assert "cgd, par" in far.hint
    assert "no attack named 'xyz'" in far.message
    assert source.message == "a.parquet, row 3: no image column"
    assert "have 3, need at least 50" in few.message
    assert isinstance(mismatch, CheckpointMismatchError)
    assert (mismatch.missing, mismatch.unexpected) == (("a",), ("b", "c"))
    assert "step 7" in diverged.message
    assert "seed: 0 there, 1 now" in folder.message
    assert "pip install 'unpoison[ray]'" in MADE[1].hint
