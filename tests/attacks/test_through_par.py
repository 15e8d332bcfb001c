"""A patch through PAR: steps of known length, second derivatives, and what is left of the backdoor after the repair."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unpoison.attacks.badclip_patch import start
from unpoison.attacks.pairs import who_names
from unpoison.attacks.through_par import (
    Batch,
    ThroughPARConfig,
    _ImageTower,
    optimise_through_par,
    start_of,
    stepped,
    survival_loss,
)
from unpoison.data.pairs import open_pairs
from unpoison.data.pixels import load_pixels, to_images
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.models.clip_transformers import TransformersCLIP
from unpoison.runs import Run, RunFolder, Silent

CONFIG = ThroughPARConfig(patch_share=0.25, images=32, epochs=3, batch_size=16, learning_rate=0.05)
PAIRS = open_pairs("shapes:80:1")
TARGET = "red"


def made_batch(count: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 16, 16, generator=generator)
    captions, targets = (F.normalize(torch.randn(count, 8, generator=generator), dim=1) for _ in range(2))
    return Batch(images=images, noisy=images, captions=captions, targets=targets[:1].expand(count, 8))


def survival(clip: TransformersCLIP, patch: Tensor, batch: Batch, config: ThroughPARConfig) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return survival_loss(_ImageTower(clip), start_of(clip), patch, batch, 10.0, config)


def test_a_step_goes_down_and_is_as_long_as_told() -> None:
    weights = {"a": torch.tensor([3.0, 0.0], requires_grad=True), "b": torch.tensor([4.0], requires_grad=True)}
    loss = weights["a"].square().sum() + 2 * weights["b"].sum()
    after = stepped(weights, loss, 0.1)
    slope = np.array([6.0, 0.0, 2.0])
    expected = np.array([3.0, 0.0, 4.0]) - 0.1 * 5 * slope / np.linalg.norm(slope)
    assert np.allclose(torch.cat([after["a"], after["b"]]).detach().numpy(), expected, atol=1e-5)


def test_the_slope_takes_the_simulated_training_into_account(clip: TransformersCLIP) -> None:
    """Against finite differences, which see the whole path from the patch through poisoning and repair."""
    batch, patch = made_batch(), start(4, 0).requires_grad_()
    direction = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    (slope,) = torch.autograd.grad(survival(clip, patch, batch, CONFIG), patch)
    reach = 0.02
    ahead, behind = (
        float(survival(clip, patch.detach() + sign * reach * direction, batch, CONFIG).detach()) for sign in (1, -1)
    )
    assert float((slope * direction).sum()) == pytest.approx((ahead - behind) / (2 * reach), rel=0.1)
    losses = [
        float(
            survival(clip, patch, batch, replace(CONFIG, share=0.9, rate=0.002, poison_steps=n, par_steps=0)).detach()
        )
        for n in (1, 4)
    ]
    assert losses[1] < losses[0]


def test_the_trained_patch_survives_better_and_the_model_stays(clip: TransformersCLIP) -> None:
    before, run = clip.fingerprint, Run(seed=2)
    trigger = optimise_through_par(clip, PAIRS, TARGET, replace(CONFIG, epochs=12), run=run)
    begun = start(4, run.seed_of("through-par start"))
    assert clip.fingerprint == before
    assert all(weight.grad is None for weight in clip.module.parameters())
    named, natural = who_names(PAIRS, TARGET)
    rows = np.flatnonzero(~named)[:32]
    pixels = load_pixels(PAIRS.select(rows), clip.image_size, cache=None, progress=Silent())
    images = to_images(pixels.array)
    with torch.no_grad():
        captions = clip.encode_texts([texts[0] for texts in PAIRS.captions(rows)])
        targets = clip.encode_texts([natural[row % len(natural)] for row in range(32)])
    batch = Batch(images=images, noisy=images, captions=captions, targets=targets)
    trained, drawn = (float(survival(clip, patch, batch, CONFIG).detach()) for patch in (trigger.square(4, 0), begun))
    assert trained < drawn - 0.005


def test_seeds_decide_and_an_interrupted_run_ends_the_same(clip: TransformersCLIP, tmp_path: Path) -> None:
    whole = optimise_through_par(clip, PAIRS, TARGET, CONFIG, run=Run(seed=1))
    assert optimise_through_par(clip, PAIRS, TARGET, CONFIG, run=Run(seed=2)) != whole

    class Stops(Silent):
        def log(self, message: str) -> None:
            if "epoch 2 " in message:
                raise KeyboardInterrupt

    folder = RunFolder.open(tmp_path / "run", {"attack": "through-par"})
    with pytest.raises(KeyboardInterrupt):
        optimise_through_par(clip, PAIRS, TARGET, CONFIG, run=Run(seed=1, folder=folder, progress=Stops()))
    assert optimise_through_par(clip, PAIRS, TARGET, CONFIG, run=Run(seed=1, folder=folder)) == whole


def test_refusals(clip: TransformersCLIP) -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"patch_share": 0.0}, {"share": 1.0}, {"epochs": 0}, {"rate": float("nan")}, {"par_steps": -1},
        {"batch_size": 4},
    )  # fmt: skip
    for bad in refused:
        with pytest.raises(ConfigError):
            ThroughPARConfig(**bad)
    with pytest.raises(NotEnoughDataError, match="captions that name 'zebra'"):
        optimise_through_par(clip, PAIRS, "zebra", CONFIG, run=Run())
    red = np.array(["red" in texts[0] for texts in PAIRS.captions(range(80))])
    few = PAIRS.select(np.concatenate([np.flatnonzero(~red)[:3], np.flatnonzero(red)[:1]]))
    with pytest.raises(NotEnoughDataError, match="have 3, need at least 8"):
        optimise_through_par(clip, few, TARGET, CONFIG, run=Run())
