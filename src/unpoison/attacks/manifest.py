"""The manifest of a poisoning: the ground truth of an experiment, one JSON file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Int

from unpoison.attacks.selection import RANDOM
from unpoison.attacks.triggers import PAIR_TRIGGERS, Trigger, make_trigger
from unpoison.errors import ConfigError, LabelRangeError, ResultError, SchemaVersionError
from unpoison.results import write_atomically

SCHEMA = "unpoison/poisoning"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Poisoning:
    """The manifest. ``rate`` is the share of the whole source, in (0, 1]; the three lists belong together row by row.

    ``mode``: all-to-one (samples outside the target class get trigger and target label), all-to-all (any sample gets
    the trigger and the next class as its label), clean-label (samples of the target class get the trigger),
    clean-image (samples outside the target class get the target label, no pixel changes). With covers (Adap-Blend,
    Adap-Patch) some samples get the trigger and keep their label: see ``covers``. ``selection``: how the samples were
    chosen, "random" or an attacker's rule, and ``selected_by``, the fingerprint of the model that was asked.
    """

    trigger: str
    config: dict[str, Any]
    seed: int
    mode: str
    target: int
    target_name: str
    rate: float
    ids: tuple[str, ...]
    original_labels: tuple[int, ...]
    new_labels: tuple[int, ...]
    class_names: tuple[str, ...]
    source: str
    source_size: int
    source_fingerprint: str
    selection: str = RANDOM
    selected_by: str = ""

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.original_labels) == len(self.new_labels):
            raise ResultError(
                f"poisoning: {len(self.ids)} ids, {len(self.original_labels)} original and {len(self.new_labels)} "
                "new labels; expected as many of each.",
                hint="Plan the poisoning again.",
            )
        outside = [
            label
            for label in (self.target, *self.original_labels, *self.new_labels)
            if not 0 <= label < len(self.class_names)
        ]
        if outside:
            raise LabelRangeError(
                f"poisoning: label {outside[0]} is outside the {len(self.class_names)} classes.",
                hint=f"Use a label from 0 to {len(self.class_names) - 1}.",
            )

    @property
    def all_to_all(self) -> bool:
        return self.mode == "all-to-all"

    @property
    def covers(self) -> tuple[str, ...]:
        """Ids of the samples that got the trigger and kept a label other than the attack's."""
        if self.mode == "clean-label":
            return ()
        rows = zip(self.ids, self.original_labels, self.new_labels, strict=True)
        return tuple(name for name, old, new in rows if old == new)

    @property
    def changed(self) -> frozenset[str]:
        """Ids of the samples whose pixels change."""
        return frozenset() if self.mode == "clean-image" else frozenset(self.ids)

    def without(self, left_out: Collection[str]) -> Poisoning:
        """The manifest without these samples."""
        rows = [row for row, name in enumerate(self.ids) if name not in left_out]
        return replace(
            self,
            ids=tuple(self.ids[row] for row in rows),
            original_labels=tuple(self.original_labels[row] for row in rows),
            new_labels=tuple(self.new_labels[row] for row in rows),
        )

    def make_trigger(self) -> Trigger:
        """The trigger as test samples show it.

        Raises UnknownMethodError, ConfigError when the manifest names what this version does not have.
        """
        trigger = make_trigger(self.trigger, self.config)
        check_labelled(self.trigger)
        check_mode(self.trigger, trigger, self.mode)
        return trigger

    def attack_labels(self, labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """What the attacker wants for triggered samples of the true ``labels``: the target, or the next class."""
        if self.all_to_all:
            return (labels + 1) % len(self.class_names)
        return np.full_like(labels, self.target)

    def save(self, path: Path) -> None:
        """Write the manifest as one JSON object."""
        body = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION} | self.body()
        write_atomically(path, msgspec.json.format(msgspec.json.encode(body), indent=2))

    @classmethod
    def load(cls, path: Path) -> Poisoning:
        """Raises ResultError for a file that is not a manifest, SchemaVersionError, LabelRangeError."""
        body = read_body(path, SCHEMA, SCHEMA_VERSION)
        try:
            poisoning = msgspec.convert(body, cls)
        except msgspec.ValidationError as error:
            raise ResultError(f"{path}: {error}.", hint="Plan the poisoning again.") from error
        poisoning.make_trigger()
        return poisoning

    def body(self) -> dict[str, Any]:
        """The manifest's entries but its schema."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def read_body(path: Path, schema: str, version: int) -> dict[str, Any]:
    """The entries of a manifest but its schema. Raises ResultError for another file, SchemaVersionError."""
    try:
        body = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: not a readable manifest ({error}).", hint="Give a manifest.json.") from error
    found = body.pop("schema", None) if isinstance(body, dict) else type(body).__name__
    if found != schema:
        raise ResultError(
            f"{path}: expected {schema}, found {found}.",
            hint="Give the manifest.json that `unpoison attack` wrote.",
        )
    there = body.pop("schema_version", None)
    if there != version:
        raise SchemaVersionError(
            f"{path}: schema version {there}, this version reads {version}.",
            hint="Plan the poisoning again with this version, or install the version that wrote the file.",
        )
    return body


def check_labelled(name: str) -> None:
    """Raises ConfigError for a trigger that changes captions alone."""
    if name in PAIR_TRIGGERS:
        raise ConfigError(
            f"{name} poisons image-caption pairs, not labelled images.", hint="Plan it with plan_pair_poisoning."
        )


def check_mode(name: str, trigger: Trigger, mode: str) -> None:
    """Raises ConfigError for a labeling that the trigger cannot be used with."""
    if mode not in trigger.modes:
        raise ConfigError(f"{name} has no mode {mode!r}.", hint=f"Its modes: {', '.join(trigger.modes)}.")
