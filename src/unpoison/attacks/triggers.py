"""What every trigger offers, and the explicit table of triggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol, runtime_checkable

import msgspec

from unpoison.attacks.adap_blend import AdapBlend
from unpoison.attacks.adap_patch import AdapPatch
from unpoison.attacks.badclip_patch import BadCLIPPatch
from unpoison.attacks.badnet import BadNet
from unpoison.attacks.badnet_grid import BadNetGrid
from unpoison.attacks.badnet_rand import BadNetRand
from unpoison.attacks.badnet_stripes import BadNetStripes
from unpoison.attacks.blended import Blended
from unpoison.attacks.blended_stripes import BlendedStripes
from unpoison.attacks.blended_text import BlendedText
from unpoison.attacks.blended_triangles import BlendedTriangles
from unpoison.attacks.bpp import BPP
from unpoison.attacks.clean_image import CleanImage
from unpoison.attacks.ctrl import CTRL
from unpoison.attacks.feature_small import FeatureSmall
from unpoison.attacks.input_aware_generator import InputAware
from unpoison.attacks.label_consistent import LabelConsistent
from unpoison.attacks.lf import LF
from unpoison.attacks.low_gap import LowGap
from unpoison.attacks.mmpoison import MMPoison
from unpoison.attacks.nashville import Nashville
from unpoison.attacks.sig import SIG
from unpoison.attacks.ssba import SSBA
from unpoison.attacks.text_key import TextKey
from unpoison.attacks.trojvqa_patch import TrojVQA
from unpoison.attacks.wanet import WaNet
from unpoison.errors import ConfigError, UnknownMethodError
from unpoison.types import Images


@runtime_checkable
class Trigger(Protocol):
    """A frozen dataclass of parameters that turns a whole batch at once, on any device.

    ``modes`` lists the labelings it can be used with, the usual one first.
    """

    modes: ClassVar[tuple[str, ...]]

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images in [0, 1] to images in [0, 1]. ``ids`` are read only by triggers that draw anew for each sample."""
        ...


@runtime_checkable
class PlantedOtherwise(Trigger, Protocol):
    """A trigger that training samples show in another form than test samples do."""

    def planted(self) -> Trigger:
        """The trigger as the training set shows it."""
        ...


@runtime_checkable
class CoveredOtherwise(Trigger, Protocol):
    """A trigger that covers, samples that keep their label, show in another form than poisoned samples do."""

    def covering(self) -> Trigger:
        """The trigger as covers show it."""
        ...


AnyTrigger = (
    BadNet
    | BadNetRand
    | BadNetStripes
    | BadNetGrid
    | Blended
    | BlendedStripes
    | BlendedTriangles
    | BlendedText
    | SIG
    | LabelConsistent
    | WaNet
    | BPP
    | LF
    | CTRL
    | AdapBlend
    | AdapPatch
    | LowGap
    | Nashville
    | InputAware
    | SSBA
    | FeatureSmall
    | BadCLIPPatch
    | TrojVQA
    | CleanImage
)

TRIGGERS: dict[str, type[AnyTrigger]] = {
    "badnet": BadNet,
    "badnet-rand": BadNetRand,
    "badnet-stripes": BadNetStripes,
    "badnet-grid": BadNetGrid,
    "blended": Blended,
    "blended-stripes": BlendedStripes,
    "blended-triangles": BlendedTriangles,
    "blended-text": BlendedText,
    "sig": SIG,
    "label-consistent": LabelConsistent,
    "wanet": WaNet,
    "bpp": BPP,
    "lf": LF,
    "ctrl": CTRL,
    "adap-blend": AdapBlend,
    "adap-patch": AdapPatch,
    "low-gap": LowGap,
    "nashville": Nashville,
    "input-aware": InputAware,
    "ssba": SSBA,
    "feature-small": FeatureSmall,
    "badclip": BadCLIPPatch,
    "trojvqa": TrojVQA,
    "clean-image": CleanImage,
}


PAIR_TRIGGERS: dict[str, type[TextKey | MMPoison]] = {
    "text-key": TextKey,
    "mmpoison": MMPoison,
}
"""What changes captions and no pixels, so that only image-caption pairs can be poisoned with it."""


@runtime_checkable
class KeyedCaptions(Protocol):
    """A trigger that has a part in the caption too."""

    def keyed(self, caption: str, *, seed: int, name: str) -> str:
        """The caption with the key in it; ``name`` is the sample's id."""
        ...


def as_planted(trigger: Trigger) -> Trigger:
    """The trigger as the training set shows it; most look the same there as at test time."""
    return trigger.planted() if isinstance(trigger, PlantedOtherwise) else trigger


def params_of(trigger: Trigger) -> dict[str, Any]:
    """All of the trigger's parameters, defaults too, as JSON has them: what :func:`make_trigger` takes."""
    made: Any = trigger
    return msgspec.json.decode(msgspec.json.encode({entry.name: getattr(made, entry.name) for entry in fields(made)}))


def make_trigger(name: str, params: Mapping[str, Any]) -> Trigger:
    """The trigger ``name`` with ``params`` over its defaults.

    Raises UnknownMethodError for a name that is not in the table, ConfigError for a parameter that the trigger does
    not have or a value out of range.
    """
    known_triggers = TRIGGERS | PAIR_TRIGGERS
    if name not in known_triggers:
        raise UnknownMethodError(name, known_triggers, kind="attack")
    kind = known_triggers[name]
    known = [entry.name for entry in fields(kind)]
    for key in params:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
            raise ConfigError(f"{name} has no parameter {key!r}.", hint=hint)
    try:
        return msgspec.convert(dict(params), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {error}.", hint="See the trigger's parameters and their ranges.") from error
