"""Poisonings of several parts: more than one trigger or target in one set, on samples that no two parts share.

A part is a manifest of its own, as a single poisoning has it; a manifest of parts is the list of them. Manifests of
single poisonings stay what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from unpoison.attacks.manifest import SCHEMA as LABELLED
from unpoison.attacks.manifest import Poisoning, read_body
from unpoison.attacks.pair_manifest import SCHEMA as OF_PAIRS
from unpoison.attacks.pair_manifest import PairPoisoning, load_poisoning
from unpoison.attacks.pairs import apply_pair_poisoning, plan_pair_poisoning
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.attacks.write import WrittenPoisoning, prepare_folder, write_copy
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.sources import LabelledImages
from unpoison.errors import ConfigError, ResultError
from unpoison.results import write_atomically

SCHEMA = "unpoison/poisoning-parts"
SCHEMA_VERSION = 1
MOST_PARTS = 1000
M = TypeVar("M", Poisoning, PairPoisoning)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One (trigger, target, rate): ``target`` is a label for labelled images and a text for pairs, ``rate`` a share of
    the whole set in (0, 1]. ``options``: what else the planning takes, such as mode, captions, size and the trigger's
    own parameters.
    """

    trigger: str
    target: int | str
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PoisoningParts:
    """The manifest of several poisonings of one set: all of labelled images, or all of pairs.

    Raises ResultError for parts of two kinds or of two sets, for none, and for an id that two parts share.
    """

    parts: tuple[Poisoning, ...] | tuple[PairPoisoning, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MOST_PARTS:
            raise ResultError(
                f"poisoning of parts: {len(self.parts)} parts, expected 1 to {MOST_PARTS}.",
                hint="Plan the poisoning again.",
            )
        if len({(type(part), part.source_fingerprint) for part in self.parts}) > 1:
            raise ResultError(
                "poisoning of parts: the parts are of several sets.", hint="Plan all parts together, on one set."
            )
        shared = [name for name, count in Counter(self.ids).items() if count > 1]
        if shared:
            raise ResultError(
                f"poisoning of parts: {len(shared)} ids stand in several parts (the first: {shared[0]!r}).",
                hint="Plan all parts together.",
            )

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.ids)

    @property
    def trigger(self) -> str:
        """The names of the triggers, for tables."""
        return " + ".join(part.trigger for part in self.parts)

    @property
    def target_name(self) -> str:
        """The names of the targets, for tables."""
        return " + ".join(part.target_name for part in self.parts)

    @property
    def changed(self) -> frozenset[str]:
        """Ids of the samples whose pixels change."""
        return frozenset().union(*(part.changed for part in self.parts if isinstance(part, Poisoning)))

    def without(self, left_out: Collection[str]) -> PoisoningParts:
        """The manifest without these samples (of labelled images)."""
        return replace(self, parts=tuple(part.without(left_out) for part in _labelled(self)))

    def save(self, path: Path) -> None:
        """Write the manifest as one JSON object."""
        kind = LABELLED if isinstance(self.parts[0], Poisoning) else OF_PAIRS
        body = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "of": kind,
            "parts": [part.body() for part in self.parts],
        }
        write_atomically(path, msgspec.json.format(msgspec.json.encode(body), indent=2))

    @classmethod
    def load(cls, path: Path) -> PoisoningParts:
        """Raises ResultError for a file that is not such a manifest, SchemaVersionError, and as a part's does."""
        body = read_body(path, SCHEMA, SCHEMA_VERSION)
        kind = body.get("of")
        if kind not in (LABELLED, OF_PAIRS):
            raise ResultError(
                f"{path}: parts of {kind!r}, expected one of {LABELLED}, {OF_PAIRS}.", hint="Plan the poisoning again."
            )
        try:
            if kind == LABELLED:
                made = cls(parts=msgspec.convert(body.get("parts"), tuple[Poisoning, ...]))
            else:
                made = cls(parts=msgspec.convert(body.get("parts"), tuple[PairPoisoning, ...]))
        except msgspec.ValidationError as error:
            raise ResultError(f"{path}: {error}.", hint="Plan the poisoning again.") from error
        for part in made.parts:
            part.make_trigger()
        return made


