"""A CLIP of the open_clip library (ViT or ModifiedResNet) as an :class:`unpoison.types.ImageTextModel`.

open_clip is imported when a network is made (extra ``[open-clip]``). Of it we use the networks, the tokenizer and the
list of published weights; files are read by :mod:`unpoison.models.open_clip_files`, pictures prepared by our own code.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unpoison.errors import MissingExtraError, ModelError, UnsupportedModelError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_origin import (
    ClipOrigin,
    WeightsFile,
    write_clip,
)
from unpoison.models.clip_transformers import fast_precision, replaced_output
from unpoison.models.open_clip_config import (
    CONFIG_NAME,
    check_config,
    preprocess_config,
    preprocessing_of,
)
from unpoison.models.preprocessing import Preprocessing
from unpoison.types import Embeddings, Images, PatchEmbeddings, TokenEmbeddings, Tokens, Tower

WEIGHTS_NAME = "open_clip_model.safetensors"
_TEXT_BATCH = 256
_NEITHER_TOWER = ("logit_scale", "logit_bias")


class OpenClip:
    """A network of open_clip, its tokenizer and its preprocessing. The module is the caller's to train."""

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        preprocessing: Preprocessing,
        *,
        origin: ClipOrigin | None = None,
    ) -> None:
        library = import_open_clip()
        text = config["text_cfg"]
        self._model: Any = model
        self._config = dict(config)
        self._origin = origin or _new_origin(model, config, preprocessing)
        self._cleaning = (text.get("tokenizer_kwargs") or {}).get("clean", "lower")
        self._tokenizer = library.SimpleTokenizer(context_length=text.get("context_length", 77), clean=self._cleaning)
        self._longest = 1 + max(map(len, self._tokenizer.encoder))
        self.preprocessing = preprocessing

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
        parts = (
            hash_weights(self._model.state_dict()),
            json.dumps(self._config, sort_keys=True, default=str),
            f"{len(self._tokenizer.encoder)} {self._cleaning}",
            repr(self.preprocessing),
        )
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    @property
    def max_tokens(self) -> int:
        """Longest text, in tokens, with the marks of its start and end."""
        return int(self._tokenizer.context_length)

    def preprocess(self, images: Sequence[object]) -> Images:
        """RGB pictures of any size to [b, 3, image_size, image_size] in [0, 1], channels last in memory."""
        return self.preprocessing.batch(images)

    def encode_images(self, images: Images) -> Embeddings:
        """Unit embeddings [b, d] in float32 of images in [0, 1]; gradients flow to the images and the weights."""
        with fast_precision(self._model):
            features = self._model.encode_image(self.preprocessing.normalized(images))
        return F.normalize(features.float(), dim=-1)

    def encode_image_tokens(self, images: Images) -> PatchEmbeddings:
        """Projected patches [b, p, d] in float32, not scaled to length 1; the class token is left out.

        Raises UnsupportedModelError for a ModifiedResNet and for a ViT that pools by attention.
        """
        visual = self._model.visual
        if not hasattr(visual, "ln_post") or getattr(visual, "attn_pool", None) is not None:
            raise UnsupportedModelError(
                f"{type(visual).__name__}: this image tower has no patch tokens in the space of its embeddings.",
                hint="Use a ViT, or a method that needs the image embedding alone.",
            )
        hidden: list[Any] = []
        handle = visual.transformer.register_forward_hook(lambda _, __, output: hidden.append(output))
        try:
            with fast_precision(self._model):
                visual(self.preprocessing.normalized(images))
                return (visual.ln_post(hidden[0][:, 1:]) @ visual.proj).float()
        finally:
            handle.remove()

    def image_blocks(self) -> list[nn.Module]:
        """The ViT's blocks, first to last. Raises UnsupportedModelError for a ModifiedResNet or a tower of timm."""
        transformer = getattr(self._model.visual, "transformer", None)
        if transformer is None or not getattr(transformer, "batch_first", True):
            raise UnsupportedModelError(
                f"{type(self._model.visual).__name__}: this image tower has no blocks of tokens.",
                hint="Use a ViT, or a method that needs the image embedding alone.",
            )
        return list(transformer.resblocks)

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Unit embeddings [b, d] in float32; what is longer than ``max_tokens`` is cut off."""
        batches = [texts[start : start + _TEXT_BATCH] for start in range(0, len(texts), _TEXT_BATCH)]
        if not batches:
            return torch.zeros(0, self._config["embed_dim"], device=self._device)
        return torch.cat([self._encode_tokens(self.tokenize(batch)) for batch in batches])

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids [b, t], padded with zeros to the length of the text tower, as open_clip does."""
        tokens = torch.zeros(len(texts), self.max_tokens, dtype=torch.long)
        for row, ids in enumerate(self._marked(texts)):
            kept = ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]
            tokens[row, : len(kept)] = torch.tensor(kept)
        return tokens.to(self._device)

    def embed_tokens(self, tokens: Tokens) -> TokenEmbeddings:
        """Token embeddings [b, t, w] without positions."""
        return self._text.token_embedding(tokens)

    def encode_token_embeddings(self, embedded: TokenEmbeddings, tokens: Tokens) -> Embeddings:
        """Unit embeddings [b, d] in float32 of ``embedded`` [b, t, w] in the place of the embeddings of ``tokens``."""
        with replaced_output(self._text.token_embedding, embedded):
            return self._encode_tokens(tokens)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Whether something of each text is lost: it is too long, or holds the tokenizer's mark of the end."""
        ends = self._tokenizer.eot_token_id
        return [len(ids) > self.max_tokens or ends in ids[:-1] for ids in self._marked(texts)]

    def copy(self) -> OpenClip:
        """A deep copy of the network; tokenizer and preprocessing, which nobody trains, are shared."""
        twin = copy.copy(self)
        twin._model = copy.deepcopy(self._model)
        return twin

    def tower(self, which: Tower) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of one tower with its projection, in the module's order."""
        return [
            (name, value)
            for name, value in self._model.named_parameters()
            if name not in _NEITHER_TOWER and name.startswith("visual.") == (which == "image")
        ]

    def save(self, folder: Path) -> None:
        """Write the weights file as it was opened, with open_clip_config.json beside it, whole or not at all.

        Raises UsageError, ModelError.
        """
        write_clip(self._origin, self._model.state_dict(), folder)

    @property
    def _text(self) -> Any:
        return getattr(self._model, "text", self._model)

    @property
    def _device(self) -> torch.device:
        return self._model.logit_scale.device

    def _encode_tokens(self, tokens: Tokens) -> Embeddings:
        with fast_precision(self._model):
            features = self._model.encode_text(tokens)
        return F.normalize(features.float(), dim=-1)

    def _marked(self, texts: Sequence[str]) -> list[list[int]]:
        """All token ids of each text between the marks of its start and end."""
        first, last = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        return [[first, *self._tokenizer.encode(self._shortened(text)), last] for text in texts]

    def _shortened(self, text: str) -> str:
        """Far more than the tower holds, and no more: the tokenizer takes quadratic time for a very long word.

        No token stands for more than ``_longest`` characters with the space before it.
        """
        limit = self._longest * self.max_tokens
        return text if len(text) <= limit else self._tokenizer.clean_fn(text)[:limit]


