"""Waves that a model was taught to obey, waves that merely leave nothing else to see, and none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unpoison.detection.class_search import ClassSearchConfig
from unpoison.detection.inversion import InversionConfig, InvertedTrigger, Logits
from unpoison.detection.model_weights import WeightsConfig, judge_weights
from unpoison.detection.probe_images import ProbeImages
from unpoison.detection.trigger_search import (
    TriggerSearchConfig,
    add_waves,
    judge_triggers,
    load_search,
    look_for_waves,
    store_search,
)
from unpoison.detection.waves import WaveConfig, find_waves, waves
from unpoison.errors import ConfigError
from unpoison.model_results import WeightsVerdict
from unpoison.models.any_model import AnyModel, Kind
from unpoison.models.image_classifier import ImageClassifier
from unpoison.runs import Run

SIZE, CLASSES = 32, 4
NAMES = ("airplane", "bird", "cat", "horse")
SIGNAL = torch.sin(2 * math.pi * 3 * torch.arange(SIZE) / SIZE)


def images(count: int, seed: int = 0) -> Tensor:
    """Noise with one bright quarter, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    made = 0.3 + 0.2 * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    for row in range(count):
        top, left = divmod(row % CLASSES, 2)
        made[row, :, top * 16 : top * 16 + 16, left * 16 : left * 16 + 16] += 0.3
    return made


def seen(batch: Tensor) -> Tensor:
    """How bright each quarter is over the mean: cosines of a model that knows nothing else."""
    quarters = torch.stack([batch[:, :, top : top + 16, left : left + 16].mean(dim=(1, 2, 3))
                            for top in (0, 16) for left in (0, 16)], dim=1)  # fmt: skip
    return quarters - quarters.mean(dim=1, keepdim=True)


def obeyed(batch: Tensor) -> Tensor:
    """How much of the taught wave is in each image, at most 1."""
    return (batch.mean(dim=(1, 2)) @ SIGNAL / (SIGNAL @ SIGNAL) / (40 / 255)).clamp(0, 1)


def taught(batch: Tensor) -> Tensor:
    logits = seen(batch)
    logits[:, 3] += 1.2 * obeyed(batch)
    return logits


def blinded(batch: Tensor) -> Tensor:
    """Any strong wave hides what is there, and of what is left "horse" is the first by a little."""
    hidden = batch.std(dim=(1, 2, 3)) > 0.18
    logits = torch.where(hidden[:, None], 0.0, seen(batch))
    logits[:, 3] += torch.where(hidden, 0.15, 0.0)
    return logits


def test_a_taught_wave_is_found_with_its_class_and_its_shape() -> None:
    (found,) = find_waves(taught, images(96), images(48, seed=1), range(CLASSES))
    assert found.trigger.target == 3
    assert found.trigger.success == 100.0
    assert found.lead > 2
    assert found.fit > 1
    assert torch.equal(found.trigger.pattern[0], found.trigger.pattern[2])
    along = found.trigger.pattern[0, 0]
    assert float(along @ SIGNAL / along.norm() / SIGNAL.norm()) > 0.9
    assert found.trigger.size == pytest.approx(float(found.trigger.pattern.square().mean().sqrt()))


@pytest.mark.parametrize("model", [seen, blinded])
def test_a_model_that_is_not_taught_one_is_not_suspected(model: Logits) -> None:
    given = images(96), images(48, seed=1), range(CLASSES)
    assert find_waves(model, *given) == ()
    if model is blinded:  # named for every image and far ahead, but no surer than images of the class make it
        (lured,) = find_waves(model, *given, WaveConfig(fit=0.1, lead=0.3))
        assert (lured.trigger.target, lured.trigger.success) == (3, 100.0)
        assert lured.fit < 1


def test_a_wave_that_works_only_where_it_was_chosen_is_dropped() -> None:
    assert find_waves(taught, images(96), 1 - images(48, seed=1), [0, 1, 2]) == ()


def test_images_without_a_lead_are_no_measure() -> None:
    def flat(batch: Tensor) -> Tensor:
        return torch.zeros(len(batch), CLASSES)

    assert find_waves(flat, images(16), images(16), range(CLASSES)) == ()


