"""The adapter agrees with transformers' own processor and model, and refuses what is no CLIP."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unpoison.errors import CheckpointMismatchError, ModelError, UnsafeCheckpointError, UnsupportedModelError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import TINY, load_clip, read_preprocessing
from unpoison.types import ImageTextModel


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip_folder, tmp_path / "clip"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def compute_in(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that is fast in ``dtype``."""
    monkeypatch.setattr("unpoison.models.clip_transformers.inference_dtype", lambda _: dtype)


def test_embeddings_are_those_of_the_library(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    compute_in(torch.float32, monkeypatch)
    clip = load_clip(clip_folder)
    assert isinstance(clip, ImageTextModel)
    images, texts = [picture(32, 32, seed) for seed in range(3)], ["a cat", "a rather long dog", "owl"]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, **pixels)
        found_images = clip.encode_images(clip.preprocess(images))
        found_texts = clip.encode_texts(texts)
    torch.testing.assert_close(found_images, expected.image_embeds, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found_texts, expected.text_embeds, atol=1e-4, rtol=1e-3)
    assert clip.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    torch.testing.assert_close(found_images.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16])
def test_fast_precision_changes_little(
    clip_folder: Path, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, images = load_clip(clip_folder), torch.rand(4, 3, 32, 32)
    compute_in(torch.float32, monkeypatch)
    with torch.inference_mode():
        expected = clip.encode_images(images), clip.encode_texts(["a cat", "an owl"])
    compute_in(torch.bfloat16, monkeypatch)
    clip.module.to(weights)
    with torch.inference_mode():
        found = clip.encode_images(images), clip.encode_texts(["a cat", "an owl"])
    for given, wanted in zip(found, expected, strict=True):
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("half", [True, False])
def test_training_in_half_precision_takes_the_plain_form_of_attention(clip_folder: Path, half: bool) -> None:
    clip, images = load_clip(clip_folder), torch.rand(4, 3, 32, 32)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        clip.module.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            embeddings = torch.cat([clip.encode_images(images), clip.encode_texts(["a cat", "an owl"])])
        (embeddings @ embeddings.T).square().sum().backward()
        return torch.cat([value.grad.flatten() for value in clip.module.parameters() if value.grad is not None])

    exact = gradient(torch.float32)
    with torch.profiler.profile() as seen:
        found = gradient(torch.bfloat16 if half else torch.float32)
    fused = [event.key for event in seen.key_averages() if "flash_attention" in event.key]
    assert bool(fused) is not half
    assert float(torch.nn.functional.cosine_similarity(found, exact, dim=0)) > 0.99


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (50, 97), (31, 200), (20, 20), (500, 333)])
@pytest.mark.parametrize(
    "size", [{"size": {"shortest_edge": 32}}, {"size": {"shortest_edge": 40}}, {"size": {"height": 32, "width": 32}}]
)
def test_preprocessing_is_that_of_the_library(shape: tuple[int, int], size: dict) -> None:
    from transformers import CLIPImageProcessorPil

    image = picture(*shape)
    theirs = CLIPImageProcessorPil(**size, crop_size={"height": 32, "width": 32}, do_normalize=False)
    expected = theirs([image], return_tensors="np")["pixel_values"][0]
    ours = read_preprocessing(size | {"crop_size": {"height": 32, "width": 32}}, 32).fit(image)
    found = np.asarray(ours).transpose(2, 0, 1) / 255
    difference = 255 * np.abs(found - expected)
    # Pillow rounds between its two passes: where we compute the kept part only, a flip there may show as 2.
    assert difference.max() <= 2.01
    assert (difference > 1.01).mean() <= 0.001


def test_extreme_pictures_do_not_grow(clip_folder: Path) -> None:
    batch = load_clip(clip_folder).preprocess([Image.new("RGB", (1, 50_000), "red"), Image.new("L", (3, 3), 255)])
    assert batch.shape == (2, 3, 32, 32)
    assert batch.min() >= 0
    assert batch.max() == 1


