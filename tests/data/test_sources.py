"""Sources: every layout opens with stable ids, bad rows are counted, and nothing outside the folder is read."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unpoison.data.sources import LabelledImages, Picture, check_skips, open_images
from unpoison.errors import ConfigError, LabelRangeError, NotEnoughDataError, SourceFormatError
from unpoison.results import SkippedRow


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, count: int = 40, **columns: object) -> Path:
    """A parquet file of ``count`` rows as pandas would write it, without the features of ``datasets``."""
    table = {
        "image": [{"bytes": picture(row), "path": None} for row in range(count)],
        "label": [row % 2 for row in range(count)],
    }
    table |= columns  # pyright: ignore[reportAssignmentType]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), path)
    return path


def same_picture(image: Picture, data: bytes) -> bool:
    assert isinstance(image, Image.Image)
    return np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))


# Folders of class folders


def test_class_folders(class_folders: Path) -> None:
    source = open_images(class_folders)
    assert source.class_names == ("cat", "dog")
    assert source.ids == [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(3)]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.skipped == ()
    assert same_picture(source.decode([4])[0], (class_folders / "dog" / "1.png").read_bytes())


def test_same_name_with_another_suffix_is_another_sample(class_folders: Path) -> None:
    (class_folders / "cat" / "1.jpg").write_bytes(picture(77))
    source = open_images(class_folders)
    assert {"cat/1.jpg", "cat/1.png"} <= set(source.ids)
    assert source.skipped == ()


def test_odd_names_are_text(tmp_path: Path) -> None:
    names = ["<script>alert(1)<b>", "c[at]*?", "a::b", "日本 ü", "train", "100%#{x}"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "im[0]::x.png").write_bytes(picture(1))
    source = open_images(tmp_path)
    assert source.class_names == tuple(sorted(names))
    assert all(isinstance(image, Image.Image) for image in source.decode(range(len(source))))


def test_deeper_folders_belong_to_their_class_and_other_files_are_no_rows(class_folders: Path) -> None:
    (class_folders / "cat" / "more" / "deep").mkdir(parents=True)
    (class_folders / "cat" / "more" / "deep" / "9.png").write_bytes(picture(9))
    (class_folders / "cat" / ".hidden.png").write_bytes(b"x")
    (class_folders / "cat" / "notes.txt").write_text("x")
    (class_folders / "metadata.csv").write_text("file_name,label\n../secret.png,3\n")
    source = open_images(class_folders)
    assert len(source) == 7
    assert source.labels[source.ids.index("cat/more/deep/9.png")] == 0


def test_folders_named_after_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(picture(0))
    assert open_images(tmp_path).ids == ["train/cat/0.png", "train/dog/0.png"]
    assert open_images(tmp_path, split="test").ids == ["test/cat/0.png", "test/dog/0.png"]
    with pytest.raises(SourceFormatError, match="no split 'validation'"):
        open_images(tmp_path, split="validation")


def test_a_class_with_one_sample_opens(class_folders: Path) -> None:
    (class_folders / "rare").mkdir()
    (class_folders / "rare" / "only.png").write_bytes(picture(5))
    assert np.bincount(open_images(class_folders).labels).tolist() == [3, 3, 1]


def test_links_out_of_the_folder_are_skipped_and_not_read(class_folders: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.png").write_bytes(picture(99))
    for index in range(10, 50):
        (class_folders / "cat" / f"{index}.png").write_bytes(picture(index))
    (class_folders / "cat" / "leak.png").symlink_to(secret / "s.png")
    (class_folders / "dog" / "linked").symlink_to(secret)
    (class_folders / "dog" / "fine.png").symlink_to(class_folders / "cat" / "0.png")
    source = open_images(class_folders)
    assert {row.id: row.reason for row in source.skipped} == {
        "cat/leak.png": "'cat/leak.png' leads out of the data set's folder",
        "dog/linked": "linked folders are not entered",
    }
    assert "dog/fine.png" in source.ids


def test_a_link_put_in_place_after_opening_is_not_followed(class_folders: Path, tmp_path: Path) -> None:
    source = open_images(class_folders)
    (tmp_path / "secret.png").write_bytes(picture(99))
    target = class_folders / "cat" / "0.png"
    target.unlink()
    target.symlink_to(tmp_path / "secret.png")
    (class_folders / "cat" / "1.png").unlink()
    first, second, third = source.raw([0, 1, 2])
    assert isinstance(first, SkippedRow)
    assert "leads out" in first.reason
    assert isinstance(second, SkippedRow)
    assert "no file" in second.reason
    assert third == (class_folders / "cat" / "2.png").read_bytes()


@pytest.mark.parametrize("kind", ["nothing", "only files", "empty class folders", "text in class folders"])
def test_folders_without_classes(tmp_path: Path, kind: str) -> None:
    if kind == "only files":
        (tmp_path / "0.png").write_bytes(picture(0))
    elif kind != "nothing":
        (tmp_path / "cat").mkdir()
    if kind == "text in class folders":
        (tmp_path / "cat" / "x.txt").write_text("x")
    with pytest.raises(SourceFormatError) as caught:
        open_images(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_one_class_only(class_folders: Path) -> None:
    with pytest.raises(NotEnoughDataError, match="have 1, need at least 2"):
        open_images(f"{class_folders}[0:3]")


def test_files_that_are_not_utf8(class_folders: Path) -> None:
    for index in range(10, 40):
        (class_folders / "cat" / f"{index}.png").write_bytes(picture(index))
    name = os.fsencode(class_folders / "cat") + b"/\xff.png"
    try:
        Path(os.fsdecode(name)).write_bytes(picture(1))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert [row.reason for row in open_images(class_folders).skipped] == ["the file's name is not UTF-8"]


# Tables


def test_parquet_without_features(tmp_path: Path) -> None:
    source = open_images(write_parquet(tmp_path / "set.parquet"))
    assert source.ids[:2] == ["set:0", "set:1"]
    assert source.class_names == ("0", "1")
    assert source.raw([3, 1]) == [picture(3), picture(1)]


def test_row_ranges_keep_the_ids_of_the_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet")
    part = open_images(f"{path}[10:20]")
    assert part.ids == [f"set:{row}" for row in range(10, 20)]
    assert part.raw([0, 9]) == [picture(10), picture(19)]
    assert open_images(path, rows=slice(10, 20)).ids == part.ids
    assert open_images(f"{path}[30:]").ids == [f"set:{row}" for row in range(30, 40)]
    with pytest.raises(ConfigError, match="names rows"):
        open_images(f"{path}[1:20]", rows=slice(2, 5))
    with pytest.raises(NotEnoughDataError, match="have 0"):
        open_images(f"{path}[50:60]")


def test_a_file_whose_name_looks_like_a_row_range(tmp_path: Path) -> None:
    assert len(open_images(write_parquet(tmp_path / "a[1:2].parquet"))) == 40
    assert len(open_images(write_parquet(tmp_path / "b.parquet[1:2]" / "c[d]*.parquet"))) == 40
    with pytest.raises(SourceFormatError, match="its path holds '::'"):
        open_images(write_parquet(tmp_path / "c::d.parquet"))


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet")
    assert len(open_images(path)) == 40
    write_parquet(path, 30)
    assert len(open_images(path)) == 30


def test_class_names_of_the_features(tmp_path: Path) -> None:
    names = ["<img src=x onerror=alert(1)>", "black/white"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": picture(row), "path": None} for row in range(20)], "label": [0, 1] * 10}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "named.parquet")
    assert open_images(tmp_path / "named.parquet").class_names == tuple(names)


def test_folder_of_parquet_files_numbers_rows_within_each(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", 4)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 4)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", 2)
    source = open_images(tmp_path)
    assert source.ids[3:5] == ["train-00000-of-00002:3", "train-00001-of-00002:0"]
    assert len(source) == 8
    assert len(open_images(tmp_path, split="test")) == 2


def test_missing_columns_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SourceFormatError, match=r"no image column among the columns 'label', 'text'") as caught:
        open_images(write_parquet(tmp_path / "a.parquet", image=None, text=["x"] * 40))
    assert "--image-column" in caught.value.hint
    with pytest.raises(SourceFormatError, match="no label column") as caught:
        open_images(write_parquet(tmp_path / "b.parquet", label=None))
    assert "--label-column" in caught.value.hint
    with pytest.raises(SourceFormatError, match="no column 'photo'"):
        open_images(write_parquet(tmp_path / "c.parquet"), image_column="photo")
    with pytest.raises(SourceFormatError, match="not images, image bytes or paths"):
        open_images(write_parquet(tmp_path / "d.parquet", image=list(range(40))))


def test_named_columns_of_plain_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"photo": [picture(row) for row in range(4)], "kind": ["b", "a", "b", "a"], "label": [9] * 4}), path
    )
    source = open_images(path, image_column="photo", label_column="kind")
    assert source.class_names == ("a", "b")
    assert source.labels.tolist() == [1, 0, 1, 0]
    assert source.raw([2]) == [picture(2)]


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.jsonl", "x.tar"])
@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe garbage \x80" * 20])
def test_damaged_tables_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceFormatError) as caught:
        open_images(tmp_path / name)
    assert caught.value.hint


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "gone.parquet", "a/b/c", "nul\0byte", "x" * 5000])
def test_paths_that_do_not_exist(path: str) -> None:
    with pytest.raises(SourceFormatError, match="no such file or folder"):
        open_images(path)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "set.pickle").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(SourceFormatError, match=r"suffix '\.pickle' is none of \.parquet"):
        open_images(tmp_path / "set.pickle")


def test_labels_outside_the_class_list_are_skipped(tmp_path: Path) -> None:
    labels: list[int | None] = [row % 2 for row in range(40)]
    labels[3], labels[7], labels[11] = -1, 9, None
    path = write_parquet(tmp_path / "x.parquet", label=labels)
    source = open_images(path, class_names=["a", "b"])
    assert [row.id for row in source.skipped] == ["x:3", "x:7", "x:11"]
    assert len(source) == 37
    assert source.raw([3]) == [picture(4)]
    with pytest.raises(LabelRangeError):
        open_images(write_parquet(tmp_path / "y.parquet", label=[7] * 40), class_names=["a", "b"])


def test_too_many_bad_rows_stop_and_strict_allows_none(tmp_path: Path) -> None:
    labels = [row % 2 if row > 5 else 9 for row in range(40)]
    with pytest.raises(SourceFormatError, match=r"6 of 40 rows cannot be used.*x:0: label 9"):
        open_images(write_parquet(tmp_path / "x.parquet", label=labels), class_names=["a", "b"])
    labels = [row % 2 if row else 9 for row in range(40)]
    path = write_parquet(tmp_path / "y.parquet", label=labels)
    assert len(open_images(path, class_names=["a", "b"])) == 39
    with pytest.raises(SourceFormatError, match="expected none, as asked"):
        open_images(path, class_names=["a", "b"], strict=True)


def test_the_bound_on_skipped_rows_is_a_tenth() -> None:
    rows = [SkippedRow(id=str(row), reason="bad") for row in range(11)]
    check_skips(rows[:10], 100, "set")
    check_skips([], 0, "set")
    with pytest.raises(SourceFormatError, match="11 of 100"):
        check_skips(rows, 100, "set")


def test_later_rows_of_an_id_are_skipped(tmp_path: Path) -> None:
    ids = [f"s{row}" for row in range(40)]
    ids[5] = ids[20] = "s1"
    source = open_images(write_parquet(tmp_path / "x.parquet", id=ids))
    assert [(row.id, row.reason) for row in source.skipped] == [("s1", "two rows of one id; this is the later one")] * 2
    assert source.raw([source.ids.index("s1")]) == [picture(1)]
    assert len(set(source.ids)) == len(source) == 38


def test_parquet_rows_that_only_name_a_file(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "in.png").write_bytes(picture(500))
    (tmp_path / "out.png").write_bytes(picture(501))
    (home / "link.png").symlink_to(tmp_path / "out.png")
    images: list = [{"bytes": picture(row), "path": None} for row in range(80)]
    hostile = ["../out.png", str(tmp_path / "out.png"), "link.png", "https://example.org/x.png", "gone.png", "", None]
    for row, path in enumerate(hostile):
        images[row] = {"bytes": None, "path": path}
    images[20] = {"bytes": None, "path": "in.png"}
    images[21] = {"bytes": None, "path": str(home / "in.png")}
    images[22] = None
    path = write_parquet(home / "x.parquet", 80, image=images)
    source = open_images(path)
    assert [row.id for row in source.skipped] == [*(f"x:{row}" for row in range(len(hostile))), "x:22"]
    reasons = [row.reason for row in source.skipped]
    assert all("leads out" in reason for reason in reasons[:3])
    assert "is a URL" in reasons[3]
    assert source.raw([source.ids.index("x:20"), source.ids.index("x:21")]) == [picture(500)] * 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_tables_of_paths(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "pics").mkdir()
    rows = []
    for row in range(40):
        (tmp_path / "pics" / f"{row:03}.png").write_bytes(picture(row))
        rows.append({"path": f"pics/{row:03}.png", "class": ["NA", "cat"][row % 2]})
    rows[4]["path"] = "../outside.png"
    rows[6]["path"] = "https://example.org/1.png"
    (tmp_path.parent / "outside.png").write_bytes(picture(0))
    path = tmp_path / f"list.{suffix}"
    if suffix == "csv":
        path.write_text("path,class\n" + "".join(f"{row['path']},{row['class']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_images(path)
    assert source.class_names == ("NA", "cat")
    assert [row.id for row in source.skipped] == ["list:4", "list:6"]
    assert source.raw([0, 4]) == [picture(0), picture(5)]


def test_numbers_in_a_csv_stay_what_they_are(tmp_path: Path) -> None:
    for row in range(10):
        (tmp_path / f"{row:03}").write_bytes(picture(row))
    (tmp_path / "x.csv").write_text("file,label\n" + "".join(f"{row:03},{row % 3}\n" for row in range(10)))
    source = open_images(tmp_path / "x.csv")
    assert source.class_names == ("0", "1", "2")
    assert source.raw([7]) == [picture(7)]


def test_webdataset_shard(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for row in range(12):
            for name, data in ((f"s{row:03}.png", picture(row)), (f"s{row:03}.cls", str(row % 3).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = open_images(path)
    assert source.ids[:2] == ["s000", "s001"]
    assert source.labels.tolist() == [row % 3 for row in range(12)]
    assert source.raw([5]) == [picture(5)]


# The rows of an open source


def test_undecodable_rows_are_values_with_reasons(tmp_path: Path) -> None:
    images: list = [{"bytes": picture(row), "path": None} for row in range(40)]
    images[2], images[5] = {"bytes": b"", "path": None}, {"bytes": picture(5)[:40], "path": None}
    source = open_images(write_parquet(tmp_path / "x.parquet", image=images))
    assert len(source) == 40
    decoded = source.decode([1, 2, 5, 6])
    assert [isinstance(image, SkippedRow) for image in decoded] == [False, True, True, False]
    assert isinstance(decoded[1], SkippedRow)
    assert decoded[1].id == "x:2"
    assert "0 bytes" in decoded[1].reason


@pytest.fixture(scope="module")
def sixty() -> LabelledImages:
    return open_images("shapes:60")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_select_of_select_is_one_select(sixty: LabelledImages, data: st.DataObject) -> None:
    source = sixty
    first = data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=30))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), max_size=30))
    chosen = [first[index] for index in second]
    twice, once = source.select(first).select(second), source.select(chosen)
    assert twice.ids == once.ids == [source.ids[row] for row in chosen]
    assert twice.labels.tolist() == source.labels[chosen].tolist()
    assert twice.raw(range(len(chosen))) == source.raw(chosen)


@settings(max_examples=15, deadline=None)
@given(bad=st.sets(st.integers(0, 59), max_size=6), start=st.integers(0, 10), limit=st.integers(1, 70))
def test_ids_labels_and_images_stay_together(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int], start: int, limit: int
) -> None:
    labels = [-1 if row in bad else row % 3 for row in range(60)]
    path = write_parquet(tmp_path_factory.mktemp("set") / "x.parquet", 60, label=labels)
    rows = slice(start, None)
    skipped = {row for row in bad if row >= start}
    if len(skipped) > 0.1 * (60 - start):
        with pytest.raises(SourceFormatError):
            open_images(path, class_names=["a", "b", "c"], rows=rows)
        return
    source = open_images(path, class_names=["a", "b", "c"], rows=rows, limit=limit, seed=3)
    assert len(source) == min(limit, 60 - start - len(skipped))
    assert {row.id for row in source.skipped} == {f"x:{row}" for row in skipped}
    numbers = [int(sample.removeprefix("x:")) for sample in source.ids]
    assert numbers == sorted(set(numbers) - bad)
    assert source.labels.tolist() == [labels[row] for row in numbers]
    assert source.raw(range(len(source))) == [picture(row) for row in numbers]


def test_limit_is_seeded() -> None:
    drawn = [open_images("shapes:200:0", limit=20, seed=seed).ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ConfigError, match="limit of at least 1"):
        open_images("shapes:200", limit=0)


@pytest.mark.parametrize("indices", [[-1], [60], [0, 99]])
def test_indices_outside_are_refused(indices: list[int]) -> None:
    source = open_images("shapes:60")
    for ask in (source.select, source.raw, source.decode):
        with pytest.raises(IndexError, match=r"0\.\.59"):
            ask(indices)


def test_shapes_open_as_a_source() -> None:
    source = open_images("shapes:300:7")
    assert source.ids[0] == "shapes-7:0"
    assert len(source.class_names) == 12
    assert open_images("shapes:30", seed=7).raw(range(30)) == source.raw(range(30))
    image = source.decode([0])[0]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (32, 32))


class _Invert:
    fingerprint = "invert"

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]:
        return [
            image if isinstance(image, SkippedRow) or sample.endswith(":1") else Image.eval(image, lambda v: 255 - v)
            for sample, image in zip(ids, images, strict=True)
        ]


def test_overlays_apply_on_decoding_only_and_stack() -> None:
    source = open_images("shapes:60")
    poisoned = source.with_labels(source.labels * 0, _Invert())
    assert poisoned.raw(range(60)) == source.raw(range(60))
    assert (poisoned.labels == 0).all()
    before, after = source.decode([0, 1]), poisoned.select([1, 0]).decode([1, 0])
    assert np.array_equal(255 - np.asarray(before[0]), np.asarray(after[0]))
    assert np.array_equal(np.asarray(before[1]), np.asarray(after[1]))
    twice = poisoned.with_labels(source.labels, _Invert())
    assert twice.overlay is not None
    assert twice.overlay.fingerprint == "invert+invert"
    assert np.array_equal(np.asarray(twice.decode([0])[0]), np.asarray(before[0]))
    assert poisoned.with_labels(source.labels).overlay is poisoned.overlay


@pytest.mark.real_data
def test_cifar10(shared: Path) -> None:
    path = shared / "data" / "cifar10" / "test.parquet"
    source = open_images(path)
    assert isinstance(source, LabelledImages)
    assert len(source) == 10_000
    assert source.class_names[:3] == ("airplane", "automobile", "bird")
    assert len(source.class_names) == 10
    assert source.skipped == ()
    again, part = open_images(path), open_images(f"{path}[2500:3500]")
    assert again.ids == source.ids
    assert part.ids == source.ids[2500:3500] == [f"test:{row}" for row in range(2500, 3500)]
    assert part.raw([0, 999]) == source.raw([2500, 3499])
    assert all(isinstance(image, Image.Image) and image.size == (32, 32) for image in source.decode(range(200)))