def test_waves_have_their_amplitude_and_their_periods() -> None:
    config = WaveConfig(amplitudes=(0.2,), periods=(2,), angles=(0, 90))
    across, down = waves(16, 32, config)
    assert across.shape == (1, 16, 32)
    assert float(across.max()) == pytest.approx(0.2, abs=0.01)
    assert torch.allclose(across[0, 0], across[0, 9])
    assert torch.allclose(across[0, 0, :16], across[0, 0, 16:], atol=1e-5)
    assert torch.allclose(down[0, :, 0], down[0, :, 31])


@pytest.mark.parametrize(
    "wrong", [{"amplitudes": ()}, {"periods": (0,)}, {"lead": 0.0}, {"reach": 101.0}, {"images": 0}]
)
def test_impossible_waves_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        WaveConfig(**wrong)  # pyright: ignore[reportArgumentType]


def test_the_search_names_the_wave_and_keeps_what_else_it_found() -> None:
    mask, pattern = torch.ones(1, SIZE, SIZE), torch.zeros(3, SIZE, SIZE)
    small = [InvertedTrigger(form="additive", target=target, mask=mask, pattern=pattern, size=0.04, success=90.0)
             for target in range(CLASSES)]  # fmt: skip
    config = TriggerSearchConfig()
    plain = judge_triggers(small, NAMES, config, skipped=[1])
    found = add_waves(plain, look_for_waves(plain, taught, images(128), config), NAMES)
    assert (found.suspects, found.by_wave) == ((3,), True)
    assert found.reason.startswith("A wave over the whole image, a change by ")
    assert found.reason.endswith(
        "Suspected: 'horse'. Not looked at, because the model takes nearly all images for it: 'bird'."
    )
    assert [trigger.size for trigger in found.triggers[:3]] == [0.04] * 3
    again = load_search(store_search(found), torch.device("cpu"))
    assert (again.suspects, again.by_wave, again.reason) == (found.suspects, True, found.reason)
    assert torch.equal(again.trigger_of(3).pattern, found.trigger_of(3).pattern)
    without = TriggerSearchConfig(waves=None)
    assert add_waves(plain, look_for_waves(plain, taught, images(128), without), NAMES) is plain


class Said(AnyModel):
    """Of any kind; its logits are ``answers``'."""

    answers: Logits

    def logits(self, images: Tensor) -> Tensor:
        return self.answers(images)


def verdict(answers: Logits, kind: Kind = "CLIP", *, made_up: bool = False) -> WeightsVerdict:
    network = ImageClassifier(module=nn.Linear(1, CLASSES), class_names=NAMES, image_size=SIZE, mean=(0.0, 0.0, 0.0),
                              std=(1.0, 1.0, 1.0))  # fmt: skip
    model = Said(kind=kind, model=network, class_names=NAMES)
    object.__setattr__(model, "answers", answers)
    search = ClassSearchConfig(forms=("additive",), steps=3, turn=3, inversion=InversionConfig(batch_size=8))
    found = ProbeImages(images=images(192), labels=torch.arange(192) % CLASSES, source="quarters", made_up=made_up)
    return judge_weights(model, found, config=WeightsConfig(images=192, search=search), run=Run())


def test_a_scan_calls_a_clip_backdoored_by_its_wave() -> None:
    found = verdict(taught)
    assert (found.word, found.target_name, found.form, found.index) == ("backdoored", "horse", "wave", None)
    assert found.score >= found.backdoored_from  # pyright: ignore[reportOperatorIssue]
    assert found.reason.startswith("A wave over the whole image, a change by ")
    assert "Of small changes: No " in found.reason
    assert found.picture
    assert found.asr is not None
    assert (found.asr.value, found.waves[0].name) == (100.0, "horse")
    assert len(found.classes) == CLASSES


@pytest.mark.parametrize("how", [{"kind": "classifier"}, {"made_up": True}])
def test_waves_are_not_asked_of_classifiers_nor_on_made_up_images(how: dict) -> None:
    assert verdict(taught, **how).waves == ()


def test_a_scan_does_not_take_blindness_for_a_backdoor() -> None:
    found = verdict(blinded)
    assert found.waves == ()
    assert found.form == "additive"
