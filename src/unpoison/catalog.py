"""The explicit lists of attacks, detectors and defenses: the only list of names.

Imports nothing heavy: configs and functions are named by import path, ``module:attribute``, and resolved by
:func:`resolve` when they are needed. A new method is one entry here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from unpoison.errors import UnknownMethodError

Kind = Literal["attack", "detector", "defense"]
NEEDS = ("class names", "labelled set", "poisoned training set", "reference CLIP", "victim model")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method. ``needs`` are words of ``NEEDS``; ``protects`` says what is safe to use afterwards (defenses)."""

    name: str
    kind: Kind
    idea: str
    paper: str
    link: str
    needs: tuple[str, ...]
    protects: str = ""
    config: str
    function: str


ATTACKS = (
    Entry(
        name="badnet",
        kind="attack",
        idea="A small checkerboard in the bottom-right corner.",
        paper='Gu et al., "BadNets", 2017',
        link="https://arxiv.org/abs/1708.06733",
        needs=("labelled set",),
        config="unpoison.attacks.badnet:BadNet",
        function="unpoison.attacks.poison:plan_poisoning",
    ),
    Entry(
        name="blended",
        kind="attack",
        idea="A fixed noise pattern mixed into the whole image.",
        paper='Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017',
        link="https://arxiv.org/abs/1712.05526",
        needs=("labelled set",),
        config="unpoison.attacks.blended:Blended",
        function="unpoison.attacks.poison:plan_poisoning",
    ),
    Entry(
        name="sig",
        kind="attack",
        idea="A faint sinusoid on images of the target class; labels stay (clean-label).",
        paper='Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", 2019',
        link="https://arxiv.org/abs/1902.11237",
        needs=("labelled set",),
        config="unpoison.attacks.sig:SIG",
        function="unpoison.attacks.poison:plan_poisoning",
    ),
    Entry(
        name="clean-image",
        kind="attack",
        idea="Only labels change: a natural feature of some images becomes the trigger.",
        paper='Rong et al., "Clean-image Backdoor Attacks", 2024',
        link="https://arxiv.org/abs/2403.15010",
        needs=("labelled set",),
        config="unpoison.attacks.clean_image:CleanImage",
        function="unpoison.attacks.poison:plan_poisoning",
    ),
)

DETECTORS = (
    Entry(
        name="cgd",
        kind="detector",
        idea="Ranks samples by CLIP's disbelief in the label and by how early a fresh network learns it.",
        paper='Xu et al., "CLIP-guided backdoor defense through entropy-based poisoned dataset separation", 2025',
        link="https://arxiv.org/abs/2507.05113",
        needs=("poisoned training set", "reference CLIP", "class names"),
        config="unpoison.defenses.cgd:CGDConfig",
        function="unpoison.api:scan_dataset",
    ),
)

DEFENSES = (
    Entry(
        name="cgd",
        kind="defense",
        idea="Keeps training on the samples found clean and unlearns the suspect ones.",
        paper='Xu et al., "CLIP-guided backdoor defense through entropy-based poisoned dataset separation", 2025',
        link="https://arxiv.org/abs/2507.05113",
        needs=("victim model", "poisoned training set", "reference CLIP", "class names"),
        protects="the classifier's weights",
        config="unpoison.defenses.cgd:CGDConfig",
        function="unpoison.api:purify_with_cgd",
    ),
)


def find(name: str, entries: tuple[Entry, ...]) -> Entry:
    """The entry of this name. Raises UnknownMethodError with the closest name."""
    for entry in entries:
        if entry.name == name:
            return entry
    kind = entries[0].kind if entries else "method"
    raise UnknownMethodError(name, [entry.name for entry in entries], kind=kind)


def resolve(path: str) -> Any:
    """Import what ``module:attribute`` names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
