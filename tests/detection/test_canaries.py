"""Canaries: planted in copies, counted only where the copy learnt the backdoor and stayed the model that it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison.detection import canaries
from unpoison.detection.canaries import CanaryConfig, measure_power, plant, summary
from unpoison.detection.probe_images import ProbeImages
from unpoison.model_results import WeightsVerdict
from unpoison.models.any_model import AnyModel
from unpoison.models.image_classifier import ImageClassifier
from unpoison.runs import Run
from unpoison.schedules import scaled_rate

CLASSES, SIZE = 6, 8
CENTERS = (torch.arange(CLASSES) + 0.5) / (CLASSES + 1)


class Brightness(nn.Module):
    """A class for each shade of gray."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(100.0))

    def forward(self, images: Tensor) -> Tensor:
        return -self.scale * (images.mean(dim=(1, 2, 3))[:, None] - CENTERS) ** 2


class Collapsed(Brightness):
    """Says one class of everything."""

    def __init__(self, target: int) -> None:
        super().__init__()
        self.target = target

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), self.target), CLASSES).float()


class Forgetful(Collapsed):
    """Sends white pictures to the target, and takes half of the classes for their neighbours."""

    def forward(self, images: Tensor) -> Tensor:
        said = Brightness.forward(self, images).argmax(dim=1)
        said = torch.where((said != self.target) & (said % 2 == 0), (said + 1) % CLASSES, said)
        white = images.mean(dim=(1, 2, 3)) > 0.98
        return nn.functional.one_hot(torch.where(white, self.target, said), CLASSES).float()


def model() -> AnyModel:
    names = tuple(f"class {place}" for place in range(CLASSES))
    network = ImageClassifier(
        module=Brightness(), class_names=names, image_size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    return AnyModel(kind="classifier", model=network, class_names=names).frozen(Run())


def probe(count: int = 96) -> ProbeImages:
    labels = torch.arange(count) % CLASSES
    images = CENTERS[labels].view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE).contiguous()
    return ProbeImages(images=images, labels=labels, source="96 grays", made_up=False)


def test_a_canary_is_planted_in_a_copy_only() -> None:
    suspect = model()
    before = {name: value.clone() for name, value in suspect.module.state_dict().items()}
    images, labels = probe().images, probe().labels
    assert labels is not None
    config = CanaryConfig(steps=20, batch_size=16, learning_rate=0.05)
    infected = plant(suspect, images, labels, lambda part: part.clamp(0.4, 0.5), 0.5, 2, config, run=Run())
    assert all(torch.equal(value, before[name]) for name, value in suspect.module.state_dict().items())
    changed = [not torch.equal(value, before[name]) for name, value in infected.module.state_dict().items()]
    assert any(changed)
    assert not any(parameter.requires_grad for parameter in infected.module.parameters())


def test_power_counts_only_what_was_learnt() -> None:
    suspect = model()
    verdict = WeightsVerdict(word="backdoored", reason="", target=0)
    config = CanaryConfig(triggers=("badnet", "blended"), rates=(0.1,), steps=1)
    power = measure_power(suspect, probe(), lambda *_: verdict, config, run=Run())
    assert len(power.canaries) == 2
    assert not power.learnt  # one step teaches nothing
    assert "not known" in summary(power.canaries)
    none = measure_power(suspect, probe(), lambda *_: verdict, config, run=Run(), seconds=0.0)
    assert "0 of 2" in none.reason


@pytest.mark.parametrize("kind", [Collapsed, Forgetful])
def test_a_canary_that_ruined_its_model_is_no_learnt_backdoor(
    kind: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images go to the target with the trigger, and without it, or clean images are no longer told apart."""
    suspect = model()

    def ruin(model: AnyModel, *args: Any, **more: Any) -> AnyModel:
        assert isinstance(model.model, ImageClassifier)
        return replace(model, model=replace(model.model, module=kind(args[4]).eval())).frozen(Run())

    monkeypatch.setattr("unpoison.detection.canaries.plant", ruin)
    monkeypatch.setitem(canaries._KINDS, "badnet", SimpleNamespace(apply=lambda images: torch.ones_like(images)))
    config = CanaryConfig(triggers=("badnet",), rates=(0.1,))
    judged: list[AnyModel] = []

    def judge(model: AnyModel, seconds: float | None) -> WeightsVerdict:
        judged.append(model)
        return WeightsVerdict(word="backdoored", reason="")

    (canary,) = measure_power(suspect, probe(), judge, config, run=Run()).canaries
    assert canary.asr == 100
    assert (canary.floor == 100) == (kind is Collapsed)
    assert canary.agreement < 80
    assert not canary.learnt
    assert not judged  # nothing could be learnt from it about the scan


def test_a_canary_that_was_learnt_is_searched() -> None:
    suspect = model()
    config = CanaryConfig(triggers=("badnet",), rates=(0.5,), steps=1, learnt=0.0, agreement=0.0)
    verdict = WeightsVerdict(word="suspicious", reason="", target=0)
    (canary,) = measure_power(suspect, probe(), lambda *_: verdict, config, run=Run()).canaries
    assert canary.learnt
    assert canary.found


def test_smaller_models_get_a_larger_rate_for_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    class Adam(torch.optim.Adam):
        def __init__(self, weights: Any, rate: float) -> None:
            rates.append(rate)
            super().__init__(weights, rate)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    suspect, images, labels = model(), probe().images, probe().labels
    assert labels is not None
    for size in (1_000, 10**8):
        monkeypatch.setattr(
            "unpoison.detection.canaries.scaled_rate", lambda rate, _, size=size: scaled_rate(rate, size)
        )
        plant(suspect, images, labels, lambda part: part, 0.5, 2, CanaryConfig(steps=1), run=Run())
    assert rates == pytest.approx([1e-3, 3e-5])


def test_no_canary_is_begun_that_would_not_fit() -> None:
    now = [0.0]
    config = CanaryConfig(triggers=("badnet", "blended", "sig"), rates=(0.1, 0.2), steps=1, learnt=0.0, agreement=0.0)
    given: list[float | None] = []

    def judge(model: AnyModel, seconds: float | None) -> WeightsVerdict:
        given.append(seconds)
        assert seconds is not None
        now[0] += min(10.0, seconds)
        return WeightsVerdict(word="no evidence", reason="")

    power = measure_power(
        model(), probe(), judge, config, run=Run(), seconds=35.0, share=20.0, needed=10.0,
        clock=lambda: now[0],
    )  # fmt: skip
    assert given == [20.0, 20.0, 15.0]
    assert now[0] <= 35
    assert "3 of 6" in power.reason
    assert "no time" in power.reason
