"""A table of a grid as a dataclass, with all that is wrong in it and not the first thing alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from unpoison.configs import key_hint, make_config
from unpoison.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Reading(Generic[T]):
    """``value``: what is right in the table, with defaults for the rest, so that it can be checked further; None where
    that would say nothing. ``problems``: one sentence each; without any the value is the table's."""

    value: T | None
    problems: list[str]

    @property
    def sound(self) -> T | None:
        return None if self.problems else self.value


def read_table(values: Any, kind: type[T], where: str) -> Reading[T]:
    """What a table says. A key whose value is wrong is left out, and the others are looked at without it."""
    if not isinstance(values, Mapping):
        return Reading(value=None, problems=[f"{where}: expected a table."])
    hints, required = get_type_hints(kind), _required(kind)
    problems = [f"{where}: there is no key {key!r}. {key_hint(kind, key)}" for key in values if key not in hints]
    meant = {name for name in required for key in values if key not in hints and repr(name) in key_hint(kind, key)}
    right: dict[str, Any] = {}
    for key, value in values.items():
        if key in hints:
            right[key], wrong = _known_part(hints[key], value, where, key)
            problems += wrong
    stood_in = {name for name in required if name not in right}
    problems += [f"{where}: {name} is missing." for name in required if name in stood_in - meant]
    right |= {name: _stand_in(hints[name]) for name in stood_in}

    def without(key: str) -> dict[str, Any]:
        left = {name: value for name, value in right.items() if name != key}
        return left | ({key: _stand_in(hints[key])} if key in required else {})

    while (said := _refusal(kind, right, where)) is not None:
        problems.append(f"{where}: {said.removeprefix(f'{where}: ')}")
        order = sorted(right, key=lambda name: name in required)  # another value of these is a guess
        wrong = next((key for key in order if _refusal(kind, without(key), where) != said), None)
        if wrong is None:
            return Reading(value=None, problems=problems)
        right = without(wrong)
        stood_in |= {wrong} & set(required)
    guessed = any(get_origin(hints[name]) is not Literal for name in stood_in)
    return Reading(value=None if guessed else make_config(kind, right, where=where), problems=problems)


def _known_part(hint: Any, value: Any, where: str, name: str) -> tuple[Any, list[str]]:
    """A nested table without the keys that it cannot have, or a list without the tables that something is wrong in."""
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        hints = get_type_hints(hint)
        problems = [
            f"{where}, [{name}]: there is no key {key!r}. {key_hint(hint, key)}" for key in value if key not in hints
        ]
        return {key: entry for key, entry in value.items() if key in hints}, problems
    member = get_args(hint)[0] if get_origin(hint) is tuple else None
    if is_dataclass(member) and isinstance(member, type) and isinstance(value, list):
        read = [read_table(entry, member, f"{where}: {name} {at}") for at, entry in enumerate(value, start=1)]
        kept = [entry for entry, found in zip(value, read, strict=True) if not found.problems]
        return kept, [problem for found in read for problem in found.problems]
    return value, []


def _required(kind: Any) -> list[str]:
    return [entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING]


def _stand_in(hint: Any) -> Any:
    """A value that no check refuses, for a key that has none: the first choice, all of a share, nothing."""
    if get_origin(hint) is Literal:
        return get_args(hint)[0]
    return () if get_origin(hint) is tuple else 1.0 if hint is float else ""


def _refusal(kind: type, values: Mapping[str, Any], where: str) -> str | None:
    try:
        make_config(kind, values, where=where)
    except ConfigError as error:
        return error.message
    return None
