"""Inversion on a model whose shortcut is known: the planted class stands out, and what is found works."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unpoison.detection.inversion import InversionConfig, invert_trigger, outlier_index
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.runs import Run

SIZE, CLASSES, PLANTED = 8, 5, 3


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def logits(batch: Tensor) -> Tensor:
    """Classes look at the mean of a random weighting of all pixels; the planted one also at one corner's brightness."""
    weights = torch.randn(CLASSES, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(7)) / 6
    answers = (batch - 0.5).flatten(1) @ weights.T
    corner = batch[:, :, :2, :2].mean(dim=(1, 2, 3))
    shortcut = 4 * torch.nn.functional.softplus(10 * (corner - 0.65))
    return torch.cat([answers[:, :PLANTED], (answers[:, PLANTED] + shortcut)[:, None], answers[:, PLANTED + 1 :]], 1)


def test_the_planted_class_has_the_smallest_mask() -> None:
    config = InversionConfig(steps=120)
    found = [
        invert_trigger(logits, images(64, 1), images(64, 2), target, config, run=Run()) for target in range(CLASSES)
    ]
    index = outlier_index([trigger.size for trigger in found])
    assert int(index.argmax()) == PLANTED
    assert index[PLANTED] > 3
    planted = found[PLANTED]
    assert planted.success > 85
    inside = float(planted.mask[:, :2, :2].sum() / planted.mask.sum())
    assert inside > 0.5
    assert float(planted.pattern[:, :2, :2].mean()) > 0.8
    unseen = logits(planted.apply(images(200, 3))).argmax(1)
    assert float((unseen == PLANTED).float().mean()) > 0.8


def test_a_universal_perturbation_stays_within_its_bound() -> None:
    config = InversionConfig(form="universal", epsilon=0.1, steps=60)
    trigger = invert_trigger(logits, images(64, 1), images(64, 2), 0, config, run=Run())
    assert float(trigger.pattern.abs().max()) <= 0.1 + 1e-6
    before = float((logits(images(64, 2)).argmax(1) == 0).float().mean())
    assert trigger.success > 100 * before + 20
    changed = trigger.apply(images(64, 2))
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1


def test_the_same_seed_finds_the_same() -> None:
    config = InversionConfig(steps=5)
    first, second, other = (
        invert_trigger(logits, images(20, 1), images(20, 2), 1, config, run=Run(seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.mask, second.mask)
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
        invert_trigger(logits, images(3, 1), images(20, 2), 0, InversionConfig(), run=Run())
    refused: list[dict[str, Any]] = [{"steps": 0}, {"epsilon": 0.0}, {"success": 0.0}, {"weight_factor": 0.5}]
    for wrong in refused:
        with pytest.raises(ConfigError):
            InversionConfig(**wrong)
