"""PAR's loss and views against references re-derived in NumPy, and what a run of it leaves behind."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from unpoison.data.transforms import brighten, erase_square
from unpoison.defenses.par import (
    PARConfig,
    augment,
    draw_noise,
    draw_views,
    gate,
    par_loss,
    par_rate,
    relation_loss,
    repair_with_par,
    was_shut,
)
from unpoison.errors import ConfigError, ModelError, NotEnoughDataError
from unpoison.models.checkpoints import hash_weights
from unpoison.runs import Run

QUICK = PARConfig(batch_size=12, steps=4, check_every=2, learning_rate=1e-3)


def new_run(**more: Any) -> Run:
    return Run(accelerator=Accelerator(cpu=True), **more)


def unit(rows: int, seed: int, width: int = 5) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=1)


def naive_loss(x: np.ndarray, t: np.ndarray, x_p: np.ndarray, t_p: np.ndarray, s: float, tau: float) -> float:
    """L_CLIP - 1/2 [gate(S_img) + gate(S_txt)], pair by pair."""
    total = 0.0
    for i in range(len(x)):
        forth, back = np.exp(s * t @ x[i]), np.exp(s * x @ t[i])
        total -= (np.log(forth[i] / forth.sum()) + np.log(back[i] / back.sum())) / (2 * len(x))
    for new, old in ((x, x_p), (t, t_p)):
        distance = np.mean([2 - 2 * new[i] @ old[i] for i in range(len(new))])
        total -= distance / 2 if distance <= tau else 0.0
    return float(total)


@pytest.mark.parametrize("tau", [0.1, 1.9, 2.05, 4.0])
def test_the_loss_is_its_equation(tau: float) -> None:
    x, t, x_p, t_p = (unit(6, seed) for seed in range(4))
    value, terms = par_loss(x, t, x_p, t_p, 9.0, tau)
    assert float(value) == pytest.approx(naive_loss(x.numpy(), t.numpy(), x_p.numpy(), t_p.numpy(), 9.0, tau))
    assert float(terms["image_distance"]) == pytest.approx(float(2 - 2 * (x * x_p).sum(1).mean()))
    assert bool(terms["text_open"]) == bool(terms["text_distance"] <= tau)


def test_each_tower_has_its_own_gate() -> None:
    x, t, x_p, t_p = (unit(6, seed) for seed in range(4))
    far, near = (float((2 - 2 * (new * old).sum(1)).mean()) for new, old in ((x, x_p), (t, t)))
    tau = (far + near) / 2
    _, terms = par_loss(x, t, x_p, t, 9.0, tau)
    assert [float(terms["image_open"]), float(terms["text_open"])] == [0.0, 1.0]
    frozen, terms = par_loss(x, None, x_p, t_p, 9.0, 4.0)
    assert "text_distance" not in terms
    assert float(frozen) == pytest.approx(float(par_loss(x, t_p, x_p, t_p, 9.0, 4.0)[0]))


def test_a_shut_gate_has_no_gradient() -> None:
    distance = torch.tensor(2.2, requires_grad=True)
    gate(distance, 2.15).backward()
    assert distance.grad == 0
    distance = torch.tensor(2.1, requires_grad=True)
    assert float(gate(distance, 2.15).detach()) == pytest.approx(2.1)
    gate(distance, 2.15).backward()
    assert distance.grad == 1


def test_relations_are_cross_entropy_to_the_suspects_softmax() -> None:
    images, texts, old_images, old_texts = (unit(5, seed) for seed in range(4))
    x, t, x_p, t_p = (part.numpy() for part in (images, texts, old_images, old_texts))
    teacher, student = (np.exp(7.0 * a @ b.T) for a, b in ((x_p, t_p), (x, t)))
    teacher, student = (part / part.sum(1, keepdims=True) for part in (teacher, student))
    expected = -np.mean([sum(teacher[i] * np.log(student[i])) for i in range(5)])
    found = relation_loss(images, texts, old_images, old_texts, 7.0)
    assert float(found) == pytest.approx(expected)


def test_noise_only_brightens() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = 0.2 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = brighten(images, noise, torch.tensor([True, False, True, False]))
    for row in range(4):
        brighter = np.minimum(images[row].numpy() + np.clip(noise[row].numpy(), 0, 1), 1)
        expected = images[row].numpy() if row % 2 else brighter
        np.testing.assert_allclose(seen[row].numpy(), expected, rtol=1e-6)
    assert bool((seen >= images).all())
    assert bool((seen > images).any())


def test_the_erased_square_is_zero_after_normalisation() -> None:
    images = torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    seen = erase_square(images, torch.tensor([2, 0]), torch.tensor([5, 0]), torch.tensor([3, 0]), mean)
    normal = (seen - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert torch.equal(normal[0, :, 2:5, 5:8], torch.zeros(3, 3, 3))
    assert torch.equal(seen[1], images[1])
    outside = torch.ones(8, 9, dtype=torch.bool)
    outside[2:5, 5:8] = False
    assert torch.equal(seen[0][:, outside], images[0][:, outside])


def test_views_are_drawn_as_in_the_paper() -> None:
    config = PARConfig()
    views = draw_views(4000, 64, config, torch.Generator().manual_seed(0))
    assert float(views.noisy.float().mean()) == pytest.approx(0.5, abs=0.03)
    erased = views.side > 0
    assert float(erased.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert {int(side) for side in views.side[erased].unique()} == {5, 6}  # sqrt(0.005) and sqrt(0.01) of 64: 4.5, 6.4
    assert bool((views.top[erased] + views.side[erased] <= 64).all())
    assert bool((views.left[erased] + views.side[erased] <= 64).all())
    assert int(views.top[erased].min()) == 0
    assert not views.flipped.any()
    assert not views.shift.any()


def test_a_chunk_sees_what_the_whole_batch_sees() -> None:
    config = PARConfig(crop=2, flip=True)
    images = torch.rand(150, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = draw_views(150, 16, config, torch.Generator().manual_seed(1))
    run = new_run()
    whole = augment(images, views, draw_noise(slice(0, 150), 16, 7, run), (0.5, 0.5, 0.5), config)
    for start, stop in ((0, 10), (60, 130), (128, 150)):
        rows = slice(start, stop)
        part = augment(images[rows], views.of(rows), draw_noise(rows, 16, 7, run), (0.5, 0.5, 0.5), config)
        assert torch.equal(part, whole[rows])
    assert not torch.equal(draw_noise(slice(0, 5), 16, 7, run), draw_noise(slice(0, 5), 16, 8, run))


def test_the_gate_is_latched_by_an_interval_without_an_open_one() -> None:
    start = {"step": 0.0, "held_out_accuracy": 50.0}
    both = start | {"image_open": 0.5, "text_open": 0.0}
    shut = start | {"image_open": 0.0, "text_open": 0.0}
    assert not was_shut([start])
    assert not was_shut([start, both])
    assert was_shut([start, both, shut, both])


def test_the_published_constants() -> None:
    config = PARConfig()
    assert (config.tau, config.batch_size, config.epochs, config.betas) == (2.15, 2048, 10, (0.9, 0.98))
    assert config.weight_decay == 1e-4
    assert [par_rate(step, 1000, config) for step in (0, 500)] == pytest.approx([3e-5, 3e-6])
    assert par_rate(1000, 1000, config) == pytest.approx(1e-9)
    assert (config.text_tower, config.distill, config.recovery, config.crop, config.flip) == (
        "train",
        "none",
        "gate",
        0,
        False,
    )


def test_the_rule_for_small_models_and_sets() -> None:
    paper = PARConfig.scaled(parameters=102_000_000, samples=250_000)
    assert (paper.learning_rate, paper.batch_size, paper.steps) == (3e-5, 2048, 10 * (250_000 // 2048))
    small = PARConfig.scaled(parameters=460_000, samples=5000, flip=True)
    assert small.learning_rate == pytest.approx(1e-3, rel=0.02)
    assert (small.batch_size, small.steps, small.flip) == (128, 600, True)
    assert small.tau == 2.15
    tiny = PARConfig.scaled(parameters=1, samples=20)
    assert (tiny.batch_size, tiny.steps) == (32, 600)


def test_what_is_recommended_goes_beyond_the_paper() -> None:
    ours = PARConfig.recommended(parameters=5_000_000, samples=30_000)
    paper = PARConfig.scaled(parameters=5_000_000, samples=30_000)
    assert ours.learning_rate == pytest.approx(2 * paper.learning_rate)
    assert (ours.batch_size, ours.steps) == (paper.batch_size, paper.steps)
    assert (ours.adversary_share, ours.text_tower, ours.tau) == (0.1, "frozen", 0.5)
    assert (paper.adversary_share, paper.text_tower, paper.tau) == (0.0, "train", 2.15)
    told = PARConfig.recommended(parameters=5_000_000, samples=30_000, tau=1.0, learning_rate=1e-5, steps=7)
    assert (told.tau, told.learning_rate, told.steps, told.adversary_share) == (1.0, 1e-5, 7, 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": 0.0}, {"tau": 5.0}, {"erase_area": (0.2, 0.1)}, {"noise_share": 1.5}, {"noise": -1.0}, {"steps": 0},
        {"batch_size": 1}, {"held_out": 1.0}, {"betas": (0.9, 1.0)}, {"learning_rate": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PARConfig(**wrong)


def weights_of(clip: Any) -> str:
    return hash_weights(dict(clip.module.state_dict()))


def test_a_run_moves_a_copy_away_and_leaves_the_model(clip: Any, pairs: Any) -> None:
    clip.module.train()
    before = weights_of(clip)
    repair = repair_with_par(clip, pairs, replace(QUICK, steps=6), run=new_run())
    assert weights_of(clip) == before
    assert clip.module.training
    assert all(value.requires_grad and value.grad is None for value in clip.module.parameters())
    assert not repair.model.module.training
    assert all(value.requires_grad and value.grad is None for value in repair.model.module.parameters())
    assert repair.steps == repair.planned == 6
    assert repair.model.logit_scale == clip.logit_scale
    assert [look["step"] for look in repair.history] == [0, 2, 4, 6]
    distances = [look["image_distance"] for look in repair.history[1:]]
    assert distances[-1] > distances[0]  # the push outward
    assert repair.history[0]["image_cosine"] == pytest.approx(1, abs=1e-2)
    assert repair.kept["image_cosine"] < 0.999
    assert repair.kept["text_cosine"] < 0.999
    assert repair.stopped == ""
    assert repair.held_out_pairs + repair.trained_pairs == len(pairs)
    assert repair.truncated > 0  # 24 tokens of one letter each


def test_chunks_and_seeds(clip: Any, pairs: Any) -> None:
    # The keys' biases have no gradient but rounding, which Adam would make steps of: hence the large epsilon.
    config = replace(QUICK, steps=2, epsilon=1e-3)
    modules = [
        repair_with_par(clip, pairs, replace(config, chunk_size=chunk), run=new_run(seed=seed)).model.module
        for chunk, seed in ((512, 0), (5, 0), (512, 1))
    ]
    states = [dict(module.state_dict()) for module in modules]
    torch.testing.assert_close(states[1], states[0], atol=2e-5, rtol=1e-3)
    assert any(not torch.allclose(states[2][name], states[0][name], atol=1e-4) for name in states[0])


def test_a_frozen_text_tower_stays_bit_by_bit(clip: Any, pairs: Any) -> None:
    config = replace(QUICK, text_tower="frozen", distill="relations", recovery="latched", crop=1, flip=True)
    repair = repair_with_par(clip, pairs, config, run=new_run())
    before = dict(clip.tower("text"))
    for name, value in repair.model.tower("text"):
        assert torch.equal(value, before[name])
    assert any(not torch.equal(value, dict(clip.tower("image"))[name]) for name, value in repair.model.tower("image"))
    assert "relation_loss" in repair.kept
    assert "text_distance" not in repair.kept


def test_fewer_pairs_than_a_batch_make_it_smaller(clip: Any, pairs: Any) -> None:
    repair = repair_with_par(clip, pairs.select(range(20)), replace(QUICK, batch_size=64, steps=1), run=new_run())
    assert repair.batch_size == 15  # 20 less the quarter that is held out
    assert "15 instead of 64" in repair.warnings[0]
    with pytest.raises(NotEnoughDataError) as caught:
        repair_with_par(clip, pairs.select(range(9)), QUICK, run=new_run())
    assert (caught.value.have, caught.value.need) == (9, 16)


def test_a_diverging_run_keeps_its_last_good_weights(clip: Any, pairs: Any) -> None:
    repair = repair_with_par(clip, pairs, replace(QUICK, learning_rate=1e30, final_rate=1e30), run=new_run())
    assert "diverged at step 1" in repair.stopped
    assert "step 0 were kept" in repair.stopped
    assert repair.steps == 0
    assert weights_of(repair.model) == weights_of(clip)
    assert repair.held_out_after == repair.held_out_before


def test_broken_models_are_refused(clip: Any, pairs: Any) -> None:
    broken = clip.copy()
    next(broken.module.parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        repair_with_par(broken, pairs, QUICK, run=new_run())
    uneven = clip.copy()
    projection = uneven.module.text_projection
    uneven.module.text_projection = torch.nn.Linear(projection.in_features, projection.out_features + 1, bias=False)
    with pytest.raises(ModelError, match="towers disagree"):
        repair_with_par(uneven, pairs, QUICK, run=new_run())


def test_half_precision_comes_back_as_it_came(clip: Any, pairs: Any) -> None:
    clip.module.half()
    repair = repair_with_par(clip, pairs, replace(QUICK, steps=1), run=new_run())
    assert {value.dtype for value in repair.model.module.parameters()} == {torch.float16}


def test_bfloat16_by_the_runs_accelerator(small_folder: Path, clip: Any, pairs: Any) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        repair = repair_with_par(clip, pairs, QUICK, run=Run(accelerator=accelerator))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {value.dtype for value in repair.model.module.parameters()} == {torch.float32}
    assert math.isfinite(repair.kept["loss"])
