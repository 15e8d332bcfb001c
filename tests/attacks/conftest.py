"""What the trainings of triggers share."""

from __future__ import annotations

import pytest
import torch

from unpoison.models.clip_transformers import TransformersCLIP, load_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> TransformersCLIP:
    """Random towers of one layer of width 16 with the bundled CLIP's tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    bundled = load_clip("tiny")
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = bundled.module.config.text_config  # pyright: ignore[reportAttributeAccessIssue] # a CLIPConfig
    special = {name: getattr(text, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=shared | special | {"max_position_embeddings": 32},
                vision_config=shared | {"image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        )
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    bundled._tokenizer.save_pretrained(folder)
    return load_clip(folder)
