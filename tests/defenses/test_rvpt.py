"""RVPT and the linear probe: prompts inside a frozen ViT, held by the model itself, and what the classifier keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from unpoison.api_zero_shot import purify_with_linear_probe, purify_with_rvpt
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.linear_probe import LinearProbeConfig
from unpoison.defenses.baselines.rvpt import RVPTConfig, mean_cosine
from unpoison.errors import ConfigError, DataError, ModelError, UnsupportedModelError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.models.visual_prompts import class_tokens, with_visual_prompts
from unpoison.models.zero_shot_classifier import FILE, load_zero_shot
from unpoison.runs import Run


@pytest.fixture
def clip(small_folder: Path) -> TransformersCLIP:
    return load_clip(small_folder)


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    found = open_images("shapes:120:3")
    kept = np.flatnonzero(found.labels < 3)
    return replace(found.select(kept), class_names=found.class_names[:3])


@pytest.fixture
def run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


def batch(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_prompts_stand_between_the_class_token_and_the_patches(clip: TransformersCLIP) -> None:
    """By hand: the encoder's layers one after the other, each with its own prompts in the place of the last one's."""
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    prompted, _ = with_visual_prompts(clip, tokens)
    network: Any = clip.module
    with torch.no_grad():
        hidden = network.vision_model.pre_layrnorm(
            network.vision_model.embeddings(clip.preprocessing.normalized(batch()))
        )
        seen = []
        for layer, own in zip(network.vision_model.encoder.layers, tokens, strict=True):
            both = torch.cat([hidden[:, :1], own.expand(3, -1, -1), hidden[:, 1:]], dim=1)
            out = layer(both, attention_mask=None)
            out = out[0] if isinstance(out, tuple) else out
            hidden = torch.cat([out[:, :1], out[:, 6:]], dim=1)
            seen.append(hidden[:, 0])
        pooled = network.vision_model.post_layernorm(hidden[:, 0])
        wanted = torch.nn.functional.normalize(network.visual_projection(pooled), dim=-1)
    with torch.enable_grad(), class_tokens(prompted, 2) as watched:
        found = prompted.encode_images(batch())
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(torch.stack(watched), torch.stack(seen), atol=1e-5)
    assert prompted.encode_image_tokens(batch()).shape[1] == 4  # the prompts do not come out


def test_prompts_are_part_of_the_copy_alone(clip: TransformersCLIP) -> None:
    before = clip.encode_images(batch()).detach()
    tokens = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    prompted, prompts = with_visual_prompts(clip, tokens)
    assert torch.equal(clip.encode_images(batch()), before)
    assert prompted.fingerprint != clip.fingerprint
    twin = prompted.copy()
    with torch.no_grad():
        prompts.tokens.zero_()
    assert not torch.allclose(twin.encode_images(batch()), prompted.encode_images(batch()), atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="has prompts already"):
        with_visual_prompts(prompted, tokens)
    with pytest.raises(UnsupportedModelError, match="do not fit an image tower of 2 blocks of width 16"):
        with_visual_prompts(clip, torch.zeros(3, 4, 16))


def test_the_repulsion_is_the_mean_cosine() -> None:
    first, second = torch.randn(4, 6), torch.randn(4, 6)
    by_hand = [float(a @ b / a.norm() / b.norm()) for a, b in zip(first, second, strict=True)]
    assert float(mean_cosine([first, first], [second, first])) == pytest.approx((np.mean(by_hand) + 1) / 2, rel=1e-5)


def test_rvpt_learns_prompts_and_leaves_the_model(
    clip: TransformersCLIP, images: LabelledImages, run: Run, tmp_path: Path
) -> None:
    before = hash_weights(dict(clip.module.state_dict()))
    config = RVPTConfig(shots=3, prompts=4, epochs=2, batch_size=4, learning_rate=0.5, bound=100.0)
    outcome = purify_with_rvpt(clip, images, config=config, run=run)
    assert hash_weights(dict(clip.module.state_dict())) == before
    prompts = outcome.classifier.visual_prompts
    assert prompts is not None
    assert prompts.shape == (2, 4, 16)  # round(3 / 12 of 2 blocks) = 0: both
    assert float(prompts.std()) > 0.02
    assert outcome.purification.accepted
    assert "No trigger was looked for" in outcome.purification.reason
    assert outcome.purification.steps == 2 * 3
    # and what is stored is the same classifier
    pictures = [Image.effect_noise((20, 20), 60).convert("RGB")]
    outcome.classifier.save(tmp_path / FILE)
    loaded = load_zero_shot(tmp_path, clip)
    assert torch.allclose(loaded.logits(pictures), outcome.classifier.logits(pictures), atol=1e-4)
    assert loaded.predict(pictures)[0] in images.class_names


def test_prompts_are_learnt_in_half_precision_where_that_is_fast(
    clip: TransformersCLIP, images: LabelledImages, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RVPTConfig(shots=3, prompts=4, epochs=2, batch_size=4, learning_rate=0.05, bound=100.0)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("unpoison.models.clip_transformers.inference_dtype", lambda _, dtype=dtype: dtype)
        found.append(purify_with_rvpt(clip, images, config=config, run=run).classifier.visual_prompts)
    exact, fast = found
    assert exact is not None
    assert fast is not None
    assert fast.dtype == exact.dtype == torch.float32
    assert not torch.equal(fast, exact)
    assert float((fast - exact).norm() / exact.norm()) < 0.2


def test_the_probe_learns_the_shots(clip: TransformersCLIP, images: LabelledImages, run: Run) -> None:
    outcome = purify_with_linear_probe(clip, images, config=LinearProbeConfig(shots=5, strength=1e4), run=run)
    assert outcome.classifier.classes.shape == (3, 8)
    assert outcome.purification.held_out_after >= outcome.purification.held_out_before - 20
    two = replace(images.select(np.flatnonzero(images.labels < 2)), class_names=images.class_names[:2])
    assert purify_with_linear_probe(clip, two, run=run).classifier.classes.shape == (2, 8)


def test_a_classifier_belongs_to_its_clip(
    clip: TransformersCLIP, images: LabelledImages, run: Run, tmp_path: Path
) -> None:
    classifier = purify_with_linear_probe(clip, images, run=run).classifier
    classifier.save(tmp_path / FILE)
    assert load_zero_shot(tmp_path / FILE, clip).class_names == images.class_names
    other = images.class_names[::-1]
    rows = classifier.classes_of(replace(images, class_names=other))
    assert rows is not None
    assert np.array_equal(rows, classifier.classes.numpy()[::-1])
    with pytest.raises(DataError, match="has the classes a, b, c"):
        classifier.classes_of(replace(images, class_names=("a", "b", "c")))
    changed = clip.copy()
    next(changed.module.parameters()).data.add_(1)
    with pytest.raises(ModelError, match="was made for another CLIP"):
        load_zero_shot(tmp_path / FILE, changed)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / FILE).read_bytes()[:200])
    with pytest.raises(ModelError):
        load_zero_shot(damaged, clip)
    foreign = tmp_path / "foreign.safetensors"
    from safetensors.torch import save_file

    save_file({"classes": torch.zeros(3, 8)}, foreign)
    with pytest.raises(ModelError, match="expected unpoison/zero-shot-classifier"):
        load_zero_shot(foreign, clip)


def test_configs_are_checked() -> None:
    with pytest.raises(ConfigError, match="prompts must be positive"):
        RVPTConfig(prompts=0)
    with pytest.raises(ConfigError, match="strength above 0"):
        LinearProbeConfig(strength=0.0)
