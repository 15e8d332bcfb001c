"""The manifest of a poisoning of image-caption pairs: the ground truth of an experiment, one JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.manifest import Poisoning, check_mode, read_body
from unpoison.attacks.selection import RANDOM
from unpoison.attacks.triggers import Trigger, as_planted, make_trigger
from unpoison.errors import ConfigError, ResultError
from unpoison.results import write_atomically
from unpoison.types import Images

SCHEMA = "unpoison/pair-poisoning"
SCHEMA_VERSION = 1
MODES = ("all-to-one", "clean-label", "text-key", "mismatch")
CAPTIONS = ("templates", "natural", "aligned")
OTHERS = "others"
"""Where the captions of a text key come from: images of other things."""
LARGEST_SIZE = 4096
Triggered = Float[Tensor, "b 3 s s"]


@dataclass(frozen=True, kw_only=True)
class Squashed:
    """A trigger put on images that are first squashed to ``size`` x ``size`` pixels (bicubic)."""

    trigger: Trigger
    size: int

    modes: ClassVar[tuple[str, ...]] = MODES

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Triggered:
        """Images [b, 3, h, w] in [0, 1] to triggered images [b, 3, size, size]."""
        if tuple(images.shape[-2:]) != (self.size, self.size) and len(images):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return self.trigger.apply(images, seed=seed, ids=ids)

    def planted(self) -> Squashed:
        """The same with the trigger as the training set shows it."""
        return Squashed(trigger=as_planted(self.trigger), size=self.size)


@dataclass(frozen=True, kw_only=True)
class PairPoisoning:
    """The manifest. ``rate`` is the share of all pairs, in (0, 1]. Image ``ids[i]`` gets ``new_captions[i]`` in
    the place of all its captions.

    ``mode``: all-to-one (images whose captions do not name the target get trigger and target caption), clean-label
    (images whose captions name it get the trigger and keep them; ``new_captions`` is empty), text-key (images whose
    captions name it get captions of others with the key) or mismatch (images of another thing get captions of the
    target). ``captions``: templates, natural, aligned (natural, each the closest to its image by the CLIP whose
    fingerprint is ``aligned_by``) or, with a text key, others. ``size``: images are squashed to this many pixels
    before the trigger; None leaves them as they are. ``selection`` and ``selected_by`` as in :class:`Poisoning`.
    """

    trigger: str
    config: dict[str, Any]
    seed: int
    mode: str
    target_name: str
    captions: str
    rate: float
    size: int | None
    ids: tuple[str, ...]
    new_captions: tuple[str, ...]
    source: str
    source_size: int
    source_fingerprint: str
    aligned_by: str = ""
    selection: str = RANDOM
    selected_by: str = ""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        wanted = 0 if self.mode == "clean-label" else len(self.ids)
        if len(self.new_captions) != wanted or len(set(self.ids)) != len(self.ids):
            raise ResultError(
                f"poisoning: {len(self.ids)} ids ({len(set(self.ids))} different) and {len(self.new_captions)} new "
                f"captions; expected different ids and {wanted} captions.",
                hint="Plan the poisoning again.",
            )
        if not all(caption.strip() for caption in self.new_captions):
            raise ResultError("poisoning: a new caption is empty.", hint="Plan the poisoning again.")
        check_choice("captions", self.captions, (OTHERS,) if self.mode == "text-key" else CAPTIONS)
        if not self.target_name.strip():
            raise ConfigError("the target is empty.", hint="Give a word or a few, such as 'banana'.")
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate must be in (0, 1], got {self.rate}.", hint="The paper's is 0.003.")
        if self.size is not None and not 1 <= self.size <= LARGEST_SIZE:
            raise ConfigError(
                f"size must be 1 to {LARGEST_SIZE} pixels, got {self.size}.", hint="Give the model's image size."
            )
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}.", hint="Use 0, 1, 2, ...")

    def make_trigger(self) -> Trigger:
        """The trigger as it is put on images of any size.

        Raises UnknownMethodError, ConfigError when the manifest names what this version does not have.
        """
        trigger = make_trigger(self.trigger, self.config)
        check_mode(self.trigger, trigger, self.mode)
        return trigger if self.size is None else Squashed(trigger=trigger, size=self.size)

    def save(self, path: Path) -> None:
        """Write the manifest as one JSON object."""
        body = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION} | self.body()
        write_atomically(path, msgspec.json.format(msgspec.json.encode(body), indent=2))

    @classmethod
    def load(cls, path: Path) -> PairPoisoning:
        """Raises ResultError for a file that is not such a manifest, SchemaVersionError, ConfigError."""
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


def load_poisoning(path: Path) -> Poisoning | PairPoisoning:
    """The manifest of labelled images or of pairs, whichever the file holds. Raises as their ``load`` does."""
    try:
        head = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Poisoning.load(path)  # says what is wrong
    of_pairs = isinstance(head, dict) and head.get("schema") == SCHEMA
    return PairPoisoning.load(path) if of_pairs else Poisoning.load(path)


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Raises ConfigError for a value that is none of ``known``."""
    if value not in known:
        raise ConfigError(f"{what} must be one of {', '.join(known)}, got {value!r}.", hint=f"Use {known[0]!r}.")
