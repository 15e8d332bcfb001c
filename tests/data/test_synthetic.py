"""Pictures drawn for captions: kept with their captions, a failure costs its own caption alone."""

from __future__ import annotations

import pytest
from PIL import Image

from unpoison import join_pairs, open_pairs, render_pairs
from unpoison.errors import NotEnoughDataError, SourceFormatError


def paint(caption: str) -> Image.Image:
    """One plain picture: its red is the caption's length."""
    if "fail" in caption:
        raise RuntimeError("no paint left")
    return Image.new("RGB", (8, 8), (len(caption), 0, 0))


def test_a_picture_for_each_caption() -> None:
    captions = [f"  {'a' * n} picture " for n in range(1, 20)]
    pairs = render_pairs(captions, paint, name="mine")
    assert len(pairs) == 19
    assert pairs.ids[3] == "mine:3"
    assert pairs.captions([3]) == [("aaaa picture",)]
    (picture,) = pairs.decode([3])
    assert isinstance(picture, Image.Image)
    assert picture.getpixel((0, 0)) == (len("aaaa picture"), 0, 0)
    both = join_pairs({"found": open_pairs("shapes:5"), "made up": pairs})
    assert len(both) == 24
    assert both.captions([5]) == [("a picture",)]


def test_a_failure_costs_its_caption() -> None:
    pairs = render_pairs(["fail here", *["a dog"] * 19], paint)
    assert len(pairs) == 19
    assert [(row.id, row.reason) for row in pairs.skipped] == [
        ("rendered:0", "the renderer failed (RuntimeError: no paint left)")
    ]
    blank = render_pairs([" \n", *["a dog"] * 19], paint)
    assert blank.skipped[0].reason == "no caption"


def test_too_many_failures_stop() -> None:
    with pytest.raises(SourceFormatError, match="2 of 10 rows cannot be used"):
        render_pairs([*["fail"] * 2, *["a dog"] * 8], paint)
    with pytest.raises(SourceFormatError, match="returned a str, no picture"):
        render_pairs(["a dog"], str)  # pyright: ignore[reportArgumentType] - that is the mistake
    with pytest.raises(NotEnoughDataError):
        render_pairs([], paint)
