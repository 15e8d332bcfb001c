"""The adapter of open_clip with the library itself: what we load, train and write is what open_clip reads.

These run in an environment of their own (`make test-open-clip`), since torchvision must not be in the main one.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unpoison.api_clip import purify_with_clean_clip, purify_with_fine_tuning, purify_with_par
from unpoison.data.pairs import open_pairs
from unpoison.defenses.baselines.clean_clip import CleanClipConfig
from unpoison.defenses.baselines.fine_tuning import FineTuningConfig
from unpoison.defenses.par import PARConfig
from unpoison.errors import CheckpointMismatchError, ModelError, UnsafeCheckpointError, UnsupportedModelError
from unpoison.models.clip_files import load_any_clip, save_clip
from unpoison.models.clip_open_clip import WEIGHTS_NAME, OpenClip, new_open_clip
from unpoison.models.open_clip_config import CONFIG_NAME
from unpoison.types import ImageTextModel

open_clip: Any = pytest.importorskip("open_clip", reason="needs the extra [open-clip]: make test-open-clip")

TEXT = {"context_length": 24, "vocab_size": 49_408, "width": 64, "heads": 1, "layers": 1}
VIT = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 64, "patch_size": 16},
    "text_cfg": TEXT,
}
RESNET = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": TEXT,
}
CONFIGS = {"vit": VIT, "modified-resnet": RESNET}
CAPTIONS = ["a red circle", "", "ein grüner Kreis 🟢", "<b>bold</b> &amp; more", "word " * 200]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that is not fast in bfloat16: what is compared is the networks, not their rounding."""
    monkeypatch.setattr("unpoison.models.clip_transformers.inference_dtype", lambda _: torch.float32)


@pytest.fixture(params=CONFIGS)
def clip(request: pytest.FixtureRequest) -> OpenClip:
    made = new_open_clip(CONFIGS[request.param], seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, value in made.module.named_buffers():  # BatchNorm's: as if it had been trained
        if name.endswith(("running_mean", "running_var")):
            value.add_(torch.rand(value.shape, generator=generator) / 10)
    return made


def images(clip: ImageTextModel, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, clip.image_size, clip.image_size, generator=generator)


def theirs(folder: Path, name: str, tmp_path: Path) -> nn.Module:
    """The model as open_clip's user opens it: an architecture by name, the weights by path."""
    config = tmp_path / f"{name}.json"
    config.write_text(json.dumps(json.loads((folder / CONFIG_NAME).read_bytes())["model_cfg"]))
    open_clip.add_model_config(config)
    return open_clip.create_model(name, pretrained=str(folder / WEIGHTS_NAME)).eval()


@torch.no_grad()
def assert_same(clip: OpenClip, model: Any) -> None:
    """The library's network gives the adapter's embeddings, from its own tokens."""
    pictures = images(clip)
    tokens = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])(CAPTIONS)
    torch.testing.assert_close(clip.tokenize(CAPTIONS), tokens)
    normalized = clip.preprocessing.normalized(pictures)
    torch.testing.assert_close(clip.encode_images(pictures), model.encode_image(normalized, normalize=True))
    torch.testing.assert_close(clip.encode_texts(CAPTIONS), model.encode_text(tokens, normalize=True))
    assert clip.logit_scale == pytest.approx(float(model.logit_scale.exp()))


def test_what_is_saved_opens_here_and_there(clip: OpenClip, tmp_path: Path) -> None:
    save_clip(clip, tmp_path / "saved", card="# Model")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {WEIGHTS_NAME, CONFIG_NAME, "README.md"}
    again = load_any_clip(tmp_path / "saved")
    assert isinstance(again, OpenClip)
    assert again.fingerprint == clip.fingerprint
    assert_same(again, theirs(tmp_path / "saved", "saved-here", tmp_path))
    assert_same(again, open_clip.create_model(f"local-dir:{tmp_path / 'saved'}").eval())


@pytest.mark.parametrize("method", ["par", "clean-clip", "fine-tuning"])
def test_a_purified_model_opens_with_the_library(clip: OpenClip, method: str, tmp_path: Path) -> None:
    few = {"steps": 2, "batch_size": 8, "chunk_size": 4, "learning_rate": 1e-3, "check_every": 1}
    pairs, before = open_pairs("shapes:24:1"), clip.fingerprint
    if method == "par":
        outcome = purify_with_par(clip, pairs, config=PARConfig(**few))
    elif method == "clean-clip":
        outcome = purify_with_clean_clip(clip, pairs, config=CleanClipConfig(**few))
    else:
        outcome = purify_with_fine_tuning(clip, pairs, config=FineTuningConfig(**few))
    assert outcome.purification.steps == 2
    assert clip.fingerprint == before
    assert isinstance(outcome.clip, OpenClip)
    save_clip(outcome.clip, tmp_path / "clean")
    assert_same(outcome.clip, theirs(tmp_path / "clean", f"purified-{method}", tmp_path))
    old, new = clip.module.state_dict(), load_file(tmp_path / "clean" / WEIGHTS_NAME)
    assert old.keys() == new.keys()
    kept = {name for name in new if torch.equal(old[name], new[name])}
    for name in ("visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", "text_projection"):
        assert name not in kept
    statistics = {name for name, _ in clip.module.named_buffers() if name in new}
    assert statistics <= kept, "BatchNorm keeps its statistics"
    assert bool(statistics) == ("visual.bn1.running_mean" in new)


