"""A classifier or a CLIP behind one face, for methods that only ask what a model says of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from unpoison.errors import ModelError, UnpoisonError, UnsupportedModelError, UsageError
from unpoison.models.checkpoints import hash_weights, read_weights
from unpoison.models.classifier import DESCRIPTION, load_classifier
from unpoison.models.clip_files import load_any_clip
from unpoison.models.folders import find_model_folder, read_json
from unpoison.models.image_classifier import ImageClassifier
from unpoison.models.logit_scale import usable_scale
from unpoison.models.networks import ARCHITECTURES
from unpoison.models.open_clip_config import CONFIG_NAME
from unpoison.models.zero_shot import TEMPLATES, class_embeddings
from unpoison.runs import Run
from unpoison.types import Embeddings, Images, ImageTextModel, Logits

Kind = Literal["classifier", "CLIP"]
_OPEN_CLIP = "open_clip:"
MAX_IMAGE_SIZE = 1_024


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How to open what does not say it itself: a weights file's architecture, input size and normalization."""

    arch: str | None = None
    image_size: int = 32
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AnyModel:
    """``class_names`` are empty for a CLIP that was given none: then it is an encoder and nothing else."""

    kind: Kind
    model: ImageClassifier | ImageTextModel
    class_names: tuple[str, ...]
    classes: Embeddings | None = None
    """A CLIP's unit embeddings of its classes, on the model's device."""

    @property
    def image_size(self) -> int:
        return self.model.image_size

    @property
    def module(self) -> nn.Module:
        return self.model.module

    @property
    def fingerprint(self) -> str:
        """Content hash of the weights and of what is asked of them."""
        own = hash_weights(self.module.state_dict())
        return own if self.classes is None else own + hash_weights({"classes": self.classes})[:8]

    def logits(self, images: Images) -> Logits:
        """Logits [b, c] of images [b, 3, h, w] in [0, 1]; gradients flow. Raises UsageError without class names."""
        if isinstance(self.model, ImageClassifier):
            return self.model.logits(images)
        if self.classes is None:
            raise UsageError("this CLIP has no class names.", hint="Give --classes, or labelled --data.")
        return usable_scale(self.model) * self.encode(images) @ self.classes.T

    def encode(self, images: Images) -> Embeddings:
        """A CLIP's unit embeddings [b, d]; gradients flow. Raises UsageError for a classifier."""
        if isinstance(self.model, ImageClassifier):
            raise UsageError("a classifier has no encoder of its own.", hint="Ask for its logits.")
        return self.model.encode_images(images)

    def frozen(self, run: Run) -> AnyModel:
        """A copy on the run's device in evaluation mode, whose weights need no gradient."""
        copied = self.copy()
        copied.module.to(run.device).float().eval().requires_grad_(False)
        return copied

    def copy(self) -> AnyModel:
        return replace(self, model=self.model.copy())

    def trained(self) -> list[nn.Parameter]:
        """What fine-tuning changes: all of a classifier, the image tower of a CLIP."""
        if isinstance(self.model, ImageClassifier):
            return list(self.module.parameters())
        return [parameter for _, parameter in self.model.tower("image")]


def open_any_model(
    model: str | Path, *, class_names: Sequence[str] | None = None, opening: Opening | None = None, run: Run
) -> AnyModel:
    """A CLIP where the files are those of one, else a classifier. ``class_names`` name a CLIP's zero-shot classes.

    Raises UnsupportedModelError for a weights file that does not say what it is, and what the adapters raise.
    """
    opening = opening or Opening()
    if kind_of(model, opening) == "classifier":
        options = {"arch": opening.arch, "class_names": class_names, "image_size": opening.image_size}
        classifier = load_classifier(model, mean=opening.mean, std=opening.std, **options)
        return AnyModel(kind="classifier", model=classifier, class_names=classifier.class_names)
    clip = load_any_clip(model)
    names = tuple(class_names or ())
    classes = None
    if names:
        clip.module.to(run.device).eval()
        classes = class_embeddings(clip, names, TEMPLATES).float().clone()
    return AnyModel(kind="CLIP", model=clip, class_names=names, classes=classes)


def kind_of(model: str | Path, opening: Opening) -> Kind:
    """By the files alone: a description of a CLIP, or the keys of one. Raises ModelError and its kinds."""
    if model == "tiny" or str(model).startswith(_OPEN_CLIP):
        return "CLIP"
    path = Path(model)
    if path.is_file():
        if opening.arch is not None:
            return "classifier"
        if (path.parent / CONFIG_NAME).is_file() or any(key.startswith("visual.") for key in read_weights(path)):
            return "CLIP"
        raise UnsupportedModelError(
            f"{path}: these weights do not say which network they fit.",
            hint=f"Give --arch: {', '.join(ARCHITECTURES)}, or package.module:callable of your own code.",
        )
    folder = find_model_folder(model, pickles=True)
    if (folder / DESCRIPTION).exists():
        return "classifier"
    if (folder / CONFIG_NAME).exists():
        return "CLIP"
    config = folder / "config.json"
    if not config.exists():
        raise ModelError(f"{folder}: there is no config.json.", hint="Give the model's own folder.")
    return "CLIP" if read_json(config).get("model_type") == "clip" else "classifier"


def try_out(model: AnyModel, opening: Opening) -> None:
    """One pass of two images, so that a model that cannot be used is found out at once. Raises ModelError.

    What its files say of the size of images is not believed beyond what a search can bear.
    """
    size = model.image_size
    if size > MAX_IMAGE_SIZE and size != opening.image_size:
        raise ModelError(
            f"the model asks for images of {size:,} pixels a side; more than {MAX_IMAGE_SIZE:,} are not tried.",
            hint=f"Give --image-size {size} if it is right.",
        )
    try:
        with torch.no_grad():
            images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
            images = images.to(next(model.module.parameters()).device)
            found = model.logits(images) if model.class_names else model.encode(images)
    except UnpoisonError:
        raise
    except Exception as error:  # whatever a network makes of images that do not fit it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        hint = "Does the size of its images fit its weights?"
        raise ModelError(f"a first pass failed ({reason}).", hint=hint) from error
    if not bool(found.isfinite().all()):
        raise ModelError("its answers are not finite numbers.", hint="Get the model from its publisher again.")


def says(model: AnyModel, images: Images, at_once: int = 256) -> torch.Tensor:
    """The class [n] that the model takes each image for."""
    with torch.no_grad():
        return torch.cat([model.logits(part).argmax(dim=1) for part in images.split(at_once)])
