"""The shapes world: reproducible, described truthfully, and easy to tell apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unpoison.data.shapes import COLOR_NAMES, COLORS, SHAPES_CLASSES, make_shapes, shapes_labels
from unpoison.errors import ConfigError


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 1100), size=st.sampled_from([16, 24]), seed=st.integers(0, 2**32))
def test_first_pictures_do_not_depend_on_how_many_are_drawn(n: int, size: int, seed: int) -> None:
    few, many = make_shapes(n, size=size, seed=seed), make_shapes(1100, size=size, seed=seed)
    assert np.array_equal(few.images, many.images[:n])
    assert few.captions == many.captions[:n]
    assert np.array_equal(few.labels, many.labels[:n])


def test_picture_is_the_same_at_every_size() -> None:
    small, large = make_shapes(50, size=32), make_shapes(50, size=128)
    assert small.captions == large.captions
    shrunk = large.images.reshape(50, 32, 4, 32, 4, 3).mean(axis=(2, 4))
    assert np.abs(shrunk - small.images).mean() < 8


def test_labels_are_had_without_a_picture() -> None:
    for n in (1, 999, 1001):
        assert np.array_equal(shapes_labels(n, seed=4), make_shapes(n, size=8, seed=4).labels)


def test_seeds_give_other_pictures() -> None:
    first, second = make_shapes(100, seed=0), make_shapes(100, seed=1)
    assert not np.array_equal(first.images, second.images)
    assert first.captions != second.captions


def test_classes_and_colors_are_all_drawn_and_never_vanish_in_the_background() -> None:
    world = make_shapes(3000)
    counts = np.bincount(world.labels, minlength=len(SHAPES_CLASSES))
    assert counts.min() > 150
    assert (world.colors != world.backgrounds).all()
    assert set(world.colors.tolist()) == set(range(len(COLOR_NAMES)))
    assert world.images.shape == (3000, 32, 32, 3)
    assert world.images.dtype == np.uint8


def test_captions_name_what_is_drawn() -> None:
    world = make_shapes(500)
    for row, caption in enumerate(world.captions):
        assert SHAPES_CLASSES[world.labels[row]] in caption
        if "background" in caption:
            assert f"{COLOR_NAMES[world.backgrounds[row]]} background" in caption
        if "left" in caption:
            assert world.centers[row, 0] < 0.5
        if "bottom" in caption:
            assert world.centers[row, 1] > 0.5
        assert " a orange" not in caption
        assert "a a " not in caption


def test_object_stays_inside_and_shows_its_color() -> None:
    world = make_shapes(400, size=48)
    half = world.extents[:, None] / 2
    assert (world.centers - half >= -1e-6).all()
    assert (world.centers + half <= 1 + 1e-6).all()
    palette = np.array(list(COLORS.values()), dtype=float)
    distance = np.abs(world.images[:, :, :, None, :] - palette).sum(axis=-1)
    nearest = distance.argmin(axis=-1).reshape(400, -1)
    share = (nearest == world.colors[:, None]).mean(axis=1)
    assert share.min() > 0.03
    assert ((nearest == world.backgrounds[:, None]).mean(axis=1) > 0.15).all()


def test_classes_differ_in_their_masks() -> None:
    """Nearest class mean over centered, color-free silhouettes already tells nearly all classes apart."""
    world = make_shapes(6000)
    front = np.array(list(COLORS.values()), dtype=float)[world.colors][:, None, None]
    back = np.array(list(COLORS.values()), dtype=float)[world.backgrounds][:, None, None]
    masks = ((world.images - back) * (front - back)).sum(-1) / ((front - back) ** 2).sum(-1)
    axis = (np.arange(24) + 0.5) / 24 - 0.5
    crops = np.empty((6000, 24, 24))
    for row in range(6000):
        columns = np.clip((world.centers[row, 0] + axis * world.extents[row]) * 32, 0, 31).astype(int)
        rows = np.clip((world.centers[row, 1] + axis * world.extents[row]) * 32, 0, 31).astype(int)
        crops[row] = masks[row][np.ix_(rows, columns)]
    flat = crops.reshape(6000, -1)
    means = np.stack([flat[:3000][world.labels[:3000] == k].mean(0) for k in range(len(SHAPES_CLASSES))])
    guess = ((flat[3000:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == world.labels[3000:]).mean() > 0.85


@pytest.mark.parametrize(("n", "size"), [(0, 32), (-1, 32), (5, 4)])
def test_impossible_requests_are_refused(n: int, size: int) -> None:
    with pytest.raises(ConfigError, match="n >= 1 and size >= 8"):
        make_shapes(n, size=size)
