"""One forward pass over stored pixels for everything that a classifier's features can tell."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.data.pixels import Pixels, to_images
from unpoison.models.image_classifier import evaluation_mode
from unpoison.runs import Run
from unpoison.types import Classifier

_BATCH = 512


def features_on(
    classifier: Classifier, pixels: Pixels, rows: Int[np.ndarray, " k"], *, run: Run, what: str = "features"
) -> Float[Tensor, "k d"]:
    """The head's inputs in evaluation mode, in float32 on the CPU. Raises UnsupportedModelError without a head."""
    module = classifier.module.to(run.device)
    starts = range(0, len(rows), _BATCH)
    parts = [torch.zeros(0, classifier.head().in_features)]
    with torch.inference_mode(), evaluation_mode(module):
        for start in run.progress.track(starts, total=len(rows), what=what, weight=_BATCH, unit="images"):
            images = to_images(pixels.array[rows[start : start + _BATCH]]).to(run.device)
            parts.append(classifier.features(images).float().cpu())
    return torch.cat(parts).clone()
