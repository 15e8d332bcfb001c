"""Which words of a caption and which patches of an image make the two match: leave one out and see what it costs."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from unpoison.clip_results import UnlearntWord
from unpoison.errors import UnsupportedModelError
from unpoison.types import Embeddings, Images, ImageTextModel

_AT_ONCE = 256
_WORDS = 128  # of a caption that are tried: more than any text tower reads


def telling_words(
    clip: ImageTextModel, images: Images, captions: Sequence[str], *, share: float, neutral: str
) -> tuple[list[str], list[dict[str, float]]]:
    """Captions in which all but the most telling ``share`` of the words (at least one) are ``neutral``.

    And of each caption its telling words, with the cosine that leaving one out costs. Words after the 128th are not
    looked at: no text tower reads so far.
    """
    split = [caption.split()[:_WORDS] for caption in captions]
    without = [
        [" ".join(words[:place] + words[place + 1 :]) or neutral for place in range(len(words))] for words in split
    ]
    embedded = encode_texts(clip, [text for words, texts in zip(split, without, strict=True)
                                   for text in (" ".join(words), *texts)])  # fmt: skip
    parts = embedded.split([len(texts) + 1 for texts in without])
    masked, telling = [], []
    for image, words, part in zip(encode_images(clip, images), split, parts, strict=True):
        cosines = part @ image
        falls = (cosines[0] - cosines[1:]).tolist()
        kept = sorted(range(len(words)), key=lambda place: -falls[place])[: max(1, round(share * len(words)))]
        masked.append(" ".join(word if place in kept else neutral for place, word in enumerate(words)))
        telling.append({_bare(words[place]): falls[place] for place in kept})
    return masked, telling


def telling_patches(clip: ImageTextModel, images: Images, captions: Sequence[str], share: float) -> Images:
    """Images in which all but the most telling patches are the mean color.

    Patches are a vision transformer's own; of another image tower boxes of an eighth of the side or more.
    """
    side, grid = images.shape[-1], patch_grid(clip, images)
    edges = [round(place * side / grid) for place in range(grid + 1)]
    boxes = [(edges[i], edges[i + 1], edges[j], edges[j + 1]) for i in range(grid) for j in range(grid)]
    color = torch.tensor(clip.image_mean, device=images.device).view(3, 1, 1)
    texts = encode_texts(clip, captions)
    falls = []
    for top, bottom, left, right in boxes:
        masked = images.clone()
        masked[:, :, top:bottom, left:right] = color
        falls.append(-(encode_images(clip, masked) * texts).sum(dim=1))
    kept = torch.stack(falls, dim=1).argsort(dim=1, descending=True)[:, : max(1, round(share * len(boxes)))]
    stays = torch.zeros(len(images), 1, side, side, dtype=torch.bool, device=images.device)
    for place, (top, bottom, left, right) in enumerate(boxes):
        stays[(kept == place).any(dim=1), :, top:bottom, left:right] = True
    return torch.where(stays, images, color)


def patch_grid(clip: ImageTextModel, images: Images) -> int:
    """Patches along a side."""
    with contextlib.suppress(UnsupportedModelError):
        grid = math.isqrt(clip.encode_image_tokens(images[:1]).shape[1])
        if grid > 1:
            return grid
    return min(8, max(2, images.shape[-1] // 8))


def common_words(falls: Sequence[dict[str, float]], clean: Sequence[str], usual: float) -> tuple[UnlearntWord, ...]:
    """The telling words of at least a tenth of the captions, by what they cost altogether; at most ten.

    Words that stand in more than a share of ``usual`` of the ``clean`` captions say nothing about a target and are left
    out.
    """
    heard = Counter(word for caption in clean for word in {_bare(word) for word in caption.split()})
    costs: dict[str, list[float]] = {}
    for entry in falls:
        for word, fall in entry.items():
            costs.setdefault(word, []).append(fall)
    common = [
        word
        for word, each in costs.items()
        if word and len(each) >= max(2, len(falls) / 10) and heard[word] <= usual * max(1, len(clean))
    ]
    ordered = sorted(common, key=lambda word: -sum(costs[word]))[:10]
    return tuple(
        UnlearntWord(word=word, captions=len(costs[word]), fall=sum(costs[word]) / len(costs[word])) for word in ordered
    )


def encode_images(clip: ImageTextModel, images: Images) -> Embeddings:
    """In parts, so that memory does not follow their number."""
    return torch.cat([clip.encode_images(part) for part in images.split(_AT_ONCE)])


def encode_texts(clip: ImageTextModel, texts: Sequence[str]) -> Embeddings:
    """In parts as well."""
    starts = range(0, len(texts), _AT_ONCE)
    parts: list[Tensor] = [clip.encode_texts(texts[start : start + _AT_ONCE]) for start in starts]
    return torch.cat(parts)


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'").lower()