def new_open_clip(
    config: Mapping[str, Any], *, seed: int = 0, preprocess_cfg: Mapping[str, Any] | None = None
) -> OpenClip:
    """A model_cfg of open_clip with weights newly drawn from ``seed``. Raises MissingExtraError, ModelError."""
    check_config(config, name="model_cfg")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_network(config, name="model_cfg")
    return OpenClip(model.eval(), config, preprocessing_of(preprocess_cfg or {}, side_of(model, "model_cfg")))


def open_clip_installed() -> bool:
    """Whether the extra is there; a broken one says so when it is used."""
    import importlib.util

    return importlib.util.find_spec("open_clip") is not None


def build_network(config: Mapping[str, Any], *, name: str) -> Any:
    """The network of ``config``, drawn from torch's random state, without what makes training or output differ."""
    library = import_open_clip()
    settings = copy.deepcopy(dict(config))
    make = library.CustomTextCLIP if settings.pop("custom_text", False) else library.CLIP
    settings["vision_cfg"] |= {"patch_dropout": 0.0, "output_tokens": False}
    if settings["vision_cfg"].get("timm_model_name"):
        settings["vision_cfg"]["timm_model_pretrained"] = False
    settings["text_cfg"] |= {"output_tokens": False}
    try:
        return make(**settings)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, ZeroDivisionError, AttributeError) as error:
        raise ModelError(
            f"{name}: open_clip cannot build this architecture ({type(error).__name__}: {error}).",
            hint="Give the open_clip_config.json that belongs to these weights.",
        ) from error


def side_of(model: Any, name: str) -> int:
    """Height and width of the pictures that the image tower takes. Raises UnsupportedModelError where they differ."""
    size = model.visual.image_size
    sides = set(size) if isinstance(size, tuple | list) else {size}
    if len(sides) != 1:
        raise UnsupportedModelError(f"{name}: pictures of {size} are not square.", hint="Use a square model.")
    return int(sides.pop())


def _new_origin(model: nn.Module, config: Mapping[str, Any], preprocessing: Preprocessing) -> ClipOrigin:
    """The hub's layout, for a model that came from no file."""
    entries = {key: (value.dtype, value.shape) for key, value in model.state_dict().items()}
    files = (WeightsFile(name=WEIGHTS_NAME, entries=entries),)
    return ClipOrigin(files=files, companions=config_file(config, preprocessing))


def config_file(config: Mapping[str, Any], preprocessing: Preprocessing) -> dict[str, bytes]:
    """open_clip_config.json by its name."""
    body = {"model_cfg": config, "preprocess_cfg": preprocess_config(preprocessing)}
    return {CONFIG_NAME: json.dumps(body, indent=2).encode()}


def import_open_clip() -> Any:
    """The library. Raises MissingExtraError where it is absent, ModelError where it is broken."""
    if not open_clip_installed():
        raise MissingExtraError("a model of open_clip", "open-clip")
    try:
        import open_clip  # pyright: ignore[reportMissingImports] # an extra, tested in an environment of its own
    except (ImportError, RuntimeError) as error:
        raise ModelError(
            f"open_clip is installed and does not import ({error}).",
            hint="Often torchvision does not fit torch: install the build that does.",
        ) from error
    return open_clip
