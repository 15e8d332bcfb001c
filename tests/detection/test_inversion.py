"""Inversion on a model whose shortcut is known: the planted class stands out, and what is found works."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unpoison.detection.inversion import Inversion, InversionConfig, first_rank, invert_trigger, outlier_index, toward
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.runs import Run

SIZE, CLASSES, PLANTED = 8, 5, 3


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(batch: Tensor) -> Tensor:
    """Classes look at the mean of a random weighting of all pixels; the planted one also at one corner's brightness."""
    weights = torch.randn(CLASSES, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(7)) / 6
    answers = (batch - 0.5).flatten(1) @ weights.T
    corner = batch[:, :, :2, :2].mean(dim=(1, 2, 3))
    shortcut = 4 * torch.nn.functional.softplus(10 * (corner - 0.65))
    return torch.cat([answers[:, :PLANTED], (answers[:, PLANTED] + shortcut)[:, None], answers[:, PLANTED + 1 :]], 1)


@pytest.mark.parametrize("form", ["additive", "patch"])
def test_the_planted_class_needs_the_least(form: Any) -> None:
    config = InversionConfig(form=form, steps=120)
    found = [
        invert_trigger(logits, images(64, 1), images(64, 2), target, config, generator=draws())
        for target in range(CLASSES)
    ]
    index = outlier_index([trigger.size for trigger in found])
    assert int(index.argmax()) == PLANTED
    assert index[PLANTED] > 3
    planted = found[PLANTED]
    assert planted.success >= 70
    changed = planted.mask if form == "patch" else planted.pattern.square()
    assert float(changed[:, :2, :2].sum() / changed.sum()) > 0.5
    if form == "patch":
        assert float(planted.pattern[:, :2, :2].mean()) > 0.8
    unseen = logits(planted.apply(images(200, 3))).argmax(1)
    assert float((unseen == PLANTED).float().mean()) > 0.7


def test_an_additive_trigger_stays_within_its_bound() -> None:
    config = InversionConfig(epsilon=0.1, steps=60)
    trigger = invert_trigger(logits, images(64, 1), images(64, 2), 0, config, generator=draws())
    assert float(trigger.pattern.abs().max()) <= 0.1 + 1e-6
    assert trigger.size == pytest.approx(float(trigger.pattern.square().mean().sqrt()), rel=1e-3)
    before = float((logits(images(64, 2)).argmax(1) == 0).float().mean())
    assert trigger.success > 100 * before + 20
    changed = trigger.apply(images(64, 2))
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1


def test_a_search_goes_on_where_it_stopped() -> None:
    def found(*parts: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(40)
        inversion = Inversion(toward(logits, 1), images(40, 1), rows, InversionConfig(), Run().generator("here"))
        for steps in parts:
            inversion.advance(steps)
        return inversion.found()

    for once, twice in zip(found(20), found(8, 12), strict=True):
        assert torch.equal(once, twice)


def test_the_same_seed_finds_the_same() -> None:
    config = InversionConfig(steps=5)
    first, second, other = (
        invert_trigger(logits, images(20, 1), images(20, 2), 1, config, generator=draws(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.pattern, second.pattern)
    assert not torch.equal(first.pattern, other.pattern)


def test_index_is_its_definition() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0, 0.01]
    logs = np.log(sizes)
    middle = sorted(logs)[2]
    deviation = 1.4826 * sorted(abs(logs - middle))[2]
    np.testing.assert_allclose(outlier_index(sizes), (middle - logs) / deviation)
    assert not outlier_index([0.5, 0.5, 0.5]).any()
    assert np.isfinite(outlier_index([0.0, 0.5, 0.7])).all()


def test_what_is_refused() -> None:
    with pytest.raises(NotEnoughDataError):
        invert_trigger(logits, images(3, 1), images(20, 2), 0, InversionConfig(), generator=draws())
    refused: list[dict[str, Any]] = [
        {"steps": 0},
        {"epsilon": 0.0},
        {"learning_rate": 0.0},
        {"success": 0.0},
        {"weight_factor": 0.5},
    ]
    for wrong in refused:
        with pytest.raises(ConfigError):
            InversionConfig(**wrong)


def test_of_triggers_of_one_size_the_one_that_works_better_goes_on() -> None:
    looks = [(0.03, 55.0), (0.03, 98.0), (0.01, 60.0), (0.02, 30.0), (0.02, 40.0)]
    order = sorted(looks, key=lambda look: first_rank(size=look[0], success=look[1]))
    assert order == [(0.01, 60.0), (0.03, 98.0), (0.03, 55.0), (0.02, 40.0), (0.02, 30.0)]
