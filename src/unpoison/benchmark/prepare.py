"""What some attacks need before they are planted: a trigger that is trained, an attacker's choice of samples."""

from __future__ import annotations

from typing import Any

from unpoison.attacks.adversarial import AdversarialConfig, perturb_poisoned
from unpoison.attacks.aligned import near_the_captions
from unpoison.attacks.badclip import BadCLIPConfig, optimise_patch
from unpoison.attacks.boundary import near_the_boundary
from unpoison.attacks.feature_small_fit import FeatureSmallConfig, fit_feature_small
from unpoison.attacks.input_aware import InputAwareConfig, train_input_aware
from unpoison.attacks.low_gap_fit import LowGapConfig, fit_low_gap
from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.pairs import who_names
from unpoison.attacks.parts import Part
from unpoison.attacks.selection import RANDOM, Selection
from unpoison.attacks.through_par import ThroughPARConfig, optimise_through_par
from unpoison.attacks.triggers import params_of
from unpoison.attacks.trojvqa import TrojVQAConfig, optimise_toward
from unpoison.benchmark.settings import AttackSettings, FurtherPart
from unpoison.configs import make_config
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.sources import LabelledImages
from unpoison.models.clip_files import load_any_clip
from unpoison.runs import Run
from unpoison.types import Classifier, ImageTextModel

PREPARED: dict[str, type] = {
    "badclip": BadCLIPConfig, "trojvqa": TrojVQAConfig, "feature-small": FeatureSmallConfig,
    "input-aware": InputAwareConfig, "low-gap": LowGapConfig, "label-consistent": AdversarialConfig,
}  # fmt: skip
"""The settings of each training."""
PREPARED_WITH = {
    "badclip": "clip", "trojvqa": "clip", "feature-small": "clip", "input-aware": "classifier", "low-gap": "classifier",
}  # fmt: skip
"""What each is trained on."""
PERTURBED = "label-consistent"
"""The trigger whose samples are perturbed first, for classifiers."""
THROUGH_PAR = "badclip"
"""The trigger that can be trained through PAR."""
SELECTED_WITH = {"boundary": "classifier", "captions": "clip"}
"""For which kind of model each choice is."""


def training_of(attack: AttackSettings) -> type | None:
    """The settings of the training that comes first; None where there is none."""
    return ThroughPARConfig if attack.through_par else PREPARED.get(attack.trigger)


def _config(attack: AttackSettings) -> Any:
    kind = training_of(attack)
    return None if kind is None else make_config(kind, attack.prepare, where="prepare")


def labelled_params(attack: AttackSettings, source: LabelledImages, target: int, *, run: Run) -> dict[str, Any]:
    """The trigger's parameters for a labelled set, trained on it where the trigger asks for that."""
    start: dict[str, Any] = {}
    if attack.trigger == "input-aware":
        start = params_of(train_input_aware(source, target, _config(attack), run=run))
    return start | attack.params | ({"resample": True} if attack.resample else {})


def further_part(part: FurtherPart, target: int | str, **options: Any) -> Part:
    """A second backdoor as planning takes it; its trigger is not trained."""
    resample = {"resample": True} if part.resample else {}
    return Part(
        trigger=part.trigger, target=target, rate=part.rate,
        options={"mode": part.mode, **options, **part.params, **resample},
    )  # fmt: skip


def labelled_selection(
    attack: AttackSettings, source: LabelledImages, target: int, clip: str, *, run: Run
) -> Selection | None:
    """The attacker's choice of samples, by the CLIP of that name; None for a random one."""
    if attack.select == RANDOM:
        return None
    return near_the_boundary(source, load_any_clip(clip), target, run=run)


def fitted(attack: AttackSettings, source: LabelledImages, poisoning: Poisoning, *, run: Run) -> Poisoning:
    """The poisoning with what is fitted to the samples that were chosen."""
    if attack.trigger != "low-gap":
        return poisoning
    return fit_low_gap(source, poisoning, _config(attack), run=run).poisoning


def perturbed_samples(
    attack: AttackSettings, source: LabelledImages, poisoning: Poisoning, surrogate: Classifier
) -> LabelledImages:
    """``source`` with the samples to be poisoned pushed away from their class, as they are decoded."""
    return perturb_poisoned(source, poisoning, surrogate, _config(attack))


def pair_params(
    attack: AttackSettings, clip: ImageTextModel, pairs: ImageTextPairs, target: str, *, run: Run
) -> dict[str, Any]:
    """The trigger's parameters for pairs, optimised on the clean ``clip`` where the trigger asks for that."""
    config, start = _config(attack), {}
    if attack.through_par:
        start = params_of(optimise_through_par(clip, pairs, target, config, run=run))
    elif attack.trigger == "badclip":
        start = params_of(optimise_patch(clip, pairs, target, config, run=run))
    elif attack.trigger == "trojvqa":
        start = params_of(optimise_toward(clip, pairs, target, config, run=run))
    elif attack.trigger == "feature-small":
        start = params_of(fit_feature_small(clip, pairs, config, run=run))
    return start | attack.params | ({"resample": True} if attack.resample else {})


def pair_selection(
    attack: AttackSettings, clip: ImageTextModel, pairs: ImageTextPairs, captioned: ImageTextPairs | None, target: str,
    *, run: Run,
) -> Selection | None:  # fmt: skip
    """The attacker's choice of images, nearest to real captions of the target; None for a random one."""
    if attack.select == RANDOM:
        return None
    return near_the_captions(pairs, who_names(pairs if captioned is None else captioned, target)[1], clip, run=run)
