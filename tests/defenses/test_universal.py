"""The universal adversary against loops in NumPy, and what it does to a training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from unpoison.defenses.par import PARConfig, repair_with_par
from unpoison.defenses.universal import ADDED, FOUND, NONE, PASTED, WRITTEN, Places, Universal, draw_places
from unpoison.detection.inversion import InvertedTrigger
from unpoison.errors import ConfigError
from unpoison.runs import Run, RunFolder

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


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("row", [1, 2, 5])
def test_gradients_that_are_not_finite_move_nothing(bad: float, row: int, adversary: Universal, places: Places) -> None:
    images = torch.rand(7, 3, SIZE, SIZE, generator=seeded(1))
    before = {name: tensor.clone() for name, tensor in adversary.tensors().items()}
    carrier = adversary.apply(images, places).requires_grad_()
    carrier.sum().backward()
    assert carrier.grad is not None
    carrier.grad[row, :, 5:, :3] = bad
    assert not adversary.ascend([(carrier, images, places)], 0.01, Accelerator(cpu=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adversary.tensors().items())
    carrier.grad.nan_to_num_(0, 0, 0)
    assert adversary.ascend([(carrier, images, places)], 0.01, Accelerator(cpu=True))


@pytest.mark.parametrize("start", [0.0, 0.9])
def test_an_overflow_lowers_the_scale_while_the_model_stands_still_as_well(
    start: float, clip: Any, pairs: Any, tmp_path: Path
) -> None:
    quick = PARConfig(
        batch_size=12, steps=10, check_every=9, learning_rate=1e-3,
        adversary_share=0.5, adversary_values=0.1, adversary_start=start,
    )  # fmt: skip
    run = Run(accelerator=Accelerator(cpu=True), folder=RunFolder.open(tmp_path, {}))
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the loss is more than 2
    repair = repair_with_par(clip, pairs, quick, run=run)
    assert 2.0**110 < run.accelerator.scaler.get_scale() < 2.0**127
    assert repair.stopped == ""
    stored = run.stored("par-000000")
    assert stored is not None
    for name, drawn in {"patch": (0, 1), "values": (0, 1), "score": (-math.inf, math.inf)}.items():
        assert bool(((stored[f"extra.{name}"] >= drawn[0]) & (stored[f"extra.{name}"] <= drawn[1])).all())
    moved = not torch.equal(
        stored["net.visual_projection.weight"], clip.module.get_parameter("visual_projection.weight")
    )
    assert moved == (start == 0)
    assert stored["extra.score"].abs().max() > 1  # drawn from [0, 1]: the adversary moved


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
    for wrong in ({"adversary_share": 1.5}, {"adversary_start": 1.0}):
        with pytest.raises(ConfigError):
            replace(quick, **wrong)


def test_without_an_adversary_the_model_does_not_stand_still(clip: Any, pairs: Any) -> None:
    quick = PARConfig(batch_size=12, steps=4, check_every=2, learning_rate=1e-3)
    plain, told = (
        repair_with_par(clip, pairs, config, run=Run(accelerator=Accelerator(cpu=True)))
        for config in (quick, replace(quick, adversary_start=0.5))
    )
    assert told.history == plain.history


def test_some_step_is_always_left_to_train_in(clip: Any, pairs: Any) -> None:
    quick = PARConfig(batch_size=12, steps=3, check_every=3, learning_rate=1e-3, adversary_share=0.5)
    run = Run(accelerator=Accelerator(cpu=True))
    repair = repair_with_par(clip, pairs, replace(quick, adversary_start=0.99), run=run)
    assert repair.steps == 3
    given = clip.module.get_parameter("visual_projection.weight")
    assert not torch.equal(repair.model.module.get_parameter("visual_projection.weight"), given)
