"""The pattern that a CLIP is nearly blind to: as strong as noise in pixels, much weaker in embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unpoison.attacks.feature_small import FeatureSmall, added, fitted
from unpoison.attacks.feature_small_fit import FeatureSmallConfig, fit_feature_small, movement
from unpoison.attacks.poison import plan_poisoning
from unpoison.data.pixels import load_pixels, to_images
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.runs import Run, RunFolder, Silent

SOURCE = open_images("shapes:96:6")
CONFIG = FeatureSmallConfig(energy=24 / 255, largest=48 / 255, images=48, epochs=12, batch_size=16)


@pytest.fixture(scope="module")
def clip() -> TransformersCLIP:
    return load_clip("tiny")


@pytest.fixture(scope="module")
def trigger(clip: TransformersCLIP) -> FeatureSmall:
    return fit_feature_small(clip, SOURCE.select(range(48)), CONFIG, run=Run(seed=1))


def moved(clip: TransformersCLIP, trigger: FeatureSmall) -> float:
    """On images that the fit did not see."""
    pixels = load_pixels(SOURCE.select(range(48, 96)), clip.image_size, cache=None, progress=Silent())
    images = to_images(pixels.array)
    with torch.no_grad():
        return float(movement(clip.encode_images(trigger.apply(images, seed=1)), clip.encode_images(images)))


def test_the_pattern_has_the_wanted_strength_and_its_gradients() -> None:
    raw = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    change = fitted(raw, 0.03, 0.06)
    assert float(change.detach().square().mean().sqrt()) == pytest.approx(0.03, rel=0.03)
    assert float(change.detach().abs().max()) <= 0.06
    change[0, 0, 0].backward()
    assert raw.grad is not None
    assert (raw.grad != 0).any()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = np.clip(images.numpy() + change.detach().numpy(), 0, 1)
    assert np.allclose(added(images, change.detach()).numpy(), expected, atol=1e-6)
    stored = FeatureSmall.of(change.detach(), 0.03, 0.06)
    assert (stored.change(0) - change.detach()).abs().max() <= 0.06 / 255 + 1e-6


def test_embeddings_move_much_less_than_under_noise_of_the_same_strength(
    clip: TransformersCLIP, trigger: FeatureSmall
) -> None:
    noise = FeatureSmall(energy=CONFIG.energy, largest=CONFIG.largest)
    strengths = [float(made.change(1).square().mean().sqrt()) for made in (trigger, noise)]
    assert strengths == pytest.approx([CONFIG.energy] * 2, rel=0.03)
    assert moved(clip, trigger) < 0.4 * moved(clip, noise)


def test_the_model_stays_and_an_interrupted_fit_ends_the_same(
    clip: TransformersCLIP, trigger: FeatureSmall, tmp_path: Path
) -> None:
    before = clip.fingerprint

    class Stops(Silent):
        def log(self, message: str) -> None:
            if "epoch 3 " in message:
                raise KeyboardInterrupt

    folder = RunFolder.open(tmp_path / "run", {"attack": "feature-small"})
    images = SOURCE.select(range(48))
    with pytest.raises(KeyboardInterrupt):
        fit_feature_small(clip, images, CONFIG, run=Run(seed=1, folder=folder, progress=Stops()))
    assert fit_feature_small(clip, images, CONFIG, run=Run(seed=1, folder=folder)) == trigger
    assert clip.fingerprint == before
    params = {"energy": CONFIG.energy, "largest": CONFIG.largest, "pattern": trigger.pattern}
    plan = plan_poisoning(SOURCE, "feature-small", rate=0.1, **params)
    assert plan.make_trigger() == trigger


def test_refusals() -> None:
    refused: tuple[dict[str, Any], ...] = ({"energy": 0.0}, {"energy": 0.5, "largest": 0.1}, {"pattern": "!"})
    for bad in refused:
        with pytest.raises(ConfigError, match="feature-small"):
            FeatureSmall(**bad)
    unfit: tuple[dict[str, Any], ...] = ({"epochs": 0}, {"side": 1}, {"learning_rate": float("nan")}, {"energy": 1.0})
    for bad in unfit:
        with pytest.raises(ConfigError):
            FeatureSmallConfig(**bad)
