"""A CLIP and one embedding for each class: the zero-shot classifier that the methods for classifiers give back.

classifier = load_zero_shot("out/classifier.safetensors", load_any_clip("model/"))
classifier.predict(pictures)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unpoison.data.sources import LabelledImages
from unpoison.errors import DataError, ModelError
from unpoison.models.checkpoints import check_finite, check_safetensors
from unpoison.models.image_classifier import evaluation_mode
from unpoison.models.logit_scale import usable_scale
from unpoison.models.visual_prompts import NAME, with_visual_prompts
from unpoison.storage import write_atomically
from unpoison.types import ImageTextModel, Logits

FILE = "classifier.safetensors"
_KIND = "unpoison/zero-shot-classifier/1"
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroShotClassifier:
    """``classes`` [c, d], one row for each of ``class_names``; an image's class is the row of the largest product with
    its unit embedding.

    ``made_for``: fingerprint of the CLIP that the embeddings belong to. ``prompts`` [c, m, w]: the text prompts behind
    them, ``visual_prompts`` [l, n, w]: those that ``clip`` has in its image tower; None where a method has none.
    """

    clip: ImageTextModel
    class_names: tuple[str, ...]
    classes: Float[Tensor, "c d"]
    made_for: str
    prompts: Float[Tensor, "c m w"] | None = None
    visual_prompts: Float[Tensor, "l n w"] | None = None

    def logits(self, images: Sequence[object]) -> Logits:
        """Of PIL images of any size: products times the logit scale, held to [1, 100]; [b, c] on the CPU."""
        return usable_scale(self.clip) * self._products(images)

    def predict(self, images: Sequence[object]) -> list[str]:
        """The class name of each PIL image."""
        return [self.class_names[row] for row in self._products(images).argmax(dim=1).tolist()]

    @torch.inference_mode()
    def _products(self, images: Sequence[object]) -> Float[Tensor, "b c"]:
        parts = [torch.zeros(0, len(self.class_names))]
        device = next(self.clip.module.parameters()).device
        with evaluation_mode(self.clip.module):
            for start in range(0, len(images), _AT_ONCE):
                batch = self.clip.preprocess(images[start : start + _AT_ONCE]).to(device)
                products = self.clip.encode_images(batch) @ self.classes.to(device).T
                parts.append(products.float().cpu())
        return torch.cat(parts)

    def classes_of(self, images: LabelledImages | None) -> Float[np.ndarray, "c d"] | None:
        """The class embeddings in the order of the images' class names. Raises DataError for other names."""
        if images is None:
            return None
        if set(images.class_names) != set(self.class_names):
            raise DataError(
                f"{images.name} has the classes {', '.join(images.class_names[:5])}..., the classifier "
                f"{', '.join(self.class_names[:5])}....",
                hint="Test a zero-shot classifier on images of its own classes.",
            )
        return self.classes[[self.class_names.index(name) for name in images.class_names]].numpy()

    def save(self, path: Path) -> None:
        """One safetensors file: the embeddings, the prompts, the names and the fingerprint. The CLIP is not in it."""
        tensors = {"classes": self.classes, "prompts": self.prompts, NAME: self.visual_prompts}
        kept = {key: value.detach().float().cpu().contiguous() for key, value in tensors.items() if value is not None}
        about = {"kind": _KIND, "class_names": json.dumps(self.class_names), "made_for": self.made_for}
        write_atomically(path, save(kept, metadata=about))


def load_zero_shot(path: str | Path, clip: ImageTextModel) -> ZeroShotClassifier:
    """Read what :meth:`ZeroShotClassifier.save` wrote. ``clip``: the very model that it was made for, as it came.

    Raises ModelError for a damaged or foreign file and for another CLIP.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file.", hint="Give the classifier.safetensors of a purification.")
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        names = json.loads(about.get("class_names", "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).", hint="Repeat the purification.") from error
    _check(path, about, names, tensors)
    check_finite(tensors, name=str(path))
    made_for = clip.fingerprint
    if about.get("made_for") != made_for:
        raise ModelError(
            f"{path} was made for another CLIP ({about.get('made_for')}; this one is {made_for}).",
            hint="Give the model that was purified, as it was then: the embeddings mean nothing to another.",
        )
    if NAME in tensors:
        clip = with_visual_prompts(clip, tensors[NAME])[0]
    return ZeroShotClassifier(
        clip=clip,
        class_names=tuple(names),
        classes=tensors["classes"],
        made_for=made_for,
        prompts=tensors.get("prompts"),
        visual_prompts=tensors.get(NAME),
    )


def _check(path: Path, about: dict[str, str], names: object, tensors: dict[str, Tensor]) -> None:
    """Raise ModelError unless names and embeddings belong together."""
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    classes = tensors.get("classes")
    shaped = classes is not None and classes.ndim == 2 and good and len(classes) == len(names)  # pyright: ignore[reportArgumentType]
    visual = tensors.get(NAME)
    if about.get("kind") != _KIND or not shaped or (visual is not None and visual.ndim != 3):
        raise ModelError(
            f"{path}: expected {_KIND} with class names and an embedding for each, found something else.",
            hint="Give the classifier.safetensors of `unpoison purify cbpt` or `rvpt`.",
        )
