"""Config dataclasses from TOML files and from options: nested tables, unknown keys refused."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from unpoison.errors import ConfigError

Config = TypeVar("Config")


def read_config(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", hint="Give a TOML file with the config's keys.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error}).", hint="Write one `key = value` a line.") from error


def make_config(kind: type[Config], values: Mapping[str, Any], *, where: str = "config") -> Config:
    """A config dataclass with ``values`` (nested tables for nested dataclasses) over its defaults.

    A nested table stands over the default that ``kind`` gives it, not over that of the nested dataclass itself.
    Raises ConfigError for an unknown key, with the closest known one, and for a value of the wrong type or range.
    """
    _check_keys(kind, values, where)
    try:
        return msgspec.convert(dict(values) | _nested(kind, values), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}.", hint=f"Keys and types: {_signature(kind)}.") from error


def _nested(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested tables of ``values``, each with what it leaves open."""
    filled = {}
    for entry in fields(kind):
        value = values.get(entry.name)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if isinstance(value, Mapping) and is_dataclass(default) and not isinstance(default, type):
            filled[entry.name] = merge(asdict(default), value)
    return filled


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merged key by key, ``above`` winning; None in ``above`` means not given."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping):
            lower = below.get(key, {})
            merged[key] = merge(lower if isinstance(lower, Mapping) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged


def _check_keys(kind: type, values: Mapping[str, Any], where: str) -> None:
    hints = get_type_hints(kind)
    known = [entry.name for entry in fields(kind) if entry.init]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}: there is no key {key!r}.", hint=key_hint(kind, key))
        if isinstance(value, Mapping) and is_dataclass(hints[key]) and isinstance(hints[key], type):
            _check_keys(hints[key], value, f"{where}, [{key}]")


def key_hint(kind: type, key: str) -> str:
    """What a key that ``kind`` has not may have meant: the closest one, one of that name further down, or all."""
    known = [entry.name for entry in fields(kind) if entry.init]
    close = get_close_matches(key, known, n=1) or [path for path in _paths(kind) if path.endswith(f".{key}")]
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def _paths(kind: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for entry in fields(kind):
        yield prefix + entry.name
        nested = hints[entry.name]
        if isinstance(nested, type) and is_dataclass(nested):
            yield from _paths(nested, f"{prefix}{entry.name}.")


def _signature(kind: type) -> str:
    hints = get_type_hints(kind)
    return ", ".join(
        f"{entry.name} ({getattr(hints[entry.name], '__name__', hints[entry.name])})" for entry in fields(kind)
    )
