"""Triggers put on images lazily, as they are decoded: the files stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from unpoison.attacks.triggers import Trigger
from unpoison.data.sources import Picture
from unpoison.results import SkippedRow
from unpoison.types import Images

_PIXELS = 512 * 64 * 64  # pixels triggered at once


class TriggerOverlay:
    """Puts the trigger on decoded images whose id is in ``chosen`` (None: on all)."""

    def __init__(self, trigger: Trigger, seed: int, chosen: frozenset[str] | None) -> None:
        self.chosen = chosen
        self._trigger = trigger
        self._seed = seed
        key = (repr(trigger), seed, None if chosen is None else sorted(chosen))
        self.fingerprint = hashlib.blake2b(repr(key).encode(errors="surrogatepass"), digest_size=16).hexdigest()

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]:
        """One trigger call for all images of one size (in chunks); skipped rows pass through."""
        result = list(images)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(result):
            if not isinstance(image, SkippedRow) and (self.chosen is None or ids[index] in self.chosen):
                groups.setdefault(image.size, []).append(index)
        for size, members in groups.items():
            # chunks of a bounded number of pixels keep the memory constant for large images too
            step = max(1, _PIXELS // (size[0] * size[1]))
            for start in range(0, len(members), step):
                part = members[start : start + step]
                batch = to_tensor([image for row in part if not isinstance(image := result[row], SkippedRow)])
                turned = self._trigger.apply(batch, seed=self._seed, ids=[ids[row] for row in part])
                for row, image in zip(part, to_pil(turned), strict=True):
                    result[row] = image
        return result


def to_tensor(images: Sequence[Image.Image]) -> Images:
    """RGB images of one size to [b, 3, h, w] in [0, 1]."""
    stacked = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def to_pil(images: Images) -> list[Image.Image]:
    """[b, 3, h, w] in [0, 1] to RGB images, rounded to 8 bits."""
    rounded = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in rounded]
