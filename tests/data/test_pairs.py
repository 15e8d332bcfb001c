"""Image-text pairs: every layout opens, captions survive whatever they hold, bad rows are values with reasons."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unpoison.data.captions import BLOCK, captions_dataset
from unpoison.data.encoded import Overlay
from unpoison.data.pairs import ImageTextPairs, count_cut_captions, join_pairs, open_pairs, pairs_of_labels
from unpoison.data.pixels import ImageRows
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError, NotEnoughDataError, SourceFormatError
from unpoison.models.clip_transformers import load_clip

HOSTILE = (
    '<script>alert("1")</script><img src=x onerror=alert(1)>',
    "👩‍👩‍👧 a family 🏳️‍🌈 e\u0301",
    "字" * 10_000,
    "a, \"quoted\"\tcaption; with 'every' \\n mark {} %s {0}",
    "=cmd|' /C calc'!A0",
    "קטן \u202eright to left",
)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, count: int = 20, **columns: object) -> Path:
    table = {
        "image": [{"bytes": picture(row), "path": None} for row in range(count)],
        "caption": [f"picture {row}" for row in range(count)],
    }
    table |= columns  # pyright: ignore[reportAssignmentType]
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), path)
    return path


def write_pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{row:03}.png" for row in range(count)]
    for row, name in enumerate(names):
        (folder / name).write_bytes(picture(row))
    return names


def all_captions(pairs: ImageTextPairs) -> list[tuple[str, ...]]:
    return pairs.captions(range(len(pairs)))


# Parquet


def test_a_column_of_texts(tmp_path: Path) -> None:
    pairs = open_pairs(write_parquet(tmp_path / "set.parquet"))
    assert pairs.ids[:2] == ["set:0", "set:1"]
    assert pairs.captions([3, 1]) == [("picture 3",), ("picture 1",)]
    assert pairs.raw([3, 1]) == [picture(3), picture(1)]
    assert pairs.skipped == ()
    assert isinstance(pairs, ImageRows)


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2), pa.string(), pa.large_string(),
     pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)  # fmt: skip
def test_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    several = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    given = [[f"{row} a", f"{row} b"] if several else f"{row} a" for row in range(20)]
    pairs = open_pairs(write_parquet(tmp_path / "x.parquet", caption=pa.array(given, kind)))
    assert pairs.captions([19, 4]) == [("19 a", "19 b")[: 1 + several], ("4 a", "4 b")[: 1 + several]]
    assert pairs.texts.features["captions"].feature.dtype == "large_string"


def test_hostile_captions_are_kept_as_they_are(tmp_path: Path) -> None:
    given = [[f"  {text}\n" for text in HOSTILE] for _ in range(20)]
    pairs = open_pairs(write_parquet(tmp_path / "x.parquet", caption=given))
    assert pairs.captions([7]) == [HOSTILE]


def test_blank_captions_are_skipped_with_their_reasons(tmp_path: Path) -> None:
    given: list[list[str | None] | None] = [[f"picture {row}"] for row in range(60)]
    given[2], given[5], given[9], given[11], given[13] = None, [], ["", " \t\u3000"], ["\u200b\ufeff\0"], [None]
    given[20] = ["  ", "one is enough", None]
    pairs = open_pairs(write_parquet(tmp_path / "x.parquet", 60, caption=given))
    assert {row.id: row.reason for row in pairs.skipped} == {
        "x:2": "the row has no caption",
        "x:5": "the row has no caption",
        "x:9": "the caption is empty",
        "x:11": "the caption is empty",
        "x:13": "the row has no caption",
    }
    assert pairs.captions([pairs.ids.index("x:20")]) == [("one is enough",)]
    assert pairs.raw([2]) == [picture(3)]
    assert pairs.captions([2]) == [("picture 3",)]


def test_captions_that_are_not_utf8_are_skipped(tmp_path: Path) -> None:
    good = [f"picture {row}".encode() for row in range(40)]
    good[3] = b"caf\xe9"
    offsets = np.cumsum([0, *map(len, good)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(good))]
    broken = pa.Array.from_buffers(pa.string(), 40, buffers)
    pairs = open_pairs(write_parquet(tmp_path / "x.parquet", 40, caption=broken))
    assert [(row.id, row.reason) for row in pairs.skipped] == [("x:3", "the caption is not UTF-8")]
    assert pairs.captions([3]) == [("picture 4",)]


def test_too_many_bad_rows_stop_and_strict_allows_none(tmp_path: Path) -> None:
    blank = ["" if row < 3 else "text" for row in range(20)]
    with pytest.raises(SourceFormatError, match=r"3 of 20 rows cannot be used.*x:0: the caption is empty"):
        open_pairs(write_parquet(tmp_path / "x.parquet", caption=blank))
    path = write_parquet(tmp_path / "y.parquet", caption=["" if row < 2 else "text" for row in range(20)])
    assert len(open_pairs(path)) == 18
    with pytest.raises(SourceFormatError, match="expected none, as asked"):
        open_pairs(path, strict=True)
    assert len(open_pairs(f"{path}[2:20]", strict=True)) == 18


def test_row_ranges_and_limit(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet")
    part = open_pairs(f"{path}[5:10]")
    assert part.ids == [f"set:{row}" for row in range(5, 10)]
    assert part.captions([0]) == [("picture 5",)]
    drawn = [open_pairs(path, limit=6, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0].ids == drawn[1].ids != drawn[2].ids
    assert all_captions(drawn[0]) == [(f"picture {name.removeprefix('set:')}",) for name in drawn[0].ids]
    with pytest.raises(NotEnoughDataError, match="have 0"):
        open_pairs(f"{path}[50:60]")
    with pytest.raises(ConfigError, match="limit of at least 1"):
        open_pairs(path, limit=0)


def test_missing_columns_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SourceFormatError, match="no caption column among the columns 'image', 'label'") as caught:
        open_pairs(write_parquet(tmp_path / "a.parquet", caption=None, label=[0] * 20))
    assert "--caption-column" in caught.value.hint
    with pytest.raises(SourceFormatError, match="not texts or lists of texts"):
        open_pairs(write_parquet(tmp_path / "b.parquet", caption=list(range(20))))
    path = write_parquet(tmp_path / "c.parquet", caption=None, words=["w"] * 20, text=[1] * 20)
    assert open_pairs(path, caption_column="words").captions([0]) == [("w",)]


def test_rows_of_one_id_are_captions_of_one_image(tmp_path: Path) -> None:
    ids = [f"i{row // 2}" for row in range(40)]
    images = [{"bytes": picture(row // 2), "path": None} for row in range(40)]
    images[7] = {"bytes": picture(99), "path": None}
    texts = [f"{name} {'ab'[row % 2]}" for row, name in enumerate(ids)]
    texts[10] = " "
    path = write_parquet(tmp_path / "x.parquet", 40, id=ids, image=images, caption=texts)
    pairs = open_pairs(path)
    assert pairs.ids == [f"i{row}" for row in range(20)]
    assert [(row.id, row.reason) for row in pairs.skipped] == [
        ("i3", "two images of one id; this is the later one"),
        ("i5", "the caption is empty"),
    ]
    assert pairs.captions([2, 3, 5]) == [("i2 a", "i2 b"), ("i3 a",), ("i5 b",)]
    assert pairs.raw([4, 5]) == [picture(4), picture(5)]


def test_many_rows_of_captions_are_gathered_across_blocks() -> None:
    texts = captions_dataset([f"text {row}"] for row in range(2 * BLOCK + 3))
    pairs = ImageTextPairs(
        name="x",
        dataset=datasets.Dataset.from_dict({"image": [None] * len(texts)}),
        ids=[str(row) for row in range(len(texts))],
        texts=texts,
    )
    assert all_captions(pairs) == [(f"text {row}",) for row in range(len(texts))]
    assert pairs.captions([BLOCK, 0, 2 * BLOCK]) == [(f"text {BLOCK}",), ("text 0",), (f"text {2 * BLOCK}",)]


# Lists of paths


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("given_as", ["file", "folder"])
def test_several_lines_of_one_path(tmp_path: Path, suffix: str, given_as: str) -> None:
    names = write_pictures(tmp_path / "images", 12)
    rows = [(f"images/{name}", f"{text} of {name}") for name in names for text in ("NA", "<b>two</b>", "three")]
    rows[4] = ("../outside.png", "x")
    rows[8] = ("https://example.org/1.png", "x")
    path = tmp_path / f"captions.{suffix}"
    if suffix == "csv":
        lines = ["image,caption", *(f'{image},"{text}"' for image, text in rows)]
    else:
        lines = [json.dumps({"file_name": image, "text": text}) for image, text in rows]
    path.write_text("\n".join(lines) + "\n")
    (tmp_path.parent / "outside.png").write_bytes(picture(0))
    pairs = open_pairs(path if given_as == "file" else tmp_path)
    assert pairs.ids == [f"images/{name}" for name in names]
    assert [row.id for row in pairs.skipped] == ["../outside.png", "https://example.org/1.png"]
    assert pairs.captions([0, 1]) == [
        tuple(f"{text} of 000.png" for text in ("NA", "<b>two</b>", "three")),
        ("NA of 001.png", "three of 001.png"),
    ]
    assert pairs.raw([11]) == [picture(11)]


def test_lists_of_captions_in_json_lines(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 10)
    lines = [json.dumps({"image": name, "captions": list(HOSTILE)}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    pairs = open_pairs(tmp_path)
    assert pairs.captions([9]) == [HOSTILE]
    assert pairs.ids == names


def test_a_long_caption_in_a_csv(tmp_path: Path) -> None:
    name = write_pictures(tmp_path, 1)[0]
    (tmp_path / "x.csv").write_text(f'image,caption\n{name},"{"long, " * 5000}\nover lines"\n', encoding="utf-8-sig")
    assert open_pairs(tmp_path / "x.csv").captions([0]) == [("long, " * 5000 + "\nover lines",)]


def test_two_lists_of_captions_are_ambiguous(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "captions.csv").write_text("image,caption\n000.png,a\n")
    (tmp_path / "metadata.csv").write_text("image,caption\n000.png,b\n")
    with pytest.raises(SourceFormatError, match=r"several lists of captions: captions\.csv, metadata\.csv"):
        open_pairs(tmp_path)


def test_a_list_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_pictures(folder, 2)
    (tmp_path / "secret.csv").write_text("image,caption\n000.png,secret\n")
    (folder / "captions.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(SourceFormatError, match="leads out of the data set's folder"):
        open_pairs(folder)


# Folders of images and texts


def test_a_text_beside_each_image(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "set" / "deep", 30)
    for row, name in enumerate(names):
        text = f"line one of {row}\r\n\r\n  line two  \n"
        (tmp_path / "set" / "deep" / name).with_suffix(".txt").write_text(text, encoding="utf-8-sig")
    (tmp_path / "secret.txt").write_text("secret")
    for row in range(3):
        (tmp_path / "set" / "deep" / names[row]).with_suffix(".txt").unlink()
    (tmp_path / "set" / "deep" / "001.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "set" / "deep" / "002.txt").write_bytes(b"caf\xe9")
    (tmp_path / "set" / "notes.txt").write_text("no image beside it")
    pairs = open_pairs(tmp_path / "set")
    assert pairs.ids == [f"deep/{name}" for name in names[3:]]
    assert all_captions(pairs)[0] == ("line one of 3", "line two")
    assert [row.reason for row in pairs.skipped] == [
        "no caption: there is no file 'deep/000.txt'",
        "no caption: 'deep/001.txt' leads out of the data set's folder",
        "no caption: 'deep/002.txt' is not UTF-8",
    ]
    assert pairs.raw([0]) == [picture(3)]


def test_a_text_file_that_is_no_caption_is_not_read(tmp_path: Path) -> None:
    for name in write_pictures(tmp_path, 10):
        (tmp_path / name).with_suffix(".txt").write_text("text")
    (tmp_path / "000.txt").write_bytes(b"x" * (1 << 20) + b"x")
    assert "more than 1,048,576" in open_pairs(tmp_path).skipped[0].reason


def test_folders_named_after_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in write_pictures(tmp_path / split, 2):
            (tmp_path / split / name).with_suffix(".txt").write_text(split)
    assert open_pairs(tmp_path).ids == ["train/000.png", "train/001.png"]
    assert open_pairs(tmp_path, split="validation").captions([0]) == [("val",)]
    (tmp_path / "val" / "captions.csv").write_text("image,caption\n001.png,listed\n")
    assert open_pairs(tmp_path, split="val").captions([0]) == [("listed",)]


def test_file_names_are_text(tmp_path: Path) -> None:
    names = ["<script>.png", "im[0]*?.png", "日本 ü.png", "a.b.png", "x::y.png"]
    for name in names:
        (tmp_path / name).write_bytes(picture(0))
        (tmp_path / name).with_suffix(".txt").write_text(name)
    pairs = open_pairs(tmp_path)
    assert sorted(pairs.ids) == sorted(names)
    assert all(texts == (name,) for name, texts in zip(pairs.ids, all_captions(pairs), strict=True))
    assert all(isinstance(image, Image.Image) for image in pairs.decode(range(len(pairs))))


@pytest.mark.parametrize("kind", ["nothing", "only texts"])
def test_folders_without_images(tmp_path: Path, kind: str) -> None:
    if kind == "only texts":
        (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SourceFormatError, match="there is no image in it"):
        open_pairs(tmp_path)


def test_a_folder_of_classes_has_no_captions(class_folders: Path) -> None:
    with pytest.raises(SourceFormatError, match=r"no caption: there is no file 'cat/0\.txt'"):
        open_pairs(class_folders)


# Shards


def write_shard(path: Path, captions: Sequence[str], start: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for row, text in enumerate(captions):
            for name, data in ((f"s{row:03}.png", picture(start + row)), (f"s{row:03}.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_webdataset_shards_number_from_zero_each(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.tar", HOSTILE)
    write_shard(tmp_path / "00001.tar", HOSTILE, start=50)
    one, both = open_pairs(tmp_path / "00000.tar"), open_pairs(tmp_path)
    assert one.ids == [f"s{row:03}" for row in range(6)]
    assert all_captions(one) == [(text,) for text in HOSTILE]
    assert both.ids == [f"0000{shard}/s{row:03}" for shard in (0, 1) for row in range(6)]
    assert both.raw([0, 6]) == [picture(0), picture(50)]


@pytest.mark.parametrize("path", ["/no/such/folder", "gone.parquet", "nul\0byte"])
def test_paths_that_do_not_exist(path: str) -> None:
    with pytest.raises(SourceFormatError, match="no such file or folder"):
        open_pairs(path)


# Several sets as one


def test_joined_sets_keep_their_rows_apart(black: Overlay, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one, two = (write_parquet(tmp_path / place) for place in ("train.parquet", "a/train.parquet"))
    names = write_pictures(tmp_path / "b", 3)
    for name in names:
        (tmp_path / "b" / name).with_suffix(".txt").write_text(f"{name}\nagain")
    parts = {"one": open_pairs(one), "two": open_pairs(two).select([5, 2]), "three": open_pairs(tmp_path / "b")}
    joined = join_pairs(parts)
    assert joined.ids[19:] == ["one/train:19", "two/train:5", "two/train:2", *(f"three/{name}" for name in names)]
    assert joined.captions([20, 22]) == [("picture 5",), ("000.png", "again")]
    assert joined.raw([21, 24]) == [picture(2), picture(2)]
    with pytest.raises(ConfigError, match="without an overlay"):
        join_pairs({"one": parts["one"].with_overlay(black, {})})


def test_cut_captions_are_counted(tmp_path: Path) -> None:
    given = [["short", "long " * 200], ["<|endoftext|> x", "z " * 999], ["short"], [" short" + " " * 900]]
    given += [["s"]] * 16
    pairs = open_pairs(write_parquet(tmp_path / "x.parquet", caption=given))
    found = count_cut_captions(load_clip("tiny"), pairs)
    assert (found.cut, found.total, found.images_without_whole) == (3, 22, 1)


@pytest.mark.real_data
def test_flickr8k(shared: Path) -> None:
    path = shared / "data" / "flickr8k" / "validation.parquet"
    pairs = open_pairs(f"{path}[0:40]")
    assert len(pairs) == 40
    assert pairs.skipped == ()
    assert all(len(texts) == 5 for texts in all_captions(pairs))
    assert pairs.captions([0])[0][3] == "A child plays with a toy in the grass ."
    assert all(isinstance(image, Image.Image) and max(image.size) == 128 for image in pairs.decode(range(4)))
    labelled = pairs_of_labels(open_images(shared / "data" / "cifar10" / "test.parquet", rows=slice(0, 30)), ["a {}."])
    both = join_pairs({"flickr8k": pairs, "cifar10": labelled})
    assert (both.ids[0], both.ids[40]) == ("flickr8k/validation:0", "cifar10/test:0")
    assert both.captions([40])[0][0] in {"a cat.", "a ship."}
