"""Input-aware: the terms of the loss against NumPy, the trained trigger, and weights that strangers wrote."""

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from unpoison.attacks.input_aware import InputAwareConfig, diversity, train_input_aware
from unpoison.attacks.input_aware_generator import InputAware, drawn, pattern_and_mask, shapes, triggered
from unpoison.attacks.poison import plan_poisoning
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError, DivergedError, LabelRangeError, NotEnoughDataError
from unpoison.runs import Run, Silent

SOURCE = open_images("shapes:96:2")
CONFIG = InputAwareConfig(epochs=4, batch_size=32, learning_rate=0.01)


def pictures(count: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def packed(weights: dict[str, Tensor]) -> str:
    return base64.b64encode(save(weights)).decode()


class Losses(Silent):
    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, message: str) -> None:
        if "loss" in message:
            self.values.append(float(message.rsplit(" ", 1)[1]))


@pytest.mark.parametrize("size", [(32, 32), (48, 20)])
def test_each_image_gets_its_own_pattern_where_its_mask_is(size: tuple[int, int]) -> None:
    images = pictures(4, size)
    pattern, mask = pattern_and_mask(images.double(), {name: value.double() for name, value in drawn(5).items()})
    assert mask.shape == (4, 1, *size)
    assert 0 <= mask.min() <= mask.max() <= 1
    expected = images.numpy() + mask.numpy() * (pattern.numpy() - images.numpy())
    assert np.allclose(InputAware().apply(images, seed=5).numpy(), expected, atol=1e-6)
    assert not torch.allclose(pattern[0], pattern[1])
    assert sum(value.numel() for value in drawn(5).values()) == 15_380


def test_gradients_flow_to_images_and_weights() -> None:
    images = pictures(2).requires_grad_()
    weights = {name: value.clone().requires_grad_() for name, value in drawn(0).items()}
    triggered(images, weights).square().sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.9
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in weights.values())


def test_diversity_is_the_ratio_of_distances() -> None:
    images, patterns = pictures(5), pictures(5).flip(0) * 0.5
    total = 0.0
    for row in range(5):
        near = [float(np.sqrt(((x[row] - x[row - 1]) ** 2).mean())) for x in (images.numpy(), patterns.numpy())]
        total += near[0] / (near[1] + 1e-3)
    assert float(diversity(images, patterns)) == pytest.approx(total / 5, rel=1e-4)
    assert torch.isfinite(diversity(images, torch.zeros_like(images)))


def test_training_lowers_the_loss_and_gives_small_masks() -> None:
    progress = Losses()
    trigger = train_input_aware(SOURCE, 3, CONFIG, run=Run(seed=1, progress=progress))
    assert len(progress.values) == 4
    assert progress.values[-1] < 0.8 * progress.values[0]
    assert trigger == train_input_aware(SOURCE, 3, CONFIG, run=Run(seed=1))
    assert trigger != train_input_aware(SOURCE, 3, CONFIG, run=Run(seed=2))
    images = pictures(6)
    turned = trigger.apply(images)
    assert not torch.equal(turned, images)
    plan = plan_poisoning(SOURCE, "input-aware", rate=0.1, target=3, weights=trigger.weights)
    assert plan.make_trigger() == trigger
    assert len(trigger.weights) < 50_000


def test_refusals() -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"epochs": 0}, {"batch_size": 3}, {"attacked": 0.6, "crossed": 0.5}, {"diversity": float("nan")},
    )  # fmt: skip
    for bad in refused:
        with pytest.raises(ConfigError):
            replace(CONFIG, **bad)
    with pytest.raises(LabelRangeError, match="target 99"):
        train_input_aware(SOURCE, 99, CONFIG, run=Run())
    with pytest.raises(NotEnoughDataError, match="have 3, need at least 4"):
        train_input_aware(SOURCE.select([0, 1, 2]), 0, CONFIG, run=Run())
    with pytest.raises(DivergedError, match="Input-aware diverged"):
        train_input_aware(SOURCE, 0, replace(CONFIG, mask_weight=float("inf")), run=Run())


def test_weights_of_strangers_are_checked() -> None:
    good = {name: torch.zeros(shape) for name, shape in shapes().items()}
    assert InputAware(weights=packed(good)).apply(pictures(1)).isfinite().all()
    bad: list[str] = [
        "!", "AAAA", base64.b64encode(b"\x80\x04pickle").decode(), packed({}),
        packed(good | {"mask.3.bias": torch.zeros(2)}), packed(good | {"mask.3.bias": torch.tensor([float("nan")])}),
        packed({name: value.int() for name, value in good.items()}), packed(good | {"more": torch.zeros(1)}),
    ]  # fmt: skip
    for weights in bad:
        with pytest.raises(ConfigError, match="input-aware") as caught:
            InputAware(weights=weights)
        assert caught.value.hint
