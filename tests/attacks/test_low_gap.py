"""Low-gap: strengths of each sample's own, fitted so that early losses of poison are those of clean samples."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from unpoison.attacks.blended import noise
from unpoison.attacks.low_gap import LowGap
from unpoison.attacks.low_gap_fit import LowGapConfig, fit_low_gap, gap, nearest
from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.poison import plan_poisoning
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError, NotEnoughDataError, UsageError
from unpoison.runs import Run

SOURCE = open_images("shapes:240:4")
CONFIG = LowGapConfig(epochs=3, rounds=1, grid=3)


def test_each_training_sample_has_a_strength_of_its_own_and_test_samples_have_one() -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    trigger = LowGap(weakest=0.1, strongest=0.3, strengths={"b": 0.05})
    planted, pattern = trigger.planted(), noise(7, 8, 8).numpy()
    alphas = planted.alphas(7, ["a", "b", "c"], 3).numpy()
    assert alphas[1] == pytest.approx(0.05)
    assert ((alphas[[0, 2]] >= 0.1) & (alphas[[0, 2]] <= 0.3)).all()
    assert alphas[0] != alphas[2]
    mixed = planted.apply(images, seed=7, ids=["a", "b", "c"]).numpy()
    weight = alphas[:, None, None, None]
    assert np.allclose(mixed, (1 - weight) * images.numpy() + weight * pattern, atol=1e-6)
    shown = trigger.apply(images, seed=7).numpy()
    assert np.allclose(shown, 0.8 * images.numpy() + 0.2 * pattern, atol=1e-6)
    with pytest.raises(UsageError):
        planted.apply(images, seed=7)


def test_samples_take_the_strength_whose_loss_is_nearest_to_a_clean_one() -> None:
    clean = np.linspace(0, 4, 401)
    shown = np.array([[0.4, 0.1, 0.0], [3.0, 2.4, 0.2], [3.9, 3.5, 1.0]])
    # the aims are the quantiles 1/6, 1/2, 5/6 of the clean losses: 0.67, 2, 3.33, in the order of the loss as planted
    assert nearest(shown, np.array([0.1, 0.2, 1.0]), clean).tolist() == [0, 1, 1]
    assert nearest(shown, np.array([1.0, 0.2, 0.1]), clean).tolist() == [0, 1, 2]


def test_the_gap_is_how_far_the_order_of_losses_tells_poison() -> None:
    losses = np.array([0.1, 0.2, 1.0, 2.0])
    assert gap(losses, np.array([0, 1]), np.array([2, 3])) == 0.5
    assert gap(losses, np.array([2, 3]), np.array([0, 1])) == 0.5
    assert gap(losses, np.array([0, 3]), np.array([1, 2])) == 0.0


@pytest.fixture(scope="module")
def plan() -> Poisoning:
    return plan_poisoning(SOURCE, "low-gap", rate=0.2, target=2, weakest=0.02, strongest=0.5, cover=0.5)


def test_fitted_strengths_are_those_of_relabelled_samples_and_the_least_gap_is_kept(plan: Poisoning) -> None:
    fitted = fit_low_gap(SOURCE, plan, CONFIG, run=Run(seed=1))
    assert len(fitted.gaps) == 2
    assert all(0 <= found <= 0.5 for found in fitted.gaps)
    if fitted.gaps[1] < fitted.gaps[0]:
        strengths = fitted.poisoning.config["strengths"]
        assert set(strengths) == set(plan.ids) - set(plan.covers)
        assert set(strengths.values()) <= {0.02, 0.26, 0.5}
        assert replace(fitted.poisoning, config=plan.config) == plan
    else:
        assert fitted.poisoning == plan
    assert fit_low_gap(SOURCE, plan, CONFIG, run=Run(seed=1)) == fitted


def test_refusals(plan: Poisoning) -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"alpha": 0.0}, {"weakest": 0.3}, {"cover": 1.0}, {"strengths": {"a": 0.0}},
    )  # fmt: skip
    for bad in refused:
        with pytest.raises(ConfigError, match="low-gap"):
            LowGap(**bad)
    unfit: tuple[dict[str, Any], ...] = ({"rounds": 0}, {"grid": 1}, {"learning_rate": float("nan")})
    for bad in unfit:
        with pytest.raises(ConfigError):
            LowGapConfig(**bad)
    with pytest.raises(ConfigError, match="expected a poisoning of low-gap, got badnet"):
        fit_low_gap(SOURCE, plan_poisoning(SOURCE, "badnet", rate=0.1), CONFIG, run=Run())
    few = SOURCE.select(np.flatnonzero(SOURCE.labels != 2))
    with pytest.raises(NotEnoughDataError, match="clean samples of the target class"):
        fit_low_gap(few, plan_poisoning(few, "low-gap", rate=0.2, target=2), replace(CONFIG, epochs=1), run=Run())
