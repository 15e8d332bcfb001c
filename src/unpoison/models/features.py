"""One forward pass over stored pixels for everything that a classifier's features can tell."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from unpoison.data.pixels import Pixels, to_images
from unpoison.models.checkpoints import hash_weights
from unpoison.models.image_classifier import ImageClassifier, evaluation_mode, images_at_once
from unpoison.results import write_atomically
from unpoison.runs import Run
from unpoison.types import Classifier

_VERSION = b"features-1"  # raised when features are read in another way


def features_on(
    classifier: Classifier, pixels: Pixels, rows: Int[np.ndarray, " k"], *, run: Run, what: str = "features"
) -> Float[Tensor, "k d"]:
    """The head's inputs in evaluation mode, in float32 on the CPU. Raises UnsupportedModelError without a head."""
    module = classifier.module.to(run.device)
    size = images_at_once(run.device, pixels.array.shape[1])
    starts = range(0, len(rows), size)
    parts = [torch.zeros(0, classifier.head().in_features)]
    with torch.inference_mode(), evaluation_mode(module):
        for start in run.progress.track(starts, total=len(rows), what=what, weight=size, unit="images"):
            images = to_images(pixels.array[rows[start : start + size]]).to(run.device)
            parts.append(classifier.features(images).float().cpu())
    return torch.cat(parts).clone()


def stored_features(
    classifier: ImageClassifier, pixels: Pixels, rows: Int[np.ndarray, " k"], *, run: Run
) -> Float[Tensor, "k d"]:
    """:func:`features_on`, kept in the run's cache under a hash of the network and of the pixels."""
    if run.cache is None:
        return features_on(classifier, pixels, rows, run=run)
    file = run.cache / "features" / f"{_key(classifier, pixels, rows)}.safetensors"
    shape = (len(rows), classifier.head().in_features)
    try:
        kept = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):  # none yet, or damaged: computed again
        kept = None
    if kept is None or tuple(kept.shape) != shape:
        kept = features_on(classifier, pixels, rows, run=run)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save({"features": kept}))
    return kept


def _key(classifier: ImageClassifier, pixels: Pixels, rows: Int[np.ndarray, " k"]) -> str:
    digest = hashlib.blake2b(_VERSION, digest_size=20)
    network = (hash_weights(classifier.weights()), repr(classifier.module), classifier.mean, classifier.std)
    digest.update(repr(network).encode())
    digest.update(repr((pixels.array.shape, len(rows))).encode())
    for start in range(0, len(rows), 1024):
        digest.update(pixels.array[rows[start : start + 1024]].tobytes())
    return digest.hexdigest()
