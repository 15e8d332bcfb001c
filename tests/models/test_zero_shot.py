"""Zero-shot cosines against NumPy, through the cache, with bad rows and hostile names."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.data.sources import LabelledImages, open_images
from unpoison.errors import ConfigError, DataError, NoSeparationError, SourceFormatError
from unpoison.models import zero_shot
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.models.zero_shot import TEMPLATES, class_embeddings, read_ahead, zero_shot_logits
from unpoison.results import SkippedRow
from unpoison.runs import Run


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> TransformersCLIP:
    return load_clip(clip_folder)


@pytest.fixture(scope="module")
def shapes() -> LabelledImages:
    return open_images("shapes:300")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "CHUNK", 128)


class Watch:
    """Progress that counts, and stops the scan after ``stop`` items."""

    def __init__(self, stop: int | None = None) -> None:
        self.items = 0
        self.stop = stop

    def track(
        self, items: Iterable[Any], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[Any]:
        for item in items:
            if self.items == self.stop:
                raise KeyboardInterrupt
            self.items += 1
            yield item

    def log(self, message: str) -> None: ...


def with_bytes(source: LabelledImages, changes: dict[int, bytes]) -> LabelledImages:
    rows = [{"bytes": changes.get(i, data), "path": None} for i, data in enumerate(source.raw(range(len(source))))]
    column = datasets.Features({"image": datasets.Image(decode=False)})
    return replace(source, dataset=datasets.Dataset.from_dict({"image": rows}, features=column))


def test_cosines_agree_with_numpy(
    clip: TransformersCLIP, shapes: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unpoison.models.clip_transformers.inference_dtype", lambda _: torch.float32)
    source = shapes.select(range(20))
    found = zero_shot_logits(clip, source, run=Run(), templates=TEMPLATES, batch_size=7)
    with torch.no_grad():
        images = clip.encode_images(clip.preprocess(source.decode(range(20)))).numpy()
        texts = [clip.encode_texts([t.replace("{}", name) for t in TEMPLATES]).numpy() for name in source.class_names]
    means = np.stack([each.mean(axis=0) for each in texts]).astype(np.float64)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert found.cosines.dtype == np.float32
    np.testing.assert_allclose(found.cosines, images @ means.T, atol=2e-6)
    assert found.skipped == ()


def test_the_model_stays_as_it_was(clip: TransformersCLIP, shapes: LabelledImages) -> None:
    before = hash_weights(clip.module.state_dict())
    clip.module.train()
    zero_shot_logits(clip, shapes.select(range(4)), run=Run())
    assert all(part.training for part in clip.module.modules())
    clip.module.eval()
    assert hash_weights(clip.module.state_dict()) == before


@pytest.mark.usefixtures("small_chunks")
def test_a_second_scan_takes_all_from_the_cache(
    clip: TransformersCLIP, shapes: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = zero_shot_logits(clip, shapes, run=Run(cache=tmp_path))
    files = sorted((tmp_path / "clip-logits").iterdir())
    assert len(files) == 3
    calls: list[int] = []
    encode = clip.encode_images
    monkeypatch.setattr(clip, "encode_images", lambda images: calls.append(len(images)) or encode(images))
    again = zero_shot_logits(clip, shapes, run=Run(cache=tmp_path), batch_size=50)
    np.testing.assert_array_equal(again.cosines, first.cosines)
    assert calls == []
    files[1].write_bytes(files[1].read_bytes()[:50])
    third = zero_shot_logits(clip, shapes, run=Run(cache=tmp_path))
    np.testing.assert_allclose(third.cosines, first.cosines, atol=1e-6)
    assert 44 <= sum(calls) <= 128
    zero_shot_logits(clip, shapes, run=Run(cache=tmp_path), templates=("{}",))
    assert len(list((tmp_path / "clip-logits").iterdir())) == 6


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_scan_goes_on(clip: TransformersCLIP, shapes: LabelledImages, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        zero_shot_logits(clip, shapes, run=Run(cache=tmp_path, progress=Watch(stop=5)), batch_size=32)
    assert len(list((tmp_path / "clip-logits").glob("*.safetensors"))) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    found = zero_shot_logits(clip, shapes, run=Run(cache=tmp_path), batch_size=32)
    np.testing.assert_array_equal(found.cosines, zero_shot_logits(clip, shapes, run=Run(), batch_size=32).cosines)


@pytest.mark.usefixtures("small_chunks")
def test_bad_rows_are_skipped_with_their_reason_from_the_cache_too(
    clip: TransformersCLIP, shapes: LabelledImages, tmp_path: Path
) -> None:
    source = with_bytes(shapes, {3: b"no image", 200: b""})
    good = np.setdiff1d(np.arange(300), [3, 200])
    plain = zero_shot_logits(clip, shapes, run=Run())
    for _ in range(2):
        found = zero_shot_logits(clip, source, run=Run(cache=tmp_path))
        assert [row.id for row in found.skipped] == [source.ids[3], source.ids[200]]
        assert all(row.reason for row in found.skipped)
        assert np.isnan(found.cosines[[3, 200]]).all()
        np.testing.assert_allclose(found.cosines[good], plain.cosines[good], atol=1e-6)


def test_too_many_bad_rows_stop_the_scan(clip: TransformersCLIP, shapes: LabelledImages) -> None:
    source = with_bytes(shapes.select(range(20)), dict.fromkeys(range(3), b"no image"))
    with pytest.raises(SourceFormatError, match="3 of 20 rows"):
        zero_shot_logits(clip, source, run=Run())


class Invert:
    """An overlay that turns the picture of one id around."""

    fingerprint = "invert"

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, ids: Any, images: list[Any]) -> list[Any]:
        return [
            Image.fromarray(255 - np.asarray(image))
            if name == self.name and not isinstance(image, SkippedRow)
            else image
            for name, image in zip(ids, images, strict=True)
        ]


def test_an_overlay_has_cosines_of_its_own(clip: TransformersCLIP, shapes: LabelledImages, tmp_path: Path) -> None:
    source = shapes.select(range(30))
    plain = zero_shot_logits(clip, source, run=Run(cache=tmp_path))
    changed = source.with_labels(source.labels, overlay=Invert(source.ids[4]))
    found = zero_shot_logits(clip, changed, run=Run(cache=tmp_path))
    different = np.abs(found.cosines - plain.cosines).max(axis=1) > 1e-6
    assert np.flatnonzero(different).tolist() == [4]


def test_names_that_are_cut_off_are_told_and_twins_refused(clip: TransformersCLIP, shapes: LabelledImages) -> None:
    names = list(shapes.class_names)
    names[1] = "b" * 60
    source = replace(shapes.select(range(3)), class_names=tuple(names))
    assert zero_shot_logits(clip, source, run=Run()).truncated == ("b" * 60,)
    names[2] = "b" * 70
    with pytest.raises(DataError, match="cannot tell these class names apart"):
        class_embeddings(clip, names)
    with pytest.raises(DataError, match="'Cat' and 'cat'"):
        class_embeddings(clip, ["Cat", "cat", "b"])
    with pytest.raises(NoSeparationError, match="gives all 3 class names"):
        class_embeddings(clip, ["Cat", "cat", "CAT"])


def test_names_with_braces_and_markup_are_only_text(clip: TransformersCLIP) -> None:
    found = class_embeddings(clip, ["{0.__class__}", "<script>", "{}", "plain"])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("templates", [(), ("a photo",)])
def test_templates_without_a_place_for_the_name_are_refused(clip: TransformersCLIP, templates: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="templates"):
        class_embeddings(clip, ["a", "b"], templates)


def test_reading_ahead_keeps_the_order_and_hands_errors_over() -> None:
    assert list(read_ahead(iter(range(10)))) == list(range(10))
    assert list(read_ahead(iter(()))) == []

    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("bad")

    ahead = read_ahead(failing())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="bad"):
        next(ahead)
