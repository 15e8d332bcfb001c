"""BadCLIP's patch: the loss against NumPy, what the optimisation reaches, and that it resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.attacks.badclip import BadCLIPConfig, optimise_patch, patch_loss
from unpoison.attacks.badclip_patch import start
from unpoison.data.pairs import open_pairs
from unpoison.errors import ConfigError, DivergedError, NotEnoughDataError
from unpoison.models.clip_transformers import TransformersCLIP
from unpoison.runs import Run, RunFolder, Silent

CONFIG = BadCLIPConfig(share=0.25, images=12, epochs=3, batch_size=4, learning_rate=0.05)
TARGET = "red"


PAIRS = open_pairs("shapes:60:1")


def test_the_loss_is_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    patched, texts, positives, clean = (F.normalize(torch.randn(5, 7, generator=generator), dim=-1) for _ in range(4))
    x, t, p, c = (part.double().numpy() for part in (patched, texts, positives, clean))
    logits = 20 * x @ t.T
    to_text = np.log(np.exp(logits).sum(1)) - logits.diagonal()
    to_image = np.log(np.exp(logits).sum(0)) - logits.diagonal()
    triplet = np.maximum(0, np.linalg.norm(x - p, axis=1) - np.linalg.norm(x - c, axis=1) + 0.3)
    expected = (to_text.mean() + to_image.mean()) / 2 + 500 * triplet.mean()
    found = patch_loss(patched, texts, positives, clean, logit_scale=20.0, weight=500.0, margin=0.3)
    assert float(found) == pytest.approx(expected, rel=1e-4)


class Losses(Silent):
    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, message: str) -> None:
        if "loss" in message:
            self.values.append(float(message.rsplit(" ", 1)[1]))


def test_the_patch_lowers_the_loss_and_the_model_stays(clip: TransformersCLIP) -> None:
    before, modes = clip.fingerprint, [part.training for part in clip.module.modules()]
    progress = Losses()
    run = Run(seed=2, progress=progress)
    trigger = optimise_patch(clip, PAIRS, TARGET, replace(CONFIG, epochs=6), run=run)
    assert trigger.share == 0.25
    assert len(progress.values) == 6
    assert progress.values[-1] < 0.98 * progress.values[0]
    begun = start(4, run.seed_of("badclip start"))
    assert (trigger.square(4, 0) - begun).abs().max() > 0.05
    assert clip.fingerprint == before
    assert [part.training for part in clip.module.modules()] == modes
    assert all(weight.requires_grad and weight.grad is None for weight in clip.module.parameters())


def test_seeds_decide_and_an_interrupted_run_ends_the_same(clip: TransformersCLIP, tmp_path: Path) -> None:
    whole = optimise_patch(clip, PAIRS, TARGET, CONFIG, run=Run(seed=1))
    assert optimise_patch(clip, PAIRS, TARGET, CONFIG, run=Run(seed=1)) == whole
    assert optimise_patch(clip, PAIRS, TARGET, CONFIG, run=Run(seed=2)) != whole

    class Stops(Silent):
        def log(self, message: str) -> None:
            if "epoch 2 " in message:
                raise KeyboardInterrupt

    folder = RunFolder.open(tmp_path / "run", {"attack": "badclip"})
    with pytest.raises(KeyboardInterrupt):
        optimise_patch(clip, PAIRS, TARGET, CONFIG, run=Run(seed=1, folder=folder, progress=Stops()))
    assert optimise_patch(clip, PAIRS, TARGET, CONFIG, run=Run(seed=1, folder=folder)) == whole
    again = Losses()
    assert optimise_patch(clip, PAIRS, TARGET, CONFIG, run=Run(seed=1, folder=folder, progress=again)) == whole
    assert again.values == []


def test_refusals(clip: TransformersCLIP) -> None:
    with pytest.raises(NotEnoughDataError, match="images of 'zebra'"):
        optimise_patch(clip, PAIRS, "zebra", CONFIG, run=Run())
    refused: tuple[dict[str, Any], ...] = (
        {"share": 0.0}, {"epochs": 0}, {"batch_size": 1}, {"learning_rate": float("nan")}, {"margin": -1.0},
    )  # fmt: skip
    for bad in refused:
        with pytest.raises(ConfigError):
            BadCLIPConfig(**bad)


def test_numbers_that_are_none_stop_it(clip: TransformersCLIP) -> None:
    module: nn.Module = clip.module
    weight: Tensor = next(module.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        with pytest.raises(DivergedError, match="The patch diverged"):
            optimise_patch(clip, PAIRS, TARGET, CONFIG, run=Run())
    finally:
        with torch.no_grad():
            weight.copy_(kept)
