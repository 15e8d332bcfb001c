"""``scan_model`` within a budget: time is counted in forward passes, which is what a scan is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from unpoison.api_models import ModelScanConfig, scan_model
from unpoison.data.shapes import SHAPES_CLASSES
from unpoison.data.sources import open_images
from unpoison.detection.canaries import CanaryConfig
from unpoison.detection.class_search import ClassSearchConfig
from unpoison.detection.inversion import InversionConfig
from unpoison.detection.model_weights import WeightsConfig
from unpoison.model_results import DataVerdict
from unpoison.models.any_model import AnyModel
from unpoison.models.classifier import new_classifier, save_classifier
from unpoison.planning import Plan, PlannedStep
from unpoison.runs import Run

NAMES = SHAPES_CLASSES[:4]
STEPS, FORMS, SLACK = 6, 2, 40
WHOLE = len(NAMES) * FORMS * STEPS
"""Passes of one search, but for those that look at what was found."""
CONFIG = ModelScanConfig(
    weights=WeightsConfig(
        images=64,
        search=ClassSearchConfig(
            forms=("patch", "additive"), steps=STEPS, turn=2, inversion=InversionConfig(batch_size=4)
        ),
    ),
    canaries=CanaryConfig(triggers=("badnet",), rates=(0.1, 0.2), steps=3, batch_size=4, learnt=0.0, agreement=0.0),
)


@dataclass
class Passes:
    """A clock that goes on by one second with each forward pass."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Passes:
    passes, logits = Passes(), AnyModel.logits

    def counted(self: AnyModel, images: torch.Tensor) -> torch.Tensor:
        passes.now += 1
        return logits(self, images)

    monkeypatch.setattr(AnyModel, "logits", counted)
    return passes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A suspect and two references; untrained networks say one thing of all images, so these are made to differ."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        network = new_classifier("small-resnet", NAMES, seed=seed)
        save_classifier(network, folder / str(seed))
    return [folder / str(seed) for seed in range(3)]


def scan(models: list[Path], clock: Passes, tmp_path: Path, budget: float | None, **more):
    return scan_model(
        models[0], images=open_images("shapes:80:3"), references=models[1:], budget=budget, config=CONFIG,
        run=Run(cache=tmp_path), clock=clock, **more,
    ).scan  # fmt: skip


def test_references_take_no_more_than_their_share(models: list[Path], clock: Passes, tmp_path: Path) -> None:
    found = scan(models, clock, tmp_path, 60.0)
    assert clock.now <= 60 + SLACK
    assert found.weights.references == ()
    assert sum("not searched to the end" in warning for warning in found.warnings) == 2
    assert found.weights.covered > 0  # time was left for the model itself
    assert found.seconds == clock.now


def test_references_that_were_finished_count_and_are_kept(models: list[Path], clock: Passes, tmp_path: Path) -> None:
    whole = scan(models, clock, tmp_path, None)
    assert len(whole.weights.references) == 2
    assert clock.now > 2 * WHOLE
    clock.now = 0.0
    again = scan(models, clock, tmp_path, 60.0)  # from the cache they take no time
    assert again.weights.references == whole.weights.references
    assert clock.now <= 60 + SLACK


def test_a_budget_that_is_enough_changes_nothing(models: list[Path], clock: Passes, tmp_path: Path) -> None:
    whole, bounded = (scan(models, clock, tmp_path / str(limit), limit).weights for limit in (None, 1e6))
    assert replace(bounded, seconds=0.0) == replace(whole, seconds=0.0)


@pytest.mark.parametrize("budget", [150.0, 400.0])
def test_canaries_stay_within(models: list[Path], clock: Passes, tmp_path: Path, budget: float) -> None:
    found = scan(models, clock, tmp_path, budget, power=True)
    assert clock.now <= budget + SLACK
    assert found.power is not None
    assert ("There was no time" in found.power.reason) == (len(found.power.canaries) < 2)


def test_data_that_would_take_too_long_are_not_begun(
    models: list[Path], clock: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PlannedStep(what="train", amount=1, unit="images", seconds=600.0)
    plan = Plan(steps=(step,), memory=0, disk=0, files=())
    monkeypatch.setattr("unpoison.api_models.plan_data", lambda *_, **__: plan)
    learnt = open_images("shapes:60:3")
    found = scan(models[:1], clock, tmp_path, 100.0, trained_on=learnt)
    assert found.data.scan is None
    assert "10 min 0 s" in found.data.reason
    assert "unpoison scan dataset" in found.data.reason
    assert found.exit_code != 0
    assert found.weights.covered > 0


def test_data_that_fit_are_scanned_last_and_get_their_time(
    models: list[Path], clock: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PlannedStep(what="train", amount=1, unit="images", seconds=50.0)
    plan = Plan(steps=(step,), memory=0, disk=0, files=())
    begun: list[float] = []

    def watched(*_, **__):
        begun.append(clock.now)
        return DataVerdict(reason="Scanned.", asked=True), None

    monkeypatch.setattr("unpoison.api_models.plan_data", lambda *_, **__: plan)
    monkeypatch.setattr("unpoison.api_models.judge_data", watched)
    found = scan(models[:1], clock, tmp_path, 150.0, trained_on=open_images("shapes:60:3"))
    assert found.data.reason == "Scanned."
    assert 0 < begun[0] <= 100
