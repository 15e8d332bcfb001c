"""The catalog is the only list of names: it resolves, and what exists is in it."""

from dataclasses import is_dataclass

import pytest

from unpoison.attacks.triggers import PAIR_TRIGGERS, TRIGGERS
from unpoison.catalog import ATTACKS, DEFENSES, DETECTORS, NEEDS, Entry, find, resolve
from unpoison.errors import UnknownMethodError

ENTRIES = (*ATTACKS, *DETECTORS, *DEFENSES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_an_entry_holds(entry: Entry) -> None:
    assert callable(resolve(entry.function))
    assert is_dataclass(resolve(entry.config))
    assert resolve(entry.config)() is not None
    assert set(entry.needs) <= set(NEEDS)
    assert entry.link.startswith("https://")
    assert bool(entry.protects) == (entry.kind == "defense")


def test_every_trigger_is_listed() -> None:
    assert {entry.name: resolve(entry.config) for entry in ATTACKS} == TRIGGERS | PAIR_TRIGGERS


@pytest.mark.parametrize("entries", [ATTACKS, DETECTORS, DEFENSES])
def test_names_are_unique_within_a_kind(entries: tuple[Entry, ...]) -> None:
    assert (
        len({entry.name for entry in entries}) == len(entries) == len({entry.kind for entry in entries}) * len(entries)
    )


def test_an_unknown_name_brings_up_the_closest() -> None:
    assert find("badnet", ATTACKS).name == "badnet"
    with pytest.raises(UnknownMethodError, match="no attack named 'badnte'") as caught:
        find("badnte", ATTACKS)
    assert caught.value.closest == "badnet"
