"""Every error that unpoison raises on purpose. Each says what failed and, in ``.hint``, what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UnpoisonError(Exception):
    """Base of the hierarchy: ``message`` says what failed, where, what was expected and found; ``hint`` what to do."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UnpoisonError):
    """The request itself cannot be carried out."""


class ConfigError(UsageError):
    """A config value is out of range or a config key is unknown."""


class GridError(ConfigError):
    """A grid cannot be run as it is written. ``problems`` are all that is wrong with it, one sentence each."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        listed = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(
            f"{where}: {count} {'problem' if count == 1 else 'problems'}, nothing was run.{listed}",
            hint="Correct these and run the same command; docs/benchmark.md says what a grid may hold.",
        )


class UnknownMethodError(UsageError):
    """No attack, detector, defense or architecture of this name."""

    def __init__(self, name: str, known: Iterable[str], *, kind: str = "method") -> None:
        names = sorted(known)
        close = get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
        super().__init__(f"There is no {kind} named {name!r}.", hint=hint)
        self.closest = close[0] if close else None


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency.", hint=f"pip install 'unpoison[{extra}]'")


class DataError(UnpoisonError):
    """The data cannot be used as they are."""


class SourceFormatError(DataError):
    """A source is not in a layout we read. ``row`` is set where one row is to blame."""

    def __init__(self, message: str, *, path: str, row: int | None = None, hint: str) -> None:
        place = path if row is None else f"{path}, row {row}"
        super().__init__(f"{place}: {message}", hint=hint)
        self.path = path
        self.row = row


class LabelRangeError(DataError):
    """A label is outside the class list."""


class NotEnoughDataError(DataError):
    """Fewer samples than the step needs."""

    def __init__(self, what: str, *, have: int, need: int, hint: str) -> None:
        super().__init__(f"{what}: have {have}, need at least {need}.", hint=hint)
        self.have = have
        self.need = need


class ModelError(UnpoisonError):
    """The model cannot be used as it is."""


class UnsafeCheckpointError(ModelError):
    """Loading the file could run code, so it was not loaded."""


class CheckpointMismatchError(ModelError):
    """The weights do not fit the architecture."""

    def __init__(self, message: str, *, missing: Iterable[str], unexpected: Iterable[str], hint: str) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        super().__init__(message, hint=hint)


class UnsupportedModelError(ModelError):
    """A method needs something that this model does not have."""


class MethodError(UnpoisonError):
    """A method ran and could not give a result to rely on."""


class DivergedError(MethodError):
    """Training left the finite numbers."""

    def __init__(self, what: str, *, step: int, loss: float) -> None:
        super().__init__(
            f"{what} diverged at step {step}: loss {loss}.",
            hint="Lower the learning rate; check that the images are in [0, 1].",
        )
        self.step = step
        self.loss = loss


class NoSeparationError(MethodError):
    """The scores do not tell samples apart."""


class NotAcceptedError(MethodError):
    """The purified model fell past the bound on held-out clean performance."""


class ResultError(UnpoisonError):
    """A stored result cannot be read or continued."""


class SchemaVersionError(ResultError):
    """The file was written by another version of the schema."""


class RunFolderMismatchError(ResultError):
    """The run folder belongs to a run with other inputs."""

    def __init__(self, folder: str, difference: Iterable[str]) -> None:
        self.difference = tuple(difference)
        super().__init__(
            f"{folder} holds a run with other inputs: {'; '.join(self.difference)}.",
            hint="Repeat the command with the first run's inputs to continue it, or choose another -o folder.",
        )
