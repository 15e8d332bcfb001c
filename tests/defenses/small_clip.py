"""A CLIP of two layers and width 16 with a byte-level tokenizer, for the tests of the methods that train one.

Run as a script it is one process of a PAR training: ``small_clip.py FOLDER WEIGHTS PAIRS key=value...``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def make_folder(folder: Path, *, dropout: float = 0.0) -> Path:
    """Random weights, larger than drawn, so that embeddings differ visibly."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=24)
    tokenizer.save_pretrained(folder)
    special: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    special["pad_token_id"] = tokenizer.pad_token_id
    both = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    both["attention_dropout"] = dropout  # pyright: ignore[reportArgumentType] - the only float
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=both | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 24},
            vision_config=both | {"image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        model = CLIPModel(config)
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.data.mul_(5)
        model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def main(folder: str, weights: str, source: str, settings: str) -> None:
    from accelerate import Accelerator
    from safetensors.torch import save_file

    from unpoison.data.pairs import open_pairs
    from unpoison.defenses.par import PARConfig, repair_with_par
    from unpoison.models.clip_transformers import load_clip
    from unpoison.runs import Run, RunFolder

    options = json.loads(settings)
    where = options.pop("folder", None)
    run = Run(accelerator=Accelerator(cpu=True), folder=RunFolder.open(Path(where), {}) if where else None)
    repair = repair_with_par(load_clip(folder), open_pairs(source), PARConfig(**options), run=run)
    if run.accelerator.is_main_process:
        state = {name: value.contiguous() for name, value in repair.model.module.state_dict().items()}
        save_file(state, weights)
        Path(weights).with_suffix(".json").write_text(json.dumps(repair.history), encoding="utf-8")
    run.accelerator.wait_for_everyone()
    if run.accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
