"""Named-axis tensor types and the Protocols that every method is written against.

Axes: ``b`` batch, ``h w`` pixels, ``c`` classes, ``d`` embedding or feature width, ``n`` samples of a set,
``t`` tokens of a text, ``w`` width of the text tower, ``p`` patches of an image.
Images are RGB in [0, 1]; each model applies its own normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Images = Float[Tensor, "b 3 h w"]
Logits = Float[Tensor, "b c"]
Labels = Int[Tensor, " b"]
Embeddings = Float[Tensor, "b d"]
Tokens = Int[Tensor, "b t"]
TokenEmbeddings = Float[Tensor, "b t w"]
Bound = Float[Tensor, " _"]
"""The largest value of each channel at one activation of a network."""
PatchEmbeddings = Float[Tensor, "b p d"]
Tower = Literal["image", "text"]


@runtime_checkable
class Classifier(Protocol):
    """An image classifier: images in [0, 1] at ``image_size`` pixels to logits over ``class_names``."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the images that ``logits`` takes."""
        ...

    @property
    def module(self) -> nn.Module:
        """The trainable network; methods set its mode and hand its parameters to an optimiser."""
        ...

    def logits(self, images: Images) -> Logits: ...

    def features(self, images: Images) -> Embeddings:
        """Input of the last linear layer."""
        ...

    def head(self) -> nn.Linear:
        """The last linear layer itself."""
        ...

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Where activations are cut off above, in the order in which the network computes them; empty for nowhere."""
        ...

    def bounded(self, bounds: Sequence[Bound]) -> Classifier:
        """The same network with other bounds; weights are shared with this one."""
        ...

    def copy(self) -> Classifier:
        """A deep copy: training it leaves this one untouched."""
        ...

    def fresh(self, seed: int) -> Classifier:
        """The same architecture with newly drawn weights."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """State dict under the keys and dtypes of the checkpoint it came from."""
        ...


@runtime_checkable
class ZeroShotModel(Protocol):
    """What scoring images against texts needs of a CLIP-like model: both towers give unit embeddings of one space."""

    @property
    def image_size(self) -> int: ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def logit_scale(self) -> float:
        """Factor on the cosine before the softmax (100 for OpenAI's CLIP)."""
        ...

    @property
    def fingerprint(self) -> str:
        """Content hash of the weights, the tokenizer and the preprocessing."""
        ...

    def preprocess(self, images: Sequence[object]) -> Images:
        """PIL images of any size and mode to one batch in [0, 1] at ``image_size``."""
        ...

    def encode_images(self, images: Images) -> Embeddings:
        """Unit embeddings of images in [0, 1] (normalisation happens inside)."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Embeddings: ...

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Whether the tokenizer cuts each text off."""
        ...


@runtime_checkable
class ImageTextModel(ZeroShotModel, Protocol):
    """A CLIP-like model that can be trained, taken apart and saved.

    Gradients flow through every ``encode_*`` and ``embed_tokens`` where grad mode is on.
    """

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """What the normalisation subtracts from images in [0, 1]: this color becomes 0."""
        ...

    @property
    def image_std(self) -> tuple[float, float, float]:
        """What the normalisation divides by."""
        ...

    def copy(self) -> ImageTextModel:
        """A deep copy: training it leaves this one untouched."""
        ...

    def tower(self, which: Tower) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of one tower with its projection; the temperature is in neither."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids on the model's device, padded to one length, cut where the text tower ends."""
        ...

    def embed_tokens(self, tokens: Tokens) -> TokenEmbeddings:
        """The text tower's token embeddings, before positions are added."""
        ...

    def encode_token_embeddings(self, embedded: TokenEmbeddings, tokens: Tokens) -> Embeddings:
        """Unit embeddings of texts given as token embeddings; ``tokens`` tell where each text ends."""
        ...

    def encode_image_tokens(self, images: Images) -> PatchEmbeddings:
        """Patches after the last layer, normalised and projected as the image embedding is, in rows from the top left.

        Not scaled to length 1. Raises UnsupportedModelError for an image tower without patch tokens.
        """
        ...

    def image_blocks(self) -> list[nn.Module]:
        """The image tower's transformer blocks in order: tokens [b, 1 + p, w] in, the class token first, and out.

        Raises UnsupportedModelError for an image tower without them.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the model in the format it came in. Raises UsageError where that fails: then nothing is left there."""
        ...


Device = torch.device
