"""The universal adversary against loops in NumPy, and what it does to a training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from unpoison.defenses.par import PARConfig, repair_with_par
from unpoison.defenses.universal import ADDED, FOUND, NONE, PASTED, WRITTEN, Places, Universal, draw_places
from unpoison.detection.inversion import InvertedTrigger
from unpoison.errors import ConfigError
from unpoison.runs import Run

SIDE, SIZE = 3, 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def adversary() -> Universal:
    return Universal.draw(SIZE, SIDE, 0.1, 0.05, seeded(0), torch.device("cpu"))


@pytest.fixture
def places() -> Places:
    kind = torch.tensor([NONE, ADDED, PASTED, PASTED, ADDED, WRITTEN, WRITTEN])
    return Places(kind=kind, top=torch.tensor([0, 1, 5, 2, 0, 0, 0]), left=torch.tensor([4, 0, 0, 3, 1, 0, 0]))


def test_what_images_carry(adversary: Universal, places: Places) -> None:
    images = torch.rand(7, 3, SIZE, SIZE, generator=seeded(1))
    before = images.clone()
    seen = adversary.apply(images, places).numpy()
    assert torch.equal(images, before)
    score = adversary.score.numpy()
    written = score >= np.sort(score, axis=None)[-10]  # 5 percent of 3 * 8 * 8
    assert written.sum() == 10
    for row in range(7):
        expected = before[row].numpy().copy()
        if places.kind[row] == ADDED:
            expected = np.clip(expected + adversary.pattern.numpy(), 0, 1)
        if places.kind[row] == PASTED:
            top, left = int(places.top[row]), int(places.left[row])
            expected[:, top : top + SIDE, left : left + SIDE] = adversary.patch.numpy()
        if places.kind[row] == WRITTEN:
            expected = np.where(written, adversary.values.numpy(), expected)
        np.testing.assert_array_equal(seen[row], expected)


def test_a_step_climbs_along_the_sign(adversary: Universal, places: Places) -> None:
    images = torch.rand(7, 3, SIZE, SIZE, generator=seeded(1))
    weights = torch.randn(7, 3, SIZE, SIZE, generator=seeded(2))
    pattern, patch, values, score = (tensor.clone().numpy() for tensor in adversary.tensors().values())
    halves = []
    for rows in (slice(0, 3), slice(3, 7)):  # as two chunks of one batch
        carrier = adversary.apply(images[rows], places.of(rows)).requires_grad_()
        (weights[rows] * carrier).sum().backward()
        halves.append((carrier, images[rows], places.of(rows)))
    seen = torch.cat([carrier.detach() for carrier, _, _ in halves]).numpy()
    adversary.ascend(halves, 0.01, Accelerator(cpu=True))
    up, pasted = np.zeros((3, SIZE, SIZE)), np.zeros((3, SIDE, SIDE))
    for row in range(7):
        if places.kind[row] == ADDED:
            up += weights[row].numpy() * ((seen[row] > 0) & (seen[row] < 1))
        if places.kind[row] == PASTED:
            top, left = int(places.top[row]), int(places.left[row])
            pasted += weights[row].numpy()[:, top : top + SIDE, left : left + SIDE]
    over, gain = weights[5:].numpy().sum(0), (weights[5:].numpy() * (values - images[5:].numpy())).sum(0)
    np.testing.assert_allclose(adversary.pattern, np.clip(pattern + 0.01 * np.sign(up), -0.1, 0.1), atol=1e-6)
    np.testing.assert_allclose(adversary.patch, np.clip(patch + 0.04 * np.sign(pasted), 0, 1), atol=1e-6)
    np.testing.assert_allclose(adversary.values, np.clip(values + 0.04 * np.sign(over), 0, 1), atol=1e-6)
    np.testing.assert_allclose(adversary.score, 0.9 * score + gain / np.abs(gain).mean(), rtol=1e-4, atol=1e-5)


def test_a_trigger_that_was_found_is_carried_as_it_is() -> None:
    pattern = 0.5 * torch.randn(3, SIZE, SIZE, generator=seeded(3))
    found = InvertedTrigger(
        form="additive", target=0, mask=torch.ones(1, SIZE, SIZE), pattern=pattern, size=0.5, success=90.0
    )
    adversary = Universal.draw(SIZE, SIDE, 0.1, 0.05, seeded(0), torch.device("cpu"), found)
    images = torch.rand(3, 3, SIZE, SIZE, generator=seeded(1))
    places = Places(kind=torch.tensor([NONE, FOUND, ADDED]), top=torch.zeros(3).long(), left=torch.zeros(3).long())
    for _ in range(2):
        seen = adversary.apply(images, places).requires_grad_()
        assert torch.equal(seen[0], images[0])
        assert torch.equal(seen[1], (images[1] + pattern).clamp(0, 1))
        seen.sum().backward()
        adversary.ascend([(seen, images, places)], 0.01, Accelerator(cpu=True))


def test_places_are_drawn_evenly_and_inside() -> None:
    places = draw_places(6000, SIZE, SIDE, 0.5, seeded(0))
    share = [float((places.kind == kind).float().mean()) for kind in (NONE, ADDED, PASTED)]
    assert share == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    thirds = draw_places(6000, SIZE, SIDE, 0.6, seeded(0), kinds=(ADDED, PASTED, WRITTEN)).kind
    assert torch.bincount(thirds, minlength=4).div(6000).tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.03)
    assert draw_places(100, SIZE, SIDE, 1.0, seeded(0)).kind.all()
    assert set(places.top.tolist()) == set(places.left.tolist()) == set(range(SIZE - SIDE + 1))
    assert not draw_places(100, SIZE, SIDE, 0.0, seeded(0)).kind.any()


def test_par_trains_against_it(clip: Any, pairs: Any) -> None:
    quick = PARConfig(batch_size=12, steps=4, check_every=2, learning_rate=1e-3, epsilon=1e-3)
    runs = [
        repair_with_par(clip, pairs, replace(quick, **more), run=Run(accelerator=Accelerator(cpu=True)))
        for more in (
            {},
            {"adversary_share": 0.6, "adversary_values": 0.1},
            {"adversary_share": 0.6, "adversary_values": 0.1, "chunk_size": 5},
        )
    ]
    losses = [[look["loss"] for look in repair.history[1:]] for repair in runs]
    assert losses[1] != pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[1], abs=1e-3)
    with pytest.raises(ConfigError):
        replace(quick, adversary_share=1.5)
