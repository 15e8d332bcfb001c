"""The pixel cache: right pixels, found again, never half written."""

import fcntl
import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.data.pixels import Pixels, fit, load_pixels, to_images
from unpoison.data.shapes import make_shapes
from unpoison.data.sources import Picture, open_images
from unpoison.errors import SourceFormatError, UsageError
from unpoison.results import SkippedRow
from unpoison.runs import Silent

T = TypeVar("T")


class Counting(Silent):
    """Counts the batches that were decoded; stops after ``stop`` of them, as Ctrl-C would."""

    def __init__(self, stop: int | None = None) -> None:
        self.batches = 0
        self.stop = stop

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[T]:
        for item in items:
            if self.batches == self.stop:
                raise KeyboardInterrupt
            self.batches += 1
            yield item


class Darken:
    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]:
        return [image if isinstance(image, SkippedRow) else Image.new("RGB", image.size) for image in images]


@pytest.mark.parametrize("cached", [True, False])
def test_pixels_are_those_of_the_pictures(tmp_path: Path, cached: bool) -> None:
    source = open_images("shapes:1500")
    pixels = load_pixels(source, 32, cache=tmp_path if cached else None, progress=Silent())
    assert np.array_equal(pixels.array, make_shapes(1500).images)
    assert pixels.usable.all()
    assert pixels.skipped == ()


def test_pixels_of_some_rows(tmp_path: Path) -> None:
    whole = Pixels(
        array=make_shapes(1500).images,
        usable=~np.isin(np.arange(1500), [3, 700, 1400]),
        skipped=tuple(SkippedRow(id=str(row), reason="none") for row in (3, 700, 1400)),
    )
    rows = np.arange(0, 1500, 2)
    some = whole.of(rows)
    assert np.array_equal(some.array, whole.array[rows])
    assert np.flatnonzero(~some.usable).tolist() == [350, 700]
    assert [row.id for row in some.skipped] == ["700", "1400"]


