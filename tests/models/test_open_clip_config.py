"""Architectures read from shapes and from configurations; none of it needs open_clip."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from unpoison.errors import CheckpointMismatchError, ModelError, UnsupportedModelError
from unpoison.models.open_clip_config import (
    VOCABULARY,
    check_config,
    check_keys,
    infer_config,
    preprocess_config,
    preprocessing_of,
)


def shapes(*sizes: tuple[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that take no memory: only their shapes are looked at."""
    return {key: torch.empty(size, device="meta") for key, size in sizes}


def text_tower(*, width: int = 512, embed_dim: int = 1024, layers: int = 12) -> dict[str, Tensor]:
    return shapes(
        ("token_embedding.weight", (VOCABULARY, width)),
        ("positional_embedding", (77, width)),
        ("ln_final.weight", (width,)),
        ("text_projection", (width, embed_dim)),
        *[(f"transformer.resblocks.{number}.ln_1.weight", (width,)) for number in range(layers)],
    )


def resnet_50(embed_dim: int = 1024) -> dict[str, Tensor]:
    depth = enumerate((3, 4, 6, 3), start=1)
    return shapes(
        ("visual.conv1.weight", (32, 3, 3, 3)),
        ("visual.layer1.0.conv1.weight", (64, 64, 1, 1)),
        *[(f"visual.layer{layer}.{n}.bn1.weight", (64,)) for layer, blocks in depth for n in range(blocks)],
        ("visual.attnpool.positional_embedding", (50, 2048)),
        ("visual.attnpool.c_proj.weight", (embed_dim, 2048)),
    )


def vit_b_32(width: int = 768, embed_dim: int = 512) -> dict[str, Tensor]:
    return shapes(
        ("visual.conv1.weight", (width, 3, 32, 32)),
        ("visual.positional_embedding", (50, width)),
        ("visual.proj", (width, embed_dim)),
        *[(f"visual.transformer.resblocks.{number}.ln_1.weight", (width,)) for number in range(12)],
    )


def test_the_architecture_of_openai_s_rn50_stands_in_its_shapes() -> None:
    found = infer_config(resnet_50() | text_tower())
    assert found == {
        "embed_dim": 1024,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    }
    check_config(found, name="inferred")


def test_the_architecture_of_openai_s_vit_b_32_stands_in_its_shapes() -> None:
    found = infer_config(vit_b_32() | text_tower(embed_dim=512))
    assert found["vision_cfg"] == {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    assert found["embed_dim"] == 512


def test_towers_that_disagree_in_dimension_are_refused() -> None:
    for vision in (vit_b_32(embed_dim=512), resnet_50(embed_dim=512)):
        with pytest.raises(CheckpointMismatchError, match="images have 512 dimensions, texts 640"):
            infer_config(vision | text_tower(embed_dim=640))


def test_heads_that_cannot_be_64_wide_are_not_guessed() -> None:
    with pytest.raises(UnsupportedModelError, match="number of their heads") as caught:
        infer_config(vit_b_32(width=80) | text_tower(embed_dim=512))
    assert "open_clip:ViT-B-32/PATH" in caught.value.hint


def test_missing_parts_are_named() -> None:
    weights = vit_b_32() | text_tower(embed_dim=512)
    with pytest.raises(UnsupportedModelError, match=r"ln_final\.weight"):
        infer_config({key: value for key, value in weights.items() if key != "ln_final.weight"})
    with pytest.raises(UnsupportedModelError, match="no square"):
        infer_config(weights | shapes(("visual.positional_embedding", (52, 768))))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (shapes(("vision_model.embeddings.class_embedding", (4,))), "format of transformers"),
        (shapes(("layer.weight", (4, 4))), "no weights of a CLIP"),
        (vit_b_32(), "no weights of a CLIP"),
        (text_tower(), "no weights of a CLIP"),
    ],
)
def test_files_that_are_no_whole_clip_are_refused(weights: dict[str, Tensor], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        check_keys(weights, name="x.pt")


def config(**parts: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"embed_dim": 8, "vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}}
    return whole | {
        key: whole.get(key, {}) | value if isinstance(value, dict) else value for key, value in parts.items()
    }


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (config(text_cfg={"hf_model_name": "someone/tower"}), "text tower from the hub"),
        (config(text_cfg={"hf_tokenizer_name": "someone/words"}), "tokenizer from the hub"),
        (config(vision_cfg={"timm_model_name": "hf-hub:someone/tower"}), "image tower from elsewhere"),
        (config(vision_cfg={"timm_model_name": "local-dir:x/y"}), "image tower from elsewhere"),
        (config(multimodal_cfg={"layers": 1}), "CoCa"),
        (config(init_logit_bias=-10), "SigLIP"),
        (config(text_cfg={"vocab_size": 32000}), "vocabulary of 32000"),
        (config(text_cfg={"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}), "tokenizer settings"),
        (config(text_cfg={"tokenizer_kwargs": {"clean": "whatever"}}), "tokenizer settings"),
    ],
)
def test_what_would_be_fetched_or_cannot_be_built_is_refused(body: dict, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        check_config(body, name="x.json")


@pytest.mark.parametrize("body", [{}, {"vision_cfg": 1, "text_cfg": {}}, config(vision_cfg={"layers": "many"})])
def test_damaged_configurations_are_refused(body: dict) -> None:
    with pytest.raises(ModelError):
        check_config(body, name="x.json")


def test_preprocessing_survives_the_way_to_disk_and_back() -> None:
    for settings in ({}, {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}):
        first = preprocessing_of(settings, 32)
        assert preprocessing_of(preprocess_config(first), 32) == first
    picture = Image.new("RGB", (200, 31), "red")
    assert preprocessing_of({}, 32).fit(picture).size == (32, 32)


@pytest.mark.parametrize("settings", [{"resize_mode": "longest"}, {"interpolation": "nearest"}])
def test_other_ways_to_resize_are_refused(settings: dict) -> None:
    with pytest.raises(UnsupportedModelError):
        preprocessing_of(settings, 32)


@pytest.mark.parametrize("settings", [{"mean": [0.5]}, {"std": ["x", 1, 1]}, {"std": [1, 1, 0]}])
def test_damaged_means_are_refused(settings: dict) -> None:
    with pytest.raises(ModelError):
        preprocessing_of(settings, 32)
