"""A CLIP of the transformers library as an :class:`unpoison.types.ImageTextModel`."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from unpoison.errors import ModelError, UnsupportedModelError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.folders import check_model_folder, find_model_folder, open_pretrained, read_json
from unpoison.types import Embeddings, Images, PatchEmbeddings, TokenEmbeddings, Tokens, Tower

TINY = Path(__file__).parents[1] / "assets" / "tiny_clip"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_TEXT_BATCH = 256
_TOWERS = {
    "image": ("vision_model.", "visual_projection."),
    "text": ("text_model.", "text_projection."),
}
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pictures become the tower's input: the short side scaled to ``short_side`` (or, where that is None, both
    sides to ``image_size``), the centre kept, mean and std for images in [0, 1]. ``resample`` is Pillow's code."""

    image_size: int
    short_side: int | None
    resample: int = int(Image.Resampling.BICUBIC)
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD

    def fit(self, image: Image.Image) -> Image.Image:
        """Scale and crop in one step, with the rounding that transformers' processor has.

        Only the part that is kept is computed: a picture of one row of a million pixels gets no chance to grow.
        """
        width, height = image.size
        size = self.image_size
        if width == height == size == (self.short_side or size):
            return image
        if self.short_side is None:
            return image.resize((size, size), Image.Resampling(self.resample))
        short = min(width, height)
        scaled = tuple(
            self.short_side if side == short else int(self.short_side * side / short) for side in (width, height)
        )
        left, top = ((side - size) // 2 for side in scaled)
        across, down = width / scaled[0], height / scaled[1]
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), Image.Resampling(self.resample), box=box)


class TransformersCLIP:
    """CLIPModel, its tokenizer and its preprocessing. The module is the caller's to train; nothing here changes it."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: Preprocessing) -> None:
        self._model = model
        self._config: Any = model.config  # the stubs allow None and plain dictionaries for its parts
        self._tokenizer = tokenizer
        self.preprocessing = preprocessing
        # Taken now: using the tokenizer changes the padding that it would describe itself with.
        self._tokenizer_text = tokenizer.backend_tokenizer.to_str()

    @property
    def image_size(self) -> int:
        return self.preprocessing.image_size

    @property
    def image_mean(self) -> tuple[float, float, float]:
        return self.preprocessing.mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        return self.preprocessing.std

    @property
    def module(self) -> nn.Module:
        return self._model

    @property
    def logit_scale(self) -> float:
        return float(self._model.logit_scale.detach().exp())

    @property
    def fingerprint(self) -> str:
        """Content hash of weights, architecture, tokenizer and preprocessing, computed anew at each call."""
        config = {key: value for key, value in self._config.to_dict().items() if key not in _VOLATILE}
        parts = (
            hash_weights(self._model.state_dict()),
            json.dumps(config, sort_keys=True, default=str),
            self._tokenizer_text,
            repr(self.preprocessing),
        )
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    @property
    def max_tokens(self) -> int:
        """Longest text, in tokens, with the marks of its start and end."""
        return min(self._config.text_config.max_position_embeddings, self._tokenizer.model_max_length)

    def preprocess(self, images: Sequence[object]) -> Images:
        """RGB pictures of any size to [b, 3, image_size, image_size] in [0, 1], channels last in memory."""
        size = self.image_size
        pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise TypeError(f"expected Pillow images, got {type(image).__name__}")
            pixels[row] = np.asarray(self.preprocessing.fit(image if image.mode == "RGB" else image.convert("RGB")))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(255)

    def encode_images(self, images: Images) -> Embeddings:
        """Unit embeddings [b, d] in float32 of images in [0, 1]; gradients flow to the images and the weights."""
        with self._precision(images.device):
            output: Any = self._model.get_image_features(pixel_values=self._normalised(images))
        return F.normalize(output.pooler_output.float(), dim=-1)

    def encode_image_tokens(self, images: Images) -> PatchEmbeddings:
        """Projected patches [b, p, d] in float32, not scaled to length 1; the class token is left out."""
        with self._precision(images.device):
            output: Any = self._model.vision_model(pixel_values=self._normalised(images))
            patches = self._model.vision_model.post_layernorm(output.last_hidden_state[:, 1:])
            return self._model.visual_projection(patches).float()

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Unit embeddings [b, d] in float32; what is longer than ``max_tokens`` is cut off."""
        batches = [texts[start : start + _TEXT_BATCH] for start in range(0, len(texts), _TEXT_BATCH)]
        if not batches:
            return torch.zeros(0, self._config.projection_dim, device=self._model.device)
        return torch.cat([self._encode_tokens(self.tokenize(batch)) for batch in batches])

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids [b, t], padded on the right to the longest text."""
        if not texts:
            return torch.zeros(0, 0, dtype=torch.long, device=self._model.device)
        options: Any = {"padding": True, "truncation": True, "max_length": self.max_tokens, "return_tensors": "pt"}
        return self._tokenizer(list(texts), **options)["input_ids"].to(self._model.device)

    def embed_tokens(self, tokens: Tokens) -> TokenEmbeddings:
        """Token embeddings [b, t, w] without positions."""
        return self._model.text_model.embeddings.token_embedding(tokens)

    def encode_token_embeddings(self, embedded: TokenEmbeddings, tokens: Tokens) -> Embeddings:
        """Unit embeddings [b, d] in float32 of ``embedded`` [b, t, w] in the place of the embeddings of ``tokens``."""
        with replaced_output(self._model.text_model.embeddings.token_embedding, embedded):
            return self._encode_tokens(tokens)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Whether something of each text is lost: it is too long, or holds the tokenizer's mark of the end."""
        ends = self._tokenizer.eos_token_id
        encoded = self._tokenizer(list(texts), verbose=False).input_ids if texts else []
        return [len(tokens) > self.max_tokens or ends in tokens[:-1] for tokens in encoded]

    def tokens(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """What the text tower sees of each text: token ids up to the first mark of the end."""
        ends = self._tokenizer.eos_token_id
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens).input_ids if texts else []
        return [tuple(ids[: ids.index(ends)]) for ids in encoded]

    def copy(self) -> TransformersCLIP:
        """A deep copy of the network; tokenizer and preprocessing, which nobody trains, are shared."""
        twin = copy.copy(self)
        twin._model = copy.deepcopy(self._model)
        twin._config = twin._model.config
        return twin

    def tower(self, which: Tower) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of one tower with its projection, in the module's order."""
        return [(name, value) for name, value in self._model.named_parameters() if name.startswith(_TOWERS[which])]

    def _encode_tokens(self, tokens: Tokens) -> Embeddings:
        ends = (tokens == self._tokenizer.eos_token_id).long()
        # What follows the first mark of the end, padding most of all, is not attended to.
        mask = (ends.cumsum(dim=1) - ends == 0).long()
        with self._precision(tokens.device):
            output: Any = self._model.get_text_features(input_ids=tokens, attention_mask=mask)
        return F.normalize(output.pooler_output.float(), dim=-1)

    def _normalised(self, images: Images) -> Images:
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        return (images - mean) / std

    def _precision(self, device: torch.device) -> Any:
        # Training picks its own precision; without gradients the fast one is chosen here.
        dtype = inference_dtype(device)
        if dtype == torch.float32 or torch.is_grad_enabled():
            return nullcontext()
        return torch.autocast(device.type, dtype=dtype)


