"""Augmentation only ever shows windows of the padded image, and repeats itself under a seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unpoison.data.transforms import random_crop, random_flip
from unpoison.errors import ConfigError


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    padding=st.integers(0, 2),
    fill=st.sampled_from(["reflect", "zero"]),
    seed=st.integers(0, 1000),
)
def test_every_crop_is_a_window_of_its_own_padded_image(
    batch: int, height: int, width: int, padding: int, fill: str, seed: int
) -> None:
    images = torch.rand(batch, 3, height, width, generator=generator(seed))
    mode = "reflect" if fill == "reflect" else "constant"
    padded = functional.pad(images, (padding,) * 4, mode=mode) if padding else images
    crops = random_crop(images, padding, generator(seed), fill=fill)  # pyright: ignore[reportArgumentType]
    assert crops.shape == images.shape
    for crop, whole in zip(crops, padded, strict=True):
        windows = whole.unfold(1, height, 1).unfold(2, width, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, height, width)
        assert (windows == crop).flatten(1).all(dim=1).any()


def test_all_shifts_are_drawn_and_differ_within_a_batch() -> None:
    images = torch.arange(36, dtype=torch.float32).reshape(1, 1, 6, 6).repeat(600, 3, 1, 1)
    crops = random_crop(images, 1, generator(0), fill="zero")
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 9


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 9), seed=st.integers(0, 1000))
def test_flip_gives_the_image_or_its_mirror(batch: int, seed: int) -> None:
    images = torch.rand(batch, 3, 4, 5, generator=generator(seed))
    for image, flipped in zip(images, random_flip(images, generator(seed)), strict=True):
        assert torch.equal(flipped, image) or torch.equal(flipped, image.flip(-1))


def test_flip_turns_about_half() -> None:
    images = torch.rand(2000, 3, 2, 2, generator=generator(1))
    turned = (random_flip(images, generator(2)) != images).flatten(1).any(dim=1).float().mean()
    assert 0.45 < turned < 0.55


def test_same_seed_same_augmentation_and_the_input_is_untouched() -> None:
    images = torch.rand(8, 3, 8, 8, generator=generator(3))
    before = images.clone()
    first, second, other = (random_flip(random_crop(images, 2, draw), draw) for draw in map(generator, (5, 5, 6)))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)


@pytest.mark.parametrize("padding", [-1, 4, 9])
def test_padding_that_cannot_be_mirrored_is_refused(padding: int) -> None:
    with pytest.raises(ConfigError, match="crop padding from 0 to 3 for 4x4"):
        random_crop(torch.zeros(1, 3, 4, 4), padding, generator(0))


def test_an_empty_batch_stays_empty() -> None:
    images = torch.zeros(0, 3, 4, 4)
    assert random_flip(random_crop(images, 2, generator(0)), generator(0)).shape == (0, 3, 4, 4)
