"""Configs from tables: nested, checked, and helpful about typing errors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from unpoison.configs import make_config, merge, read_config
from unpoison.defenses.pad_ft import PADFTConfig
from unpoison.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    epochs: int = 5
    batch: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"epochs must be positive, got {self.epochs}.", hint="Raise epochs.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    rate: float = 0.1
    mode: Literal["a", "b"] = "a"


def test_values_over_defaults() -> None:
    assert make_config(Outer, {"inner": {"epochs": 2}, "rate": 1}) == Outer(inner=Inner(epochs=2), rate=1.0)


@dataclass(frozen=True, kw_only=True)
class Around:
    inner: Inner = field(default_factory=lambda: Inner(epochs=9, batch=4))


def test_nested_tables_stand_over_the_default_of_their_place() -> None:
    assert make_config(Around, {"inner": {}}) == Around()
    assert make_config(Around, {"inner": {"batch": 2}}) == Around(inner=Inner(epochs=9, batch=2))
    assert make_config(PADFTConfig, {"clip": {}}) == PADFTConfig()


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"rat": 1}, "there is no key 'rat'", "Did you mean 'rate'?"),
        ({"inner": {"epoch": 1}}, "[inner]: there is no key 'epoch'", "Did you mean 'epochs'?"),
        ({"epochs": 1}, "there is no key 'epochs'", "Did you mean 'inner.epochs'?"),
        ({"zzz": 1}, "there is no key 'zzz'", "Known: inner, rate, mode."),
        ({"inner": {"epochs": 0}}, "epochs must be positive", "Raise epochs."),
        ({"rate": "fast"}, "`$.rate`", "rate (float)"),
        ({"mode": "c"}, "'c'", "mode"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(Outer, values)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_merge_takes_what_is_given() -> None:
    below = {"a": 1, "t": {"x": 1, "y": 2}}
    assert merge(below, {"a": None, "b": 3, "t": {"x": None, "y": 5}}) == {"a": 1, "b": 3, "t": {"x": 1, "y": 5}}
    assert below == {"a": 1, "t": {"x": 1, "y": 2}}
    assert merge({"steps": 3}, {"separation": {"scorers": None}}) == {"steps": 3, "separation": {}}


def test_read_config(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text("rate = 0.5\n[inner]\nepochs = 2\n")
    assert read_config(tmp_path / "good.toml") == {"rate": 0.5, "inner": {"epochs": 2}}
    (tmp_path / "bad.toml").write_text("rate =")
    for name in ("bad.toml", "absent.toml"):
        with pytest.raises(ConfigError, match=name):
            read_config(tmp_path / name)
