"""The architecture of an open_clip or OpenAI-style CLIP: from its configuration, or from the shapes of its weights.

Nothing here needs open_clip: what it cannot build, or would fetch from elsewhere to build, is refused before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from unpoison.errors import CheckpointMismatchError, ModelError, UnsupportedModelError
from unpoison.models.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing

CONFIG_NAME = "open_clip_config.json"
VOCABULARY = 49_408
HEAD_WIDTH = 64
_CLEANING = ("lower", "canonicalize", "whitespace")
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_GIVE_NAME = "Name the architecture, as in open_clip:ViT-B-32/PATH, or put its open_clip_config.json beside the file."


class OpenClipPreprocessing(Preprocessing):
    """As torchvision rounds: half a pixel left over goes to the even side."""

    @staticmethod
    def offset(side: int, size: int) -> int:
        return round((side - size) / 2)


def check_keys(weights: Mapping[str, object], *, name: str) -> None:
    """Raises UnsupportedModelError, saying what to give instead, where the keys are not those of both towers."""
    text = any(f"{tower}token_embedding.weight" in weights for tower in ("", "text."))
    if text and any(key.startswith("visual.") for key in weights):
        return
    if any(key.startswith("vision_model.") for key in weights):
        raise UnsupportedModelError(
            f"{name}: weights in the format of transformers, which need their config.json and tokenizer.",
            hint="Give the folder that holds them.",
        )
    raise UnsupportedModelError(
        f"{name}: these are no weights of a CLIP, the first keys are {', '.join(list(weights)[:3])}.",
        hint="Give both towers in one file, under the keys of OpenAI's CLIP or of open_clip.",
    )


def infer_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model_cfg of OpenAI-style weights: all but two things stand in the shapes.

    Those two are taken to be OpenAI's: heads are 64 wide, the activation is QuickGELU.
    Raises UnsupportedModelError where heads cannot be 64 wide, CheckpointMismatchError where the towers disagree.
    """
    try:
        vision, width = _vision_config(weights), int(weights["ln_final.weight"].shape[0])
        projected = int(weights[_projection_key(weights)].shape[-1 if "visual.proj" in weights else 0])
        embed_dim = int(weights["text_projection"].shape[1])
        context, vocabulary = (int(weights[key].shape[0]) for key in ("positional_embedding", "token_embedding.weight"))
    except (KeyError, IndexError) as error:
        raise UnsupportedModelError(
            f"the architecture cannot be read from the weights: {error} is missing or of another shape.",
            hint=_GIVE_NAME,
        ) from error
    if projected != embed_dim:
        raise CheckpointMismatchError(
            f"the towers disagree: images have {projected} dimensions, texts {embed_dim}.",
            missing=[],
            unexpected=[],
            hint="Both towers must project into one space; take them from one checkpoint.",
        )
    if width % HEAD_WIDTH or vision["width"] * (32 if "visual.proj" not in weights else 1) % HEAD_WIDTH:
        raise UnsupportedModelError(
            f"towers {vision['width']} and {width} wide: the number of their heads does not stand in the weights.",
            hint=_GIVE_NAME,
        )
    text = {
        "context_length": context,
        "vocab_size": vocabulary,
        "width": width,
        "heads": width // HEAD_WIDTH,
        "layers": _count(weights, "transformer.resblocks."),
    }
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


def check_config(config: Mapping[str, Any], *, name: str) -> None:
    """Refuse what would be fetched from elsewhere, is no plain pair of towers, or has another tokenizer.

    Raises ModelError for a configuration without towers, UnsupportedModelError.
    """
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping) or not isinstance(config.get("embed_dim"), int):
        raise ModelError(
            f"{name}: expected embed_dim, vision_cfg and text_cfg, found {sorted(map(str, config))[:8]}.",
            hint="Fetch the file again from the publisher.",
        )
    layers = [part.get("layers", 12) for part in (vision, text)]
    if not all(isinstance(count, int) for part in layers for count in (part if isinstance(part, list) else [part])):
        raise ModelError(f"{name}: expected numbers of layers, found {layers}.", hint="Fetch the file again.")
    timm = str(vision.get("timm_model_name", ""))
    vocabulary = text.get("vocab_size", VOCABULARY)
    cleaning = text.get("tokenizer_kwargs") or {}
    problems = {
        "a text tower from the hub": text.get("hf_model_name"),
        "a tokenizer from the hub": text.get("hf_tokenizer_name"),
        f"an image tower from elsewhere ({timm})": ":" in timm or "/" in timm,
        "a decoder (CoCa)": config.get("multimodal_cfg"),
        "a bias on the logits (SigLIP)": config.get("init_logit_bias"),
        f"a vocabulary of {vocabulary} (the tokenizer has {VOCABULARY})": vocabulary != VOCABULARY,
        f"tokenizer settings {cleaning}": not isinstance(cleaning, Mapping)
        or any(key != "clean" or value not in _CLEANING for key, value in cleaning.items()),
    }
    found = [what for what, present in problems.items() if present]
    if found:
        raise UnsupportedModelError(
            f"{name}: {found[0]} is not supported.", hint="Give a CLIP with towers and tokenizer of open_clip's own."
        )


def preprocessing_of(settings: Mapping[str, Any], image_size: int) -> OpenClipPreprocessing:
    """The preprocess_cfg of a configuration. Raises ModelError, UnsupportedModelError."""
    mode, filtering = settings.get("resize_mode") or "shortest", settings.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or filtering not in _RESAMPLE:
        raise UnsupportedModelError(
            f"pictures resized as {mode!r} by {filtering!r} are not supported.",
            hint="Supported: shortest and squash, bicubic and bilinear.",
        )
    try:
        mean, std = (
            (float(red), float(green), float(blue))
            for red, green, blue in (settings.get("mean") or OPENAI_MEAN, settings.get("std") or OPENAI_STD)
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"mean or std is not three numbers ({error}).", hint="Mend open_clip_config.json.") from error
    if not all(value > 0 for value in std):
        raise ModelError(f"expected std > 0, got {std}.", hint="Mend open_clip_config.json.")
    return OpenClipPreprocessing(
        image_size=image_size,
        short_side=None if mode == "squash" else image_size,
        resample=int(_RESAMPLE[filtering]),
        mean=mean,
        std=std,
    )


def preprocess_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The preprocess_cfg that :func:`preprocessing_of` reads."""
    filters = {int(code): name for name, code in _RESAMPLE.items()}
    return {
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": filters[preprocessing.resample],
        "resize_mode": "squash" if preprocessing.short_side is None else "shortest",
    }


def _vision_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    if "visual.proj" in weights:
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        grid = _root(int(weights["visual.positional_embedding"].shape[0]) - 1)
        layers = _count(weights, "visual.transformer.resblocks.")
        return {"image_size": patch * grid, "layers": layers, "width": width, "patch_size": patch}
    grid = _root(int(weights["visual.attnpool.positional_embedding"].shape[0]) - 1)
    return {
        "image_size": 32 * grid,
        "layers": [_count(weights, f"visual.layer{number}.") for number in (1, 2, 3, 4)],
        "width": int(weights["visual.layer1.0.conv1.weight"].shape[0]),
        "patch_size": None,
    }


def _projection_key(weights: Mapping[str, Tensor]) -> str:
    return "visual.proj" if "visual.proj" in weights else "visual.attnpool.c_proj.weight"


def _root(patches: int) -> int:
    root = round(patches**0.5)
    if root < 1 or root * root != patches:
        raise UnsupportedModelError(f"{patches} patches are no square of pictures.", hint=_GIVE_NAME)
    return root


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})
