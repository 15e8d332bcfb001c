"""Embeddings of sets: those of the model, computed once, found again, and no numbers refused."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from unpoison.data.encoded import EncodedImages, Picture
from unpoison.data.pixels import to_images
from unpoison.data.shapes import make_shapes
from unpoison.data.sources import open_images
from unpoison.errors import ModelError, NotEnoughDataError, SourceFormatError, UsageError
from unpoison.evaluation.embeddings import embed_images, embed_texts
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.runs import Run


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Counted(EncodedImages):
    """Rows that count what was decoded, and may have broken pictures among them."""

    decoded: list[int] = field(default_factory=list)
    broken: frozenset[int] = frozenset()

    def raw(self, indices: Iterable[int] | np.ndarray) -> list:
        rows = np.asarray(indices).tolist()
        found = zip(rows, super().raw(rows), strict=True)
        return [cell[:40] if row in self.broken and isinstance(cell, bytes) else cell for row, cell in found]

    def decode(self, indices: Iterable[int] | np.ndarray) -> list[Picture]:
        self.decoded.extend(np.asarray(indices).tolist())
        return super().decode(indices)


def rows_of(count: int, broken: Iterable[int] = ()) -> Counted:
    shapes = open_images("shapes:50")
    chosen = shapes.select(range(count))
    return Counted(name="shapes", dataset=chosen.dataset, ids=chosen.ids, broken=frozenset(broken))


def run(cache: Path | None = None) -> Run:
    return Run(accelerator=Accelerator(cpu=True), cache=cache)


@pytest.fixture(scope="module")
def clip() -> TransformersCLIP:
    return load_clip("tiny")


def test_each_picture_is_decoded_once_for_all_models(clip: TransformersCLIP) -> None:
    rows = rows_of(20)
    other = load_clip("tiny")
    with torch.no_grad():
        for weights in other.module.parameters():
            weights.mul_(1.5)
    clip.module.train()
    first, second = embed_images([clip, other], rows, run=run(), batch_size=8)
    assert rows.decoded == list(range(20))
    assert clip.module.training
    clip.module.eval()
    with torch.inference_mode():
        expected = clip.encode_images(to_images(make_shapes(20).images))
    assert first.array == pytest.approx(expected.numpy(), abs=2e-2)  # batches of bfloat16 where the machine has it
    assert (first.array * expected.numpy()).sum(axis=1) == pytest.approx(np.ones(20), abs=1e-3)
    assert np.abs(first.array - second.array).max() > 0.02
    assert first.usable.all()


def test_pictures_that_do_not_decode_are_left_out(clip: TransformersCLIP) -> None:
    (found,) = embed_images([clip], rows_of(20, broken=(3, 8)), run=run(), batch_size=4)
    assert np.flatnonzero(~found.usable).tolist() == [3, 8]
    assert np.isnan(found.array[[3, 8]]).all()
    assert np.isfinite(found.array[found.usable]).all()
    assert [row.id for row in found.skipped] == ["shapes-0:3", "shapes-0:8"]
    with pytest.raises(SourceFormatError, match="3 of 20 rows"):
        embed_images([clip], rows_of(20, broken=(1, 2, 3)), run=run())
    with pytest.raises(NotEnoughDataError, match="have 0"):
        embed_images([clip], rows_of(0), run=run())


def test_a_second_call_decodes_nothing(clip: TransformersCLIP, tmp_path: Path) -> None:
    (first,) = embed_images([clip], rows_of(12, broken=(5,)), run=run(tmp_path))
    rows = rows_of(12, broken=(5,))
    (again,) = embed_images([clip], rows, run=run(tmp_path))
    assert rows.decoded == []
    assert np.array_equal(first.array, again.array, equal_nan=True)
    assert again.skipped == first.skipped
    assert again.usable.tolist() == first.usable.tolist()
    other = rows_of(11, broken=(5,))
    embed_images([clip], other, run=run(tmp_path))
    assert len(other.decoded) == 11
    (kept, *_) = (tmp_path / "clip-embeddings").iterdir()
    for damage in (b"", kept.read_bytes()[:-100], b"\x80\x04cos\nsystem\n" * 9):
        for path in (tmp_path / "clip-embeddings").iterdir():
            path.write_bytes(damage)
        (mended,) = embed_images([clip], rows_of(12, broken=(5,)), run=run(tmp_path))
        assert np.array_equal(first.array, mended.array, equal_nan=True)


def test_other_weights_are_another_entry(tmp_path: Path) -> None:
    changing = load_clip("tiny")
    (first,) = embed_images([changing], rows_of(6), run=run(tmp_path))
    with torch.no_grad():
        for weights in changing.module.parameters():
            weights.mul_(1.5)
    (second,) = embed_images([changing], rows_of(6), run=run(tmp_path))
    assert np.abs(first.array - second.array).max() > 0.02


def test_a_cache_that_cannot_be_written(clip: TransformersCLIP, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written"):
        embed_images([clip], rows_of(4), run=run(tmp_path / "file"))


def test_equal_texts_are_encoded_once_and_come_back_in_order(
    clip: TransformersCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = TransformersCLIP.encode_texts

    def watched(model: TransformersCLIP, texts: Sequence[str]) -> torch.Tensor:
        seen.extend(texts)
        return encode(model, texts)

    monkeypatch.setattr(TransformersCLIP, "encode_texts", watched)
    texts = ["a photo of a star", "a ring", "a photo of a star", "a much longer caption that has many words", "a ring"]
    found = embed_texts(clip, texts, run=run())
    assert sorted(seen) == sorted(set(texts))
    monkeypatch.undo()
    for row, text in zip(found, texts, strict=True):
        assert row == pytest.approx(embed_texts(clip, [text], run=run())[0], abs=2e-2)
    assert np.array_equal(found[0], found[2])


def test_texts(clip: TransformersCLIP) -> None:
    texts = ["a photo of a star.", "👩‍👩‍👧 <b>", "long " * 2000]
    found = embed_texts(clip, texts, run=run())
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), abs=1e-3)
    assert found[:1] == pytest.approx(embed_texts(clip, texts[:1], run=run()), abs=2e-2)


def test_weights_that_are_no_numbers() -> None:
    broken = load_clip("tiny")
    with torch.no_grad():
        for weights in broken.module.parameters():
            weights.view(-1)[0] = float("nan")
    with pytest.raises(ModelError, match="no numbers"):
        embed_images([broken], rows_of(4), run=run())
    with pytest.raises(ModelError, match="no numbers"):
        embed_texts(broken, ["a star"], run=run())


def test_grey_and_odd_sized_pictures_reach_the_model(clip: TransformersCLIP) -> None:
    buffer = io.BytesIO()
    Image.new("L", (90, 41), 128).save(buffer, "PNG")
    rows = rows_of(2)
    picture = {"bytes": buffer.getvalue(), "path": None}
    dataset = rows.dataset.from_dict({"image": [picture, picture]}, features=rows.dataset.features)
    (found,) = embed_images([clip], Counted(name="grey", dataset=dataset, ids=["a", "b"]), run=run())
    assert found.array[0] == pytest.approx(found.array[1], abs=1e-6)