def test_texts_longer_than_the_tower_are_said_to_be_cut_off(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    texts = ["a" * 38, "a" * 39, "a<|endoftext|>b", "plain", "a" * 10_000]
    assert clip.truncated(texts) == [False, True, True, False, True]
    assert clip.encode_texts(texts).shape == (5, 16)
    assert clip.tokens(["a" * 39])[0] != clip.tokens(["b" * 39])[0]
    assert clip.truncated([]) == []
    assert clip.encode_texts([]).shape == (0, 16)


def test_texts_in_batches_are_those_alone(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    texts = [f"class {i}" + "x" * (i % 20) for i in range(300)]
    with torch.no_grad():
        together = clip.encode_texts(texts)
        alone = torch.cat([clip.encode_texts([text]) for text in texts[::50]])
    torch.testing.assert_close(together[::50], alone, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_images(clip_folder: Path) -> None:
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    load_clip(clip_folder).encode_images(images)[:, 0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


TEXTS = ["a cat", "a rather long dog, longer than its tower can hold", "owl<|endoftext|>more", "a"]


def test_token_embeddings_lead_to_the_same_place_as_texts(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    with torch.no_grad():
        tokens = clip.tokenize(TEXTS)
        embedded = clip.embed_tokens(tokens)
        expected = clip.encode_texts(TEXTS)
        found = clip.encode_token_embeddings(embedded, tokens)
        # The place of the end is read from the tokens, all else from the embeddings.
        others = clip.encode_token_embeddings(clip.embed_tokens(clip.tokenize(["xyz"])), clip.tokenize(["abc"]))
        again = clip.encode_texts(TEXTS)
    assert tokens.shape == (4, 40)
    assert embedded.shape == (4, 40, 32)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(others, clip.encode_texts(["xyz"]).detach(), atol=1e-2, rtol=1e-2)
    assert clip.tokenize([]).numel() == 0


def test_gradients_reach_the_token_embeddings_up_to_the_end(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    tokens = clip.tokenize(["ab", "abcdef"])
    embedded = clip.embed_tokens(tokens).detach().requires_grad_()
    clip.encode_token_embeddings(embedded, tokens)[:, 0].sum().backward()
    assert embedded.grad is not None
    reached = embedded.grad.abs().sum(dim=2) > 0
    assert reached.tolist() == [[True] * 4 + [False] * 4, [True] * 8]
    assert all(value.grad is None for _, value in clip.tower("image"))


def test_a_failed_pass_leaves_the_text_tower_as_it_was(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    tokens = clip.tokenize(["abc"])
    before = clip.encode_texts(["abc"]).detach()
    with pytest.raises(RuntimeError):
        clip.encode_token_embeddings(torch.zeros(1, tokens.shape[1], 7), tokens)
    torch.testing.assert_close(clip.encode_texts(["abc"]).detach(), before)


def test_image_tokens_are_the_patches_in_the_space_of_the_embeddings(clip_folder: Path) -> None:
    clip, images = load_clip(clip_folder), torch.rand(2, 3, 32, 32, requires_grad=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (clip.image_mean, clip.image_std))
    found = clip.encode_image_tokens(images)
    vision, state = clip.module.get_submodule("vision_model"), clip.module.state_dict()
    hidden = vision(pixel_values=(images - mean) / std).last_hidden_state.detach().double().numpy()
    centred = hidden - hidden.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    norm = {key: state[f"vision_model.post_layernorm.{key}"].double().numpy() for key in ("weight", "bias")}
    projection = state["visual_projection.weight"].double().numpy()
    every = (scaled * norm["weight"] + norm["bias"]) @ projection.T
    assert found.shape == (2, 16, 16)
    np.testing.assert_allclose(found.detach().numpy(), every[:, 1:], atol=1e-4)
    first = every[:, 0] / np.linalg.norm(every[:, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(clip.encode_images(images).detach().numpy(), first, atol=1e-4)
    found[:, 0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_the_mean_color_is_zero_for_the_tower(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    plain = torch.tensor(clip.image_mean).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    model: Any = clip.module
    expected = model.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32)).pooler_output
    torch.testing.assert_close(clip.encode_images(plain), torch.nn.functional.normalize(expected, dim=-1))


def test_a_copy_is_independent(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    clip.encode_texts(["using the tokenizer changes its padding", "not its fingerprint"])
    before, twin = clip.fingerprint, clip.copy()
    assert twin.fingerprint == before
    with torch.no_grad():
        for _, value in (*twin.tower("image"), *twin.tower("text")):
            value.add_(1)
    assert clip.fingerprint == before != twin.fingerprint
    storage = {value.data_ptr() for value in clip.module.parameters()}
    assert storage.isdisjoint(value.data_ptr() for value in twin.module.parameters())


def test_each_tower_holds_what_its_embeddings_depend_on(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    towers = {"image": dict(clip.tower("image")), "text": dict(clip.tower("text"))}
    names = {name for name, _ in clip.module.named_parameters()}
    assert not towers["image"].keys() & towers["text"].keys()
    assert names - towers["image"].keys() - towers["text"].keys() == {"logit_scale"}
    for which, embed in (
        ("image", lambda: clip.encode_images(torch.rand(2, 3, 32, 32))),
        ("text", lambda: clip.encode_texts(["a", "b"])),
    ):
        clip.module.zero_grad()
        embed()[:, 0].sum().backward()
        reached = {name for name, value in clip.module.named_parameters() if value.grad is not None}
        assert reached == towers[which].keys()


def test_the_fingerprint_follows_weights_tokenizer_and_preprocessing(folder: Path) -> None:
    clip = load_clip(folder)
    first = clip.fingerprint
    clip.encode_texts(["a", "bcd"])
    assert clip.fingerprint == first == load_clip(folder).fingerprint
    with torch.no_grad():
        clip.module.get_parameter("logit_scale").add_(1)
    prints = {first, clip.fingerprint}
    for name, key, value in [
        ("preprocessor_config.json", "image_mean", [0.4, 0.5, 0.5]),
    ]:
        text = (folder / name).read_text()
        (folder / name).write_text(json.dumps(json.loads(text) | {key: value}))
        prints.add(load_clip(folder).fingerprint)
        (folder / name).write_text(text)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    entries = vocabulary["model"]["vocab"]
    entries["a"], entries["b"] = entries["b"], entries["a"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    prints.add(load_clip(folder).fingerprint)
    assert len(prints) == 4


def test_using_it_leaves_the_weights(clip_folder: Path) -> None:
    clip = load_clip(clip_folder)
    before = hash_weights(clip.module.state_dict())
    clip.encode_images(torch.rand(1, 3, 32, 32))
    clip.encode_texts(["a"])
    assert hash_weights(clip.module.state_dict()) == before


def test_remote_code_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(UnsafeCheckpointError, match="auto_map"):
        load_clip(folder)


def test_gaps_and_nan_in_the_weights_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "logit_scale"}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match="logit_scale"):
        load_clip(folder)
    state["logit_scale"] = torch.tensor(float("nan"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        load_clip(folder)


def test_a_folder_without_its_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_clip(folder)


@pytest.mark.parametrize("kind", ["vit", "siglip", "siglip2"])
def test_what_is_no_clip_is_refused_by_name(folder: Path, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModelError, match=f"found '{kind}'"):
        load_clip(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_clip(tmp_path / "absent")


@pytest.mark.parametrize(
    "settings", [{"crop_size": 16}, {"size": {"shortest_edge": 16}}, {"image_mean": [0.5]}, {"image_std": [1, 1, 0]}]
)
def test_preprocessing_of_another_model_is_refused(settings: dict) -> None:
    with pytest.raises(UnsupportedModelError):
        read_preprocessing(settings, 32)


@pytest.mark.parametrize("settings", [{"size": {}}, {"image_mean": "x"}, {"resample": 99}])
def test_damaged_preprocessing_is_refused(settings: dict) -> None:
    with pytest.raises(ModelError):
        read_preprocessing(settings, 32)


def test_the_bundled_clip_opens_or_says_that_it_is_absent() -> None:
    if TINY.is_dir():
        assert load_clip("tiny").image_size == 32
    else:
        with pytest.raises(ModelError, match="tiny CLIP is not in this installation"):
            load_clip("tiny")
