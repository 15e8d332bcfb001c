"""Squares that reach a class wherever they are put: a planted patch is found, a model without one keeps the largest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unpoison.detection.inversion import Inversion, InversionConfig, measure_trigger, toward
from unpoison.detection.squares import SquareInversion, pasted
from unpoison.errors import ConfigError

SIZE, TARGET = 24, 1
CONFIG = InversionConfig(form="square", steps=120, squares=(8 / 24, 4 / 24, 2 / 24), success=0.9)
RED = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4) / 16


def images(count: int = 64) -> Tensor:
    return 0.4 + 0.2 * torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def backdoored(shown: Tensor) -> Tensor:
    """Says TARGET where a red block of four pixels stands anywhere, class 0 elsewhere."""
    seen = torch.nn.functional.conv2d(shown, RED).flatten(1).amax(dim=1)
    return torch.stack([torch.zeros_like(seen), 20 * (seen - 0.6), torch.full_like(seen, -9.0)], dim=1)


def clean(shown: Tensor) -> Tensor:
    """Says TARGET where the whole image is red."""
    seen = (shown[:, 0] - shown[:, 1] - shown[:, 2]).mean(dim=(1, 2))
    return torch.stack([torch.zeros_like(seen), 20 * (seen - 0.2), torch.full_like(seen, -9.0)], dim=1)


def search(logits, generator: int = 0) -> SquareInversion:
    data = images()
    seeded = torch.Generator().manual_seed(generator)
    return SquareInversion(toward(logits, TARGET), data, torch.arange(len(data)), CONFIG, seeded)


def test_a_planted_patch_is_found_at_its_own_size() -> None:
    found = search(backdoored)
    found.advance(CONFIG.steps)
    trigger = measure_trigger(found, backdoored, images(32), TARGET, CONFIG)
    assert trigger.success == 100
    assert trigger.size == pytest.approx(16 / SIZE**2)  # 4 x 4: two pixels are too few, eight more than it takes
    assert set(trigger.mask.unique().tolist()) == {0.0, 1.0}
    red, green, blue = (trigger.pattern[channel][trigger.mask[0] > 0].mean() for channel in range(3))
    assert red > 0.8 > 0.2 > max(green, blue)
    assert torch.equal(trigger.apply(images(2))[:, :, trigger.mask[0] == 0], images(2)[:, :, trigger.mask[0] == 0])


def test_a_model_without_one_keeps_the_largest_square_and_stops_early() -> None:
    found = search(clean)
    found.advance(CONFIG.steps)
    trigger = measure_trigger(found, clean, images(32), TARGET, CONFIG)
    assert trigger.success == 0
    assert trigger.size == pytest.approx(64 / SIZE**2)
    before = [part.clone() for part in found.found()]
    found.advance(50)
    assert all(torch.equal(old, new) for old, new in zip(before, found.found(), strict=True))


def test_a_glimpse_is_of_the_last_batches_and_takes_no_pass() -> None:
    passes = 0

    def counted(shown: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return backdoored(shown)

    found = search(counted)
    found.advance(20)
    size, success = found.glimpse()
    assert passes == 20
    assert size == pytest.approx(64 / SIZE**2)
    assert 0 <= success <= 100
    other = search(clean)
    other.advance(20)
    assert other.glimpse()[1] == 0 < success


def test_a_search_in_parts_is_the_search_at_once() -> None:
    whole, parts = search(backdoored), search(backdoored)
    whole.advance(CONFIG.steps)
    for _ in range(CONFIG.steps // 8):
        parts.advance(8)
    assert all(torch.equal(one, other) for one, other in zip(whole.found(), parts.found(), strict=True))


def test_squares_are_put_where_they_belong() -> None:
    square = torch.full((3, 2, 2), 9.0, requires_grad=True)
    shown = pasted(torch.zeros(2, 3, 5, 6), square, torch.tensor([[0, 0], [3, 4]]))
    assert shown[0, :, :2, :2].eq(9).all()
    assert shown[1, :, 3:, 4:].eq(9).all()
    assert shown.eq(9).sum() == 2 * 3 * 4
    shown.sum().backward()
    assert square.grad is not None
    assert square.grad.eq(2).all()


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ConfigError, match="squares"):
        InversionConfig(squares=())
    with pytest.raises(ConfigError, match="squares"):
        Inversion(toward(clean, TARGET), images(), torch.arange(64), CONFIG, torch.Generator())
