"""CleanCLIP's loss against its equation; both baselines train a copy, resume, and change what they say they change."""

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

from unpoison.defenses.baselines.clean_clip import CleanClipConfig, clean_clip_loss, repair_with_clean_clip
from unpoison.defenses.baselines.fine_tuning import MAX_LOG_SCALE, FineTuningConfig, repair_with_fine_tuning
from unpoison.errors import ConfigError
from unpoison.models.checkpoints import hash_weights
from unpoison.runs import Run, RunFolder

QUICK = {"batch_size": 12, "steps": 4, "check_every": 2, "learning_rate": 1e-3}
METHODS: dict[str, tuple[Any, Any]] = {
    "clean-clip": (repair_with_clean_clip, CleanClipConfig(**QUICK)),
    "fine-tuning": (repair_with_fine_tuning, FineTuningConfig(**QUICK)),
}
methods = pytest.mark.parametrize("method", METHODS)


def unit(rows: int, seed: int, width: int = 5) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=1)


def naive_contrast(first: np.ndarray, second: np.ndarray, scale: float) -> float:
    powers = np.exp(scale * first @ second.T)
    diagonal = np.diag(powers)
    return float(-np.mean(np.log(diagonal / powers.sum(1)) + np.log(diagonal / powers.sum(0))) / 2)


def test_the_loss_is_its_equation() -> None:
    images, texts, image_views, text_views = (unit(6, seed) for seed in range(4))
    x, t, x_view, t_view = (part.numpy() for part in (images, texts, image_views, text_views))
    for weight in (0.0, 1.0, 0.3):
        expected = naive_contrast(x, t, 8.0) + weight / 2 * (
            naive_contrast(x, x_view, 8.0) + naive_contrast(t, t_view, 8.0)
        )
        value, terms = clean_clip_loss(images, texts, image_views, text_views, 8.0, weight)
        assert float(value) == pytest.approx(expected)
        assert float(terms["image_view_loss"]) == pytest.approx(naive_contrast(x, x_view, 8.0))


def test_the_published_constants() -> None:
    for config in (CleanClipConfig(), FineTuningConfig()):
        assert (config.batch_size, config.learning_rate, config.epochs, config.warm_up_steps) == (64, 1e-5, 10, 50)
        assert (config.betas, config.weight_decay) == ((0.9, 0.999), 0.1)
    assert CleanClipConfig().self_supervision == 1.0
    small = FineTuningConfig.scaled(parameters=460_000, samples=5000)
    assert (small.batch_size, small.steps) == (64, 780)
    assert small.learning_rate == pytest.approx(1e-5 * 100 / 3, rel=0.02)
    with pytest.raises(ConfigError):
        CleanClipConfig(self_supervision=-1.0)


@methods
def test_a_copy_is_trained_and_resumes(method: str, clip: Any, pairs: Any, tmp_path: Path) -> None:
    repair_with, config = METHODS[method]
    before = hash_weights(dict(clip.module.state_dict()))
    accelerator = Accelerator(cpu=True)
    whole = repair_with(clip, pairs, config, run=Run(accelerator=accelerator))
    assert hash_weights(dict(clip.module.state_dict())) == before
    after = hash_weights(dict(whole.model.module.state_dict()))
    assert after != before
    assert [look["step"] for look in whole.history] == [0, 2, 4]
    assert all(math.isfinite(value) for look in whole.history for value in look.values())
    # half of it, then the rest
    run = Run(accelerator=accelerator, folder=RunFolder.open(tmp_path / "run", {}))
    repair_with(clip, pairs, config, run=run)
    (tmp_path / "run" / "steps" / f"{method}-000002.safetensors").unlink()
    again = repair_with(clip, pairs, config, run=run)
    assert hash_weights(dict(again.model.module.state_dict())) == after
    chunked = repair_with(clip, pairs, replace(config, chunk_size=5, epsilon=1e-3), run=Run(accelerator=accelerator))
    plain = repair_with(clip, pairs, replace(config, epsilon=1e-3), run=Run(accelerator=accelerator))
    torch.testing.assert_close(
        dict(chunked.model.module.state_dict()), dict(plain.model.module.state_dict()), atol=2e-5, rtol=1e-3
    )


@methods
def test_the_logit_scale_is_trained_within_its_range_or_not_at_all(method: str, clip: Any, pairs: Any) -> None:
    repair_with, config = METHODS[method]
    clip.module.logit_scale.data.fill_(MAX_LOG_SCALE + 1)
    run = Run(accelerator=Accelerator(cpu=True))
    kept = repair_with(clip, pairs, replace(config, steps=1, train_logit_scale=False), run=run)
    assert kept.model.module.logit_scale == clip.module.logit_scale
    cut = repair_with(clip, pairs, replace(config, steps=1), run=run)
    assert 0 < float(cut.model.module.logit_scale.detach()) <= MAX_LOG_SCALE + 1e-6