@contextmanager
def replaced_output(module: nn.Module, output: Tensor) -> Iterator[None]:
    """``module`` returns ``output`` inside, whatever it is given, and itself again afterwards.

    So the library's own forward pass runs on other token embeddings, with its positions, mask and pooling.
    """
    handle = module.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()


def inference_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine computes in it, else float32: emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def load_clip(model: str | Path = "tiny") -> TransformersCLIP:
    """Open "tiny" (the bundled one), a folder that save_pretrained wrote, or a hub id; weights as safetensors only.

    Raises ModelError where there is none or it is damaged, UnsafeCheckpointError where it asks for code,
    CheckpointMismatchError, UnsupportedModelError for a model that is no CLIP.
    """
    if model == "tiny" and not TINY.is_dir():
        raise ModelError("The bundled tiny CLIP is not in this installation.", hint="Give --clip a folder or a hub id.")
    folder = TINY if model == "tiny" else find_model_folder(model)
    check_model_folder(folder)
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.exists() else None
    if kind != "clip":
        raise UnsupportedModelError(
            f"{model}: expected a config.json of model_type 'clip', found {kind!r}.",
            hint="Give a CLIP in the format of transformers, such as openai/clip-vit-base-patch32.",
        )
    network: Any = open_pretrained(CLIPModel, folder, attn_implementation="sdpa").eval()
    tokenizer = _open_tokenizer(folder, vocabulary=network.config.text_config.vocab_size)
    path = folder / "preprocessor_config.json"
    settings = read_json(path) if path.exists() else {}
    return TransformersCLIP(network, tokenizer, read_preprocessing(settings, network.config.vision_config.image_size))


def read_preprocessing(settings: Mapping[str, Any], image_size: int) -> Preprocessing:
    """The settings of preprocessor_config.json. Raises UnsupportedModelError for what does not give ``image_size``."""
    try:
        size, crop = settings.get("size", image_size), settings.get("crop_size", image_size)
        crop = int(crop["height"] if isinstance(crop, Mapping) else crop)
        if isinstance(size, Mapping):
            short = int(size["shortest_edge"]) if "shortest_edge" in size else None
            side = int(size["height"]) if short is None else crop
        else:
            short, side = int(size), crop
        factor = 255 * float(settings.get("rescale_factor", 1 / 255))
        mean = tuple(float(value) / factor for value in settings.get("image_mean", OPENAI_MEAN))
        std = tuple(float(value) / factor for value in settings.get("image_std", OPENAI_STD))
        resample = int(Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"preprocessor_config.json: not usable ({error!r}).", hint="Fetch the file again from the publisher."
        ) from error
    if side != image_size or (short is not None and short < side) or len(mean) != 3 or len(std) != 3 or 0 in std:
        raise UnsupportedModelError(
            f"preprocessor_config.json: expected RGB pictures of {image_size} px, found size {size}, crop {crop}.",
            hint="Give the preprocessing that belongs to this model.",
        )
    return Preprocessing(image_size=side, short_side=short, resample=resample, mean=mean, std=std)


def _open_tokenizer(folder: Path, *, vocabulary: int) -> CLIPTokenizer:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust tokenizer raises plain Exception for a damaged file
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"{folder}: its tokenizer cannot be read ({reason}).", hint="Fetch the folder again."
        ) from error
    tokenizer.padding_side = "right"  # positions count from the left
    known = tokenizer.get_vocab()
    # Without its files the tokenizer opens as an empty one; with another model's, ids fall off the embedding's end.
    if len(known) <= 3 or max(known.values()) >= vocabulary:
        raise ModelError(
            f"{folder}: a tokenizer of {len(known)} entries does not fit a text tower of {vocabulary}.",
            hint="The folder needs the model's own tokenizer.json, or vocab.json and merges.txt.",
        )
    return tokenizer
