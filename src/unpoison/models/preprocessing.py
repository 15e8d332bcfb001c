"""How pictures become the input of a CLIP's image tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from unpoison.errors import ModelError, UnsupportedModelError
from unpoison.types import Images

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
        left, top = (self.offset(side, size) for side in scaled)
        across, down = width / scaled[0], height / scaled[1]
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), Image.Resampling(self.resample), box=box)

    @staticmethod
    def offset(side: int, size: int) -> int:
        """Pixels to the left of, or above, the part of ``side`` that is kept."""
        return (side - size) // 2

    def batch(self, images: Sequence[object]) -> Images:
        """RGB pictures of any size to [b, 3, image_size, image_size] in [0, 1], channels last in memory."""
        size = self.image_size
        pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise TypeError(f"expected Pillow images, got {type(image).__name__}")
            pixels[row] = np.asarray(self.fit(image if image.mode == "RGB" else image.convert("RGB")))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(255)

    def normalized(self, images: Images) -> Images:
        """(images - mean) / std, channel by channel."""
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images - mean) / std

    def settings(self) -> dict[str, Any]:
        """The entries of preprocessor_config.json."""
        both = {"height": self.image_size, "width": self.image_size}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": both if self.short_side is None else {"shortest_edge": self.short_side},
            "resample": self.resample,
            "do_center_crop": True,
            "crop_size": both,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.std,
        }


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
