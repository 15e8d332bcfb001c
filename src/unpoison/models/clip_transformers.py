"""A CLIP of the transformers library as an :class:`unpoison.types.ImageTextModel`."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from unpoison.errors import ModelError, UnsupportedModelError
from unpoison.models.checkpoints import hash_weights, load_into, read_checkpoint
from unpoison.models.clip_origin import (
    ClipOrigin,
    companions_of,
    describe_checkpoint,
    describe_folder,
    fit_shapes,
    whole_folder,
    write_clip,
)
from unpoison.models.folders import check_model_folder, file_inside, find_model_folder, open_pretrained, read_json
from unpoison.models.open_clip_config import CONFIG_NAME
from unpoison.models.preprocessing import Preprocessing, read_preprocessing
from unpoison.types import Embeddings, Images, PatchEmbeddings, TokenEmbeddings, Tokens, Tower

TINY = Path(__file__).parents[1] / "assets" / "tiny_clip"
_TEXT_BATCH = 256
_TOWERS = {
    "image": ("vision_model.", "visual_projection."),
    "text": ("text_model.", "text_projection."),
}
_RENAMED = (
    "The weights lie in the given folder under other keys than transformers has for them: they are written under its "
    "own keys and in the type that they were computed in."
)
_FOREIGN = (
    f"The given folder holds {CONFIG_NAME} as well: it was opened with transformers, nothing is written for open_clip, "
    "and that file is left out."
)
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


class TransformersCLIP:
    """CLIPModel, its tokenizer and its preprocessing. The module is the caller's to train; nothing here changes it."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        preprocessing: Preprocessing,
        *,
        origin: ClipOrigin | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.notes = notes
        """How a saved folder will differ from the one that was opened, beside the weights."""
        self._model = model
        self._origin = origin
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
        return self.preprocessing.batch(images)

    def encode_images(self, images: Images) -> Embeddings:
        """Unit embeddings [b, d] in float32 of images in [0, 1]; gradients flow to the images and the weights."""
        with fast_precision(self._model):
            output: Any = self._model.get_image_features(pixel_values=self.preprocessing.normalized(images))
        return F.normalize(output.pooler_output.float(), dim=-1)

    def encode_image_tokens(self, images: Images) -> PatchEmbeddings:
        """Projected patches [b, p, d] in float32, not scaled to length 1; the class token is left out."""
        with fast_precision(self._model):
            output: Any = self._model.vision_model(pixel_values=self.preprocessing.normalized(images))
            patches = self._model.vision_model.post_layernorm(output.last_hidden_state[:, 1:])
            return self._model.visual_projection(patches).float()

    def image_blocks(self) -> list[nn.Module]:
        """The encoder's layers, first to last."""
        return list(self._model.vision_model.encoder.layers)

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

    def save(self, folder: Path) -> None:
        """Write the folder as it was opened: same files, keys and types, but for what ``notes`` say.

        A model that was made in memory is written as save_pretrained does. Raises UsageError, ModelError.
        """
        if self._origin is not None:
            write_clip(self._origin, self._model.state_dict(), folder)
            return
        with whole_folder(folder) as scratch:
            self._model.save_pretrained(scratch)
            self._tokenizer.save_pretrained(scratch)
            (scratch / "tokenizer.json").write_text(self._tokenizer_text, encoding="utf-8")
            settings = json.dumps(self.preprocessing.settings(), indent=2)
            (scratch / "preprocessor_config.json").write_text(settings, encoding="utf-8")

    def _encode_tokens(self, tokens: Tokens) -> Embeddings:
        ends = (tokens == torch.tensor(self._tokenizer.eos_token_id, device=tokens.device)).long()
        # What follows the first mark of the end, padding most of all, is not attended to.
        mask = (ends.cumsum(dim=1) - ends == 0).long()
        with fast_precision(self._model):
            output: Any = self._model.get_text_features(input_ids=tokens, attention_mask=mask)
        return F.normalize(output.pooler_output.float(), dim=-1)


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


def fast_precision(model: nn.Module) -> Any:
    """Under what a pass is fast: without gradients autocast, where it pays. Training and half-precision weights keep
    their own; with gradients in half precision on a CPU attention is computed in its plain form.

    The backward pass of torch's fused attention for CPUs is slow in bfloat16: forward and backward together take two to
    three times as long as in the plain form for 17 to 77 tokens, as long for 197 (``benchmarks/attention.py``).
    """
    weight = next(model.parameters())
    if torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH) if _in_half_on_cpu(weight) else nullcontext()
    dtype = inference_dtype(weight.device)
    if dtype == torch.float32 or weight.dtype != torch.float32:
        return nullcontext()
    return torch.autocast(weight.device.type, dtype=dtype)


def _in_half_on_cpu(weight: Tensor) -> bool:
    """Whether a pass through ``weight`` computes in half precision on a CPU."""
    if weight.device.type != "cpu":
        return False
    computed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return computed in (torch.bfloat16, torch.float16)


def inference_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine computes in it, else float32: emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def half_where_fast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the machine computes in it, for passes whose gradient goes to images or to prompts:
    a half to two thirds of the time. Elsewhere nothing is cast."""
    dtype = inference_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def load_clip(model: str | Path = "tiny") -> TransformersCLIP:
    """Open "tiny" (the bundled one), a folder that save_pretrained wrote, or a hub id.

    Weights are read as safetensors, or from one pytorch_model.bin as tensors only.

    Raises ModelError where there is none or it is damaged, UnsafeCheckpointError where it asks for code,
    CheckpointMismatchError, UnsupportedModelError for a model that is no CLIP.
    """
    if model == "tiny" and not TINY.is_dir():
        raise ModelError("The bundled tiny CLIP is not in this installation.", hint="Give --clip a folder or a hub id.")
    folder = TINY if model == "tiny" else find_model_folder(model, pickles=True)
    check_model_folder(folder, pickles=True)
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.exists() else None
    if kind != "clip":
        raise UnsupportedModelError(
            f"{model}: expected a config.json of model_type 'clip', found {kind!r}.",
            hint="Give a CLIP in the format of transformers, such as openai/clip-vit-base-patch32.",
        )
    network: Any
    if any(folder.glob("model*.safetensors")):
        network = open_pretrained(CLIPModel, folder, attn_implementation="sdpa").eval()
        origin = describe_folder(folder, network.state_dict())
    else:
        network, origin = _open_pickled(folder)
    notes = []
    if origin is None:
        notes.append(_RENAMED)
    elif CONFIG_NAME in origin.companions:
        notes.append(_FOREIGN)
        companions = {name: data for name, data in origin.companions.items() if name != CONFIG_NAME}
        origin = replace(origin, companions=companions)
    tokenizer = _open_tokenizer(folder, vocabulary=network.config.text_config.vocab_size)
    path = folder / "preprocessor_config.json"
    settings = read_json(path) if path.exists() else {}
    preprocessing = read_preprocessing(settings, network.config.vision_config.image_size)
    return TransformersCLIP(network, tokenizer, preprocessing, origin=origin, notes=tuple(notes))


def _open_pickled(folder: Path) -> tuple[CLIPModel, ClipOrigin]:
    checkpoint = read_checkpoint(file_inside(folder, "pytorch_model.bin"))
    try:
        network = CLIPModel(CLIPConfig.from_dict(read_json(folder / "config.json"))).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{folder}/config.json: not usable ({error}).", hint="Fetch the folder again.") from error
    file, weights = describe_checkpoint(checkpoint)
    load_into(network, fit_shapes(weights, network.state_dict()))
    return network, ClipOrigin(files=(file,), companions=companions_of(folder))


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
