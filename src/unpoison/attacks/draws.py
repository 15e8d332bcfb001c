"""Random draws of triggers: from a seed alone, or from a seed and a sample's id, so that order never matters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.errors import UsageError
from unpoison.types import Images


def seed_of(seed: int, *what: str) -> int:
    """A 63-bit seed of its own for each text, such as a sample's id."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_for_each(
    draw: Callable[[torch.Generator], Tensor], seed: int, ids: Sequence[str] | None, count: int, what: str
) -> Tensor:
    """One pattern [b, ...] for each of ``count`` images, from the seed and its id; ``what`` is the trigger, for errors.

    Raises UsageError when there is not one id for each image.
    """
    names = need_ids(ids, count, what)
    if not names:
        return torch.zeros(0, *draw(generator_of(0)).shape)
    return torch.stack([draw(generator_of(seed_of(seed, name))) for name in names])


def places(
    seed: int, ids: Sequence[str] | None, images: Images, side: int, what: str
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """A random place for a square of ``side`` pixels in each image: its top rows and left columns.

    Raises UsageError when there is not one id for each image.
    """
    height, width = images.shape[-2:]
    names = need_ids(ids, len(images), what)
    top = [seed_of(seed, name, "row") % (height - min(side, height) + 1) for name in names]
    left = [seed_of(seed, name, "column") % (width - min(side, width) + 1) for name in names]
    return torch.tensor(top, dtype=torch.int64), torch.tensor(left, dtype=torch.int64)


def need_ids(ids: Sequence[str] | None, count: int, what: str) -> Sequence[str]:
    """The ids. Raises UsageError when there is not one for each of ``count`` images."""
    if ids is None or len(ids) != count:
        raise UsageError(
            f"{what}: expected {count} ids, got {0 if ids is None else len(ids)}.",
            hint="Give the id of each image: what is drawn for it comes from the seed and the id.",
        )
    return ids


def stamp(
    images: Images, patches: Float[Tensor, "p 3 s s"], top: Int[Tensor, " b"], left: Int[Tensor, " b"], side: int
) -> Images:
    """Images with a square of ``side`` pixels in the place of what was there; what does not fit is cut off.

    Gradients flow to the images around the squares and to the patches.
    """
    height, width = images.shape[-2:]
    down, across = min(side, height), min(side, width)
    rows = top.to(images.device)[:, None] + torch.arange(down, device=images.device)
    columns = left.to(images.device)[:, None] + torch.arange(across, device=images.device)
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    squares = patches.to(images).expand(len(images), 3, side, side)[..., :down, :across]
    stamped = images.permute(0, 2, 3, 1).clone()
    stamped[samples, rows[:, :, None], columns[:, None, :]] = squares.permute(0, 2, 3, 1)
    return stamped.permute(0, 3, 1, 2)


def scaled_side(share: float, short: int, least: int) -> int:
    """``share`` of an image's short side in whole pixels, at least ``least``."""
    return max(least, round(share * short))