def test_second_call_decodes_nothing_whatever_the_set_is_called(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    source = open_images("shapes:100")
    load_pixels(source, 32, cache=tmp_path, progress=first)
    again = load_pixels(open_images("shapes:100:0"), 32, cache=tmp_path, progress=second)
    assert (first.batches, second.batches) == (1, 0)
    assert isinstance(again.array, np.memmap)
    assert not again.array.flags.writeable
    assert np.array_equal(again.array, make_shapes(100).images)


def test_other_size_images_or_overlay_are_other_pixels(tmp_path: Path) -> None:
    source = open_images("shapes:60")
    dark, darker = (source.with_labels(source.labels, Darken(name)) for name in ("a", "b"))
    for given, size in ((source, 32), (source, 16), (source.select(range(50)), 32), (dark, 32), (darker, 32)):
        counting = Counting()
        pixels = load_pixels(given, size, cache=tmp_path, progress=counting)
        assert counting.batches == 1
        assert pixels.array.shape == (len(given), size, size, 3)
        assert (pixels.array.max() == 0) == (given.overlay is not None)
    assert len(list(tmp_path.glob("*.npy"))) == 5


def test_skipped_rows_are_kept_with_their_reasons(class_folders: Path, tmp_path: Path) -> None:
    for index in range(10, 40):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(class_folders / "cat" / f"{index}.png")
    (class_folders / "cat" / "broken.png").write_bytes(b"broken")
    source = open_images(class_folders)
    for _ in range(2):
        pixels = load_pixels(source, 8, cache=tmp_path / "cache", progress=Silent())
        row = source.ids.index("cat/broken.png")
        assert np.flatnonzero(~pixels.usable).tolist() == [row]
        assert pixels.array[row].max() == 0
        assert [skip.id for skip in pixels.skipped] == ["cat/broken.png"]
        assert "damaged" in pixels.skipped[0].reason


def test_too_many_undecodable_images_stop(class_folders: Path) -> None:
    (class_folders / "cat" / "0.png").write_bytes(b"broken")
    with pytest.raises(SourceFormatError, match="1 of 6 rows"):
        load_pixels(open_images(class_folders), 8, cache=None, progress=Silent())


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    source = open_images("shapes:1100")
    with pytest.raises(KeyboardInterrupt):
        load_pixels(source, 16, cache=tmp_path, progress=Counting(stop=1))
    assert list(tmp_path.iterdir()) == []
    pixels = load_pixels(source, 16, cache=tmp_path, progress=Silent())
    assert pixels.array[-1].max() > 0


@pytest.mark.parametrize("damage", ["short", "garbage", "json", "no json"])
def test_damaged_files_are_computed_again(tmp_path: Path, damage: str) -> None:
    source = open_images("shapes:60")
    load_pixels(source, 16, cache=tmp_path, progress=Silent())
    (array,), (reasons,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    if damage == "short":
        array.write_bytes(array.read_bytes()[:500])
    elif damage == "garbage":
        array.write_bytes(b"\x80\x04cos\nsystem\n" * 50)
    elif damage == "json":
        reasons.write_bytes(b'{"-7": "x", "900": "y"}')
    else:
        reasons.unlink()
    counting = Counting()
    pixels = load_pixels(source, 16, cache=tmp_path, progress=counting)
    assert counting.batches == 1
    assert pixels.usable.all()


class Watching(Silent):
    """Notes the room that partial files have taken in ``folder`` before the first image is decoded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: list[int] = []

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[T]:
        self.taken = [512 * path.stat().st_blocks for path in self.folder.glob(".pixels-*.partial")]
        yield from items


@pytest.mark.parametrize("call", ["posix_fallocate", None])
def test_the_room_is_taken_before_anything_is_decoded(
    tmp_path: Path, call: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if call is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    watching = Watching(tmp_path)
    pixels = load_pixels(open_images("shapes:60"), 64, cache=tmp_path, progress=watching)
    assert len(watching.taken) == 1
    assert watching.taken[0] >= 60 * 64 * 64 * 3
    assert pixels.array.max() > 0
    assert len(list(tmp_path.iterdir())) == 2
    again = load_pixels(open_images("shapes:60"), 64, cache=tmp_path, progress=Silent())
    assert np.array_equal(again.array, pixels.array)


@pytest.mark.parametrize("cached", [True, False])
def test_a_full_disk_is_said_before_anything_is_decoded(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unpoison.data.pixels._IN_MEMORY", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    counting = Counting()
    source = open_images("shapes:400")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as good as full: longer files are refused
    try:
        with pytest.raises(UsageError, match="decoded images cannot be written") as caught:
            load_pixels(source, 32, cache=tmp_path if cached else None, progress=counting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "1 MiB" in caught.value.hint
    assert counting.batches == 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_what_another_decodes_is_not(tmp_path: Path) -> None:
    left, fresh, held = (tmp_path / f".pixels-{name}.partial" for name in ("left", "fresh", "held"))
    for path in (left, fresh, held):
        path.write_bytes(b"half")
    for path in (left, held):
        os.utime(path, (0, 0))
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        load_pixels(open_images("shapes:60"), 16, cache=tmp_path, progress=Silent())
    assert sorted(path.name for path in tmp_path.glob(".*")) == [fresh.name, held.name]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written"):
        load_pixels(open_images("shapes:60"), 16, cache=tmp_path / "file" / "cache", progress=Silent())


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (37, 21), (8, 8), (5, 9)])
def test_fit_is_resize_of_the_short_side_and_center_crop(shape: tuple[int, int]) -> None:
    width, height = shape
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    scale = 10 / min(shape)
    scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 10) / 2, (scaled.height - 10) / 2
    expected = np.asarray(scaled.crop((int(left), int(top), int(left) + 10, int(top) + 10))).astype(int)
    fitted = np.asarray(fit(image, 10)).astype(int)
    assert fitted.shape == (10, 10, 3)
    assert np.abs(fitted - expected).mean() < 8


def test_fit_leaves_ready_images_alone_and_tames_extreme_ones() -> None:
    ready = Image.new("RGB", (10, 10))
    assert fit(ready, 10) is ready
    assert fit(Image.new("RGB", (1, 500_000)), 10).size == (10, 10)


def test_images_are_in_the_unit_range() -> None:
    array = np.array([0, 51, 255], dtype=np.uint8).reshape(1, 1, 1, 3).repeat(2, axis=1)
    array.flags.writeable = False
    images = to_images(array)
    assert images.shape == (1, 3, 2, 1)
    assert images.dtype == torch.float32
    assert images[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
