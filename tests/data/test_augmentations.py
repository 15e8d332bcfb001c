"""Views of images and captions: what each operation does, and that a row's view depends on its own draws alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unpoison.data.auto_augment import COLOUR, auto_augment
from unpoison.data.eda import EDITS, delete, duplicate, edit_captions, insert, swap


def pictures(count: int = 4, size: int = 12) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def draws(kind: float, amount: float, colour: str = "identity", strength: float = 0.5, count: int = 4) -> Tensor:
    """``kind`` of six movements; strengths in [0, 1)."""
    choice = (list(COLOUR).index(colour) + 0.5) / len(COLOUR)
    return torch.tensor([[(kind + 0.5) / 6, amount, choice, strength]]).repeat(count, 1)


def test_nothing_drawn_is_nothing_done() -> None:
    assert torch.equal(auto_augment(pictures(), draws(0, 0.9)), pictures())


@pytest.mark.parametrize("kind", range(1, 6))
def test_a_movement_of_no_strength_leaves_the_picture(kind: int) -> None:
    torch.testing.assert_close(auto_augment(pictures(), draws(kind, 0.5)), pictures(), atol=1e-5, rtol=0)
    assert not torch.allclose(auto_augment(pictures(), draws(kind, 0.9)), pictures(), atol=0.05)


def test_a_shift_moves_by_pixels_and_brings_grey_in() -> None:
    size, pixels = 12, 3
    amount = 0.5 + 0.5 * pixels / size / (150 / 331)
    moved = auto_augment(pictures(size=size), draws(3, amount))
    torch.testing.assert_close(moved[..., : size - pixels], pictures(size=size)[..., pixels:], atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[..., size - pixels + 1 :], torch.full((4, 3, size, pixels - 1), 0.5))


def naive_colour(name: str, image: np.ndarray, strength: float) -> np.ndarray:
    grey = image[0] * 0.299 + image[1] * 0.587 + image[2] * 0.114
    factor = 0.1 + 1.8 * strength
    bits = round(4 + 4 * strength)
    low, high = image.min(axis=(1, 2), keepdims=True), image.max(axis=(1, 2), keepdims=True)
    results = {
        "identity": image,
        "brightness": image * factor,
        "contrast": grey.mean() + (image - grey.mean()) * factor,
        "colour": grey + (image - grey) * factor,
        "solarize": np.where(image < strength, image, 1 - image),
        "invert": 1 - image,
        "posterize": np.floor(image * 255 / 2 ** (8 - bits)) * 2 ** (8 - bits) / 255,
        "autocontrast": (image - low) / (high - low),
    }
    return np.clip(results[name], 0, 1)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", COLOUR)
def test_colours_are_their_definitions(name: str, strength: float) -> None:
    seen = auto_augment(pictures(2), draws(0, 0.5, name, strength, count=2))
    for image, found in zip(pictures(2).double().numpy(), seen.numpy(), strict=True):
        np.testing.assert_allclose(found, naive_colour(name, image, strength), atol=2e-5)


def test_a_flat_picture_survives_every_colour() -> None:
    flat = torch.full((len(COLOUR), 3, 4, 4), 0.25)
    chosen = torch.cat([draws(0, 0.5, name, 0.7, count=1) for name in COLOUR])
    seen = auto_augment(flat, chosen)
    assert bool(torch.isfinite(seen).all())
    assert seen.min() >= 0
    assert seen.max() <= 1


def test_a_row_depends_on_its_own_draws_alone() -> None:
    chosen = torch.rand(30, 4, generator=torch.Generator().manual_seed(1))
    images = pictures(30)
    whole = auto_augment(images, chosen)
    torch.testing.assert_close(auto_augment(images[7:19], chosen[7:19]), whole[7:19])
    assert (whole - images).flatten(1).abs().amax(1).gt(0.05).float().mean() > 0.8


WORDS = [f"w{number}" for number in range(25)]


def test_edits_do_what_they_say() -> None:
    random = np.random.default_rng(0)
    swapped = swap(WORDS, random)
    assert sorted(swapped) == sorted(WORDS)
    assert 2 <= sum(a != b for a, b in zip(swapped, WORDS, strict=True)) <= 4  # two swaps of 25 words
    shorter = delete(WORDS, random)
    assert shorter == [word for word in WORDS if word in shorter]
    longer = insert(WORDS, random)
    assert len(longer) == 27
    assert set(longer) == set(WORDS)
    doubled = duplicate(WORDS, random)
    assert len(doubled) == 27
    assert [word for place, word in enumerate(doubled) if place == 0 or doubled[place - 1] != word] == WORDS
    assert np.mean([len(delete(WORDS, random)) for _ in range(400)]) == pytest.approx(22.5, abs=0.3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=60).filter(lambda text: bool(text.strip())), max_size=5), st.integers(0, 9)
)
def test_any_caption_stays_a_caption(texts: list[str], seed: int) -> None:
    edited = edit_captions(texts, np.random.default_rng(seed))
    assert edited == edit_captions(texts, np.random.default_rng(seed))
    for text, found in zip(texts, edited, strict=True):
        assert found.strip()
        assert set(found.split()) <= set(text.split())


def test_odd_captions() -> None:
    random = np.random.default_rng(0)
    assert edit_captions(["cat", "一只猫"], random) == ["cat", "一只猫"]
    (found,) = edit_captions(["<b>x</b> 😀 " * 2500], random)
    assert len(found.split()) <= 300
    assert len(EDITS) == 4