def test_training_checkpoints_keep_their_form(clip: OpenClip, tmp_path: Path) -> None:
    state = OrderedDict((f"module.{name}", value) for name, value in clip.module.state_dict().items())
    (tmp_path / "given").mkdir()
    save_clip(clip, tmp_path / "hub")
    (tmp_path / "hub" / CONFIG_NAME).rename(tmp_path / "given" / CONFIG_NAME)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "given" / "epoch_3.pt")
    opened = load_any_clip(tmp_path / "given" / "epoch_3.pt")
    assert opened.fingerprint == clip.fingerprint
    save_clip(opened, tmp_path / "out")
    written = torch.load(tmp_path / "out" / "epoch_3.pt", weights_only=True)
    stored = written["state_dict"]
    assert stored.keys() == state.keys()
    assert all(stored[name].dtype == value.dtype for name, value in state.items())
    config = tmp_path / "as-trained.json"
    config.write_text(json.dumps(json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes())["model_cfg"]))
    open_clip.add_model_config(config)
    assert_same(clip, open_clip.create_model("as-trained", pretrained=str(tmp_path / "out" / "epoch_3.pt")).eval())


def test_openai_style_weights_tell_their_architecture(clip: OpenClip, tmp_path: Path) -> None:
    state = {name: value.half() for name, value in clip.module.state_dict().items()}
    sizes = {"input_resolution": clip.image_size, "context_length": 24, "vocab_size": 49_408}
    state |= {name: torch.tensor(value) for name, value in sizes.items()}
    torch.save(state, tmp_path / "weights.pt")
    opened = load_any_clip(tmp_path / "weights.pt")
    with torch.no_grad():
        near = opened.encode_images(images(clip)), clip.encode_images(images(clip))
    torch.testing.assert_close(*near, atol=2e-2, rtol=0)
    save_clip(opened, tmp_path / "out")
    written = torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    assert {name: (value.dtype, value.shape) for name, value in written.items()} == {
        name: (value.dtype, value.shape) for name, value in state.items()
    }


def test_a_torchscript_archive_is_refused_with_what_to_do(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    archive = tmp_path / "ViT-B-32.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(Scaled(), torch.ones(1)), archive)
    with pytest.raises(UnsafeCheckpointError) as found:
        load_any_clip(archive)
    assert "state_dict" in found.value.hint


def test_weights_that_do_not_fit_are_refused(clip: OpenClip, tmp_path: Path) -> None:
    save_clip(clip, tmp_path / "saved")
    body = json.loads((tmp_path / "saved" / CONFIG_NAME).read_bytes())
    huge = copy.deepcopy(body)
    huge["model_cfg"]["text_cfg"]["width"] = 8192
    (tmp_path / "saved" / CONFIG_NAME).write_text(json.dumps(huge))
    with pytest.raises(CheckpointMismatchError):
        load_any_clip(tmp_path / "saved")
    odd = copy.deepcopy(body)
    odd["model_cfg"]["vision_cfg"]["surprise"] = 1
    (tmp_path / "saved" / CONFIG_NAME).write_text(json.dumps(odd))
    with pytest.raises(ModelError, match="surprise"):
        load_any_clip(tmp_path / "saved")


def test_the_towers_are_all_of_it(clip: OpenClip) -> None:
    towers = [name for tower in ("image", "text") for name, _ in clip.tower(tower)]
    assert sorted([*towers, "logit_scale"]) == sorted(name for name, _ in clip.module.named_parameters())
    assert all(name.startswith("visual.") for name, _ in clip.tower("image"))


def test_texts_from_their_token_embeddings(clip: OpenClip) -> None:
    tokens = clip.tokenize(CAPTIONS)
    embedded = clip.embed_tokens(tokens)
    assert embedded.shape == (len(CAPTIONS), 24, 64)
    torch.testing.assert_close(clip.encode_token_embeddings(embedded, tokens), clip.encode_texts(CAPTIONS))
    clip.encode_token_embeddings(embedded, tokens)[0, 0].backward()
    assert all(value.grad is not None for name, value in clip.tower("text") if "token_embedding" in name)
    assert clip.truncated(CAPTIONS) == [False, False, False, False, True]
    assert clip.truncated(["x" * 10_000]) == [True]
    assert clip.tokenize(["x" * 10_000]).shape == (1, 24)
    assert clip.encode_texts([]).shape == (0, 32)


def test_patches_of_a_vit_lie_in_the_space_of_its_embeddings(clip: OpenClip) -> None:
    if not hasattr(clip.module.visual, "ln_post"):
        with pytest.raises(UnsupportedModelError, match="no patch tokens"):
            clip.encode_image_tokens(images(clip))
        return
    patches = clip.encode_image_tokens(images(clip))
    assert patches.shape == (3, 4, 32)
    visual: Any = copy.deepcopy(clip.module.visual)
    visual.output_tokens = True
    hidden = visual(clip.preprocessing.normalized(images(clip)))[1]
    torch.testing.assert_close(patches, hidden @ visual.proj)


def test_a_copy_is_trained_alone(clip: OpenClip) -> None:
    before, twin = clip.fingerprint, clip.copy()
    assert twin.fingerprint == before
    with torch.no_grad():
        for _, value in twin.tower("image"):
            value.mul_(0.5)
    assert clip.fingerprint == before != twin.fingerprint


def test_the_same_seed_draws_the_same_model() -> None:
    state = torch.get_rng_state()
    assert new_open_clip(VIT, seed=3).fingerprint == new_open_clip(VIT, seed=3).fingerprint
    assert new_open_clip(VIT, seed=4).fingerprint != new_open_clip(VIT, seed=3).fingerprint
    assert torch.equal(state, torch.get_rng_state())


def test_an_unknown_architecture_says_how_to_name_one() -> None:
    with pytest.raises(UnsupportedModelError, match="no architecture") as found:
        load_any_clip("open_clip:ViT-Z-99/openai")
    assert "open_clip:" in found.value.hint
