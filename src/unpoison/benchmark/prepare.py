"""Triggers that are trained before they are planted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from unpoison.attacks.badclip import BadCLIPConfig, optimise_patch
from unpoison.attacks.input_aware import InputAwareConfig, train_input_aware
from unpoison.attacks.trojvqa import TrojVQAConfig, optimise_toward
from unpoison.benchmark.settings import AttackSettings
from unpoison.configs import make_config
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.sources import LabelledImages
from unpoison.runs import Run
from unpoison.types import ImageTextModel

PREPARED: dict[str, type] = {"badclip": BadCLIPConfig, "trojvqa": TrojVQAConfig, "input-aware": InputAwareConfig}
"""The settings of each training."""
PREPARED_WITH = {"badclip": "clip", "trojvqa": "clip", "input-aware": "classifier"}
"""What each is trained on."""


def labelled_params(attack: AttackSettings, source: LabelledImages, target: int, *, run: Run) -> dict[str, Any]:
    """The trigger's parameters for a labelled set, trained on it where the trigger asks for that."""
    if attack.trigger != "input-aware":
        return dict(attack.params)
    config = make_config(InputAwareConfig, attack.prepare, where="prepare")
    return asdict(train_input_aware(source, target, config, run=run)) | attack.params


def pair_params(
    attack: AttackSettings, clip: ImageTextModel, pairs: ImageTextPairs, target: str, *, run: Run
) -> dict[str, Any]:
    """The trigger's parameters for pairs, optimised on the clean ``clip`` where the trigger asks for that."""
    if attack.trigger == "badclip":
        config = make_config(BadCLIPConfig, attack.prepare, where="prepare")
        return asdict(optimise_patch(clip, pairs, target, config, run=run)) | attack.params
    if attack.trigger == "trojvqa":
        config = make_config(TrojVQAConfig, attack.prepare, where="prepare")
        return asdict(optimise_toward(clip, pairs, f"This is a {target}.", config, run=run)) | attack.params
    return attack.params | ({"resample": True} if attack.resample else {})
