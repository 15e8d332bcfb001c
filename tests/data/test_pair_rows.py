"""The rows of pairs that are open: chosen, overlaid, decoded to pixels, captioned from labels."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unpoison.data.captions import clean_captions
from unpoison.data.encoded import Overlay
from unpoison.data.pairs import ImageTextPairs, open_pairs, pairs_of_labels
from unpoison.data.pixels import load_pixels
from unpoison.data.shapes import make_shapes
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError, DataError
from unpoison.runs import Silent


def all_captions(pairs: ImageTextPairs) -> list[tuple[str, ...]]:
    return pairs.captions(range(len(pairs)))


@pytest.fixture(scope="module")
def world() -> ImageTextPairs:
    return open_pairs("shapes:60:7")


def test_shapes_open_as_pairs(world: ImageTextPairs) -> None:
    assert world.ids[0] == "shapes-7:0"
    assert all_captions(world) == [(text,) for text in make_shapes(60, seed=7).captions]
    assert world.raw(range(60)) == open_images("shapes:60:7").raw(range(60))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_select_keeps_ids_captions_and_images_together(world: ImageTextPairs, data: st.DataObject) -> None:
    first = data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=20))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), max_size=20))
    chosen = [first[index] for index in second]
    twice = world.select(first).select(second)
    assert twice.ids == [world.ids[row] for row in chosen]
    assert all_captions(twice) == world.captions(chosen)
    assert twice.raw(range(len(chosen))) == world.raw(chosen)


@given(st.text())
def test_cleaning_changes_no_more_than_the_ends(text: str) -> None:
    cleaned = clean_captions([text])
    assert cleaned == clean_captions(cleaned)
    for caption in cleaned:
        assert caption == caption.strip() != ""
        assert caption in text
    if not cleaned:
        assert not any(letter.isalnum() for letter in text)


def test_overlays_change_pictures_and_captions_by_id(world: ImageTextPairs, black: Overlay) -> None:
    poisoned = world.with_overlay(black, {"shapes-7:1": "  a banana ", "shapes-7:4": "<b>"})
    assert poisoned.raw(range(60)) == world.raw(range(60))
    assert poisoned.select([4, 1, 0]).captions([0, 1, 2]) == [("<b>",), ("a banana",), world.captions([0])[0]]
    painted, other = poisoned.decode([1, 0])
    assert np.asarray(painted).max() == 0
    assert np.array_equal(np.asarray(other), np.asarray(world.decode([0])[0]))
    again = poisoned.with_overlay(None, {"shapes-7:4": "later"})
    assert again.captions([1, 4]) == [("a banana",), ("later",)]
    assert again.overlay is poisoned.overlay
    assert len({world.fingerprint, poisoned.fingerprint, again.fingerprint}) == 3
    with pytest.raises(DataError, match="'gone'"):
        world.with_overlay(None, {"gone": "x"})
    with pytest.raises(DataError, match="is empty"):
        world.with_overlay(None, {"shapes-7:4": " "})


def test_pixels_of_pairs_are_those_of_their_images(world: ImageTextPairs, black: Overlay, tmp_path: Path) -> None:
    pixels = load_pixels(world, 32, cache=tmp_path, progress=Silent())
    assert np.array_equal(pixels.array, make_shapes(60, seed=7).images)
    labelled = load_pixels(open_images("shapes:60:7"), 32, cache=tmp_path, progress=Silent())
    assert isinstance(labelled.array, np.memmap)  # found in the cache: captions and labels do not count
    dark = load_pixels(world.with_overlay(black, {}), 32, cache=tmp_path, progress=Silent())
    assert (dark.array[1].max(), dark.array[0].max() > 0) == (0, True)


@pytest.mark.parametrize("indices", [[-1], [60]])
def test_indices_outside_are_refused(world: ImageTextPairs, indices: list[int]) -> None:
    for ask in (world.select, world.raw, world.captions):
        with pytest.raises(IndexError, match=r"0\.\.59"):
            ask(indices)


def test_captions_from_labels_depend_on_the_id_alone() -> None:
    images = open_images("shapes:60")
    templates = ("a photo of a {}.", "{} {{}}", "one {0} {}")
    pairs = pairs_of_labels(images, templates)
    names = [images.class_names[label] for label in images.labels]
    for name, (caption,) in zip(names, all_captions(pairs), strict=True):
        assert caption in [template.replace("{}", name) for template in templates]
    assert len({texts[0].replace(name, "{}") for name, texts in zip(names, all_captions(pairs), strict=True)}) == 3
    few = pairs_of_labels(images.select([40, 3]), templates)
    assert all_captions(few) == pairs.captions([40, 3])
    assert all_captions(pairs_of_labels(images, templates, seed=1)) != all_captions(pairs)
    assert pairs.ids == images.ids
    with pytest.raises(ConfigError, match="templates that hold"):
        pairs_of_labels(images, ["a photo"])
