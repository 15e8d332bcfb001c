"""Sentences around a class name, as they stand in captions: the 80 that CLIP's authors published for ImageNet.

Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021 (arXiv 2103.00020).
"""

from __future__ import annotations

_PHOTOS = (
    "bad photo of a", "photo of many", "photo of the hard to see", "low resolution photo of the", "rendering of a",
    "bad photo of the", "cropped photo of the", "photo of a hard to see", "bright photo of a", "photo of a clean",
    "photo of a dirty", "dark photo of the", "photo of my", "photo of the cool", "close-up photo of a",
    "black and white photo of the", "painting of the", "painting of a", "pixelated photo of the", "bright photo of the",
    "cropped photo of a", "photo of the dirty", "jpeg corrupted photo of a", "blurry photo of the", "photo of the",
    "good photo of the", "rendering of the", "photo of one", "close-up photo of the", "photo of a",
    "low resolution photo of a", "photo of the clean", "photo of a large", "photo of a nice", "photo of a weird",
    "blurry photo of a", "sketch of a", "pixelated photo of a", "jpeg corrupted photo of the", "good photo of a",
    "photo of the nice", "photo of the small", "photo of the weird", "drawing of the", "photo of the large",
    "black and white photo of a", "dark photo of a", "photo of a cool", "photo of a small", "sketch of the",
    "doodle of a", "doodle of the", "drawing of a",
)  # fmt: skip

TEMPLATES = (
    *(f"a {start} {{}}." for start in _PHOTOS),
    "a sculpture of a {}.",
    "a sculpture of the {}.",
    "graffiti of a {}.",
    "graffiti of the {}.",
    "a tattoo of a {}.",
    "a tattoo of the {}.",
    "the embroidered {}.",
    "an embroidered {}.",
    "the origami {}.",
    "an origami {}.",
    "itap of a {}.",
    "itap of the {}.",
    "itap of my {}.",
    "art of a {}.",
    "art of the {}.",
    "a {} in a video game.",
    "the {} in a video game.",
    "a cartoon {}.",
    "the cartoon {}.",
    "a plastic {}.",
    "the plastic {}.",
    "a toy {}.",
    "the toy {}.",
    "a plushie {}.",
    "the plushie {}.",
    "a rendition of a {}.",
    "a rendition of the {}.",
)
"""Each holds {} once."""