def load_manifest(path: Path) -> Poisoning | PairPoisoning | PoisoningParts:
    """Whichever manifest the file holds: one poisoning, of labelled images or of pairs, or several parts."""
    return PoisoningParts.load(path) if _holds_parts(path) else load_poisoning(path)


def load_labelled(path: Path) -> Poisoning | PoisoningParts:
    """The manifest of one poisoning of labelled images, or of several parts. Raises as their ``load`` does."""
    return PoisoningParts.load(path) if _holds_parts(path) else Poisoning.load(path)


def plan_parts(source: LabelledImages, parts: Sequence[Part], *, seed: int = 0) -> PoisoningParts:
    """Plan each part in turn on the samples that the parts before it left; part i draws from ``seed`` + i.

    Raises as :func:`~unpoison.attacks.poison.plan_poisoning` does, ConfigError for no part or a target that is no
    label.
    """
    return PoisoningParts(parts=_each(parts, partial(plan_poisoning, source), seed, target=int))


def plan_pair_parts(pairs: ImageTextPairs, parts: Sequence[Part], *, seed: int = 0) -> PoisoningParts:
    """The same for pairs, with targets in words. Raises as :func:`~unpoison.attacks.pairs.plan_pair_poisoning` does."""
    return PoisoningParts(parts=_each(parts, partial(plan_pair_poisoning, pairs), seed, target=str))


def apply_parts(source: LabelledImages, poisoning: PoisoningParts) -> LabelledImages:
    """``source`` with every part applied, lazily. Raises DataError as a part's does, ConfigError for parts of pairs."""
    for part in _labelled(poisoning):
        source = apply_poisoning(source, part)
    return source


def apply_pair_parts(pairs: ImageTextPairs, poisoning: PoisoningParts) -> ImageTextPairs:
    """``pairs`` with every part applied, lazily. Raises as a part's does, ConfigError for parts of labelled images."""
    for part in poisoning.parts:
        if not isinstance(part, PairPoisoning):
            raise ConfigError("These parts poison labelled images.", hint="Use apply_parts.")
        pairs = apply_pair_poisoning(pairs, part)
    return pairs


def write_poisoned_parts(
    source: LabelledImages, poisoning: PoisoningParts, folder: Path, *, manifest_only: bool = False
) -> WrittenPoisoning:
    """:func:`~unpoison.attacks.poison.write_poisoned` for several parts; raises as it does."""
    poisoned = apply_parts(source, poisoning)
    prepare_folder(folder)
    return write_copy(None if manifest_only else poisoned, poisoning, folder, overlaid=source.overlay is not None)


def _each(parts: Sequence[Part], plan: Callable[..., M], seed: int, *, target: type[int] | type[str]) -> tuple[M, ...]:
    if not 1 <= len(parts) <= MOST_PARTS:
        raise ConfigError(f"expected 1 to {MOST_PARTS} parts, got {len(parts)}.", hint="Give a trigger and a target.")
    made: list[M] = []
    for index, part in enumerate(parts):
        if not isinstance(part.target, target):
            what, hint = ("label", "its number") if target is int else ("text", "a word or a few")
            raise ConfigError(f"part {index + 1}: expected a {what}, got {part.target!r}.", hint=f"Give {hint}.")
        taken = {name for before in made for name in before.ids}
        options = dict(part.options, rate=part.rate, target=part.target, seed=seed + index, taken=taken)
        made.append(plan(part.trigger, **options))
    return tuple(made)


def _labelled(poisoning: PoisoningParts) -> list[Poisoning]:
    found = [part for part in poisoning.parts if isinstance(part, Poisoning)]
    if len(found) < len(poisoning.parts):
        raise ConfigError("These parts poison image-caption pairs.", hint="Use apply_pair_parts.")
    return found


def _holds_parts(path: Path) -> bool:
    try:
        head = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False  # the load that follows says what is wrong
    return isinstance(head, dict) and head.get("schema") == SCHEMA
