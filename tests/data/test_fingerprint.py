"""What makes two opened sources the same to a run folder."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unpoison.data.pairs import open_pairs
from unpoison.data.sources import LabelledImages, open_images


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, pictures: list[bytes], labels: list[int]) -> LabelledImages:
    images = [{"bytes": data, "path": None} for data in pictures]
    pq.write_table(pa.table({"image": images, "label": labels, "id": [f"row {row}" for row in range(4)]}), path)
    return open_images(path)


def test_a_table_by_its_bytes(tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in range(4)]
    first = table(tmp_path / "a.parquet", pictures, [0, 1, 0, 1]).fingerprint()
    assert table(tmp_path / "copy.parquet", pictures, [0, 1, 0, 1]).fingerprint() == first
    assert table(tmp_path / "labels.parquet", pictures, [0, 1, 1, 0]).fingerprint() != first
    assert table(tmp_path / "images.parquet", [*pictures[:3], picture(9)], [0, 1, 0, 1]).fingerprint() != first


def test_a_folder_by_its_files(class_folders: Path) -> None:
    first = open_images(class_folders).fingerprint()
    assert open_images(class_folders).fingerprint() == first
    (class_folders / "cat" / "1.png").write_bytes(picture(99) + b"\0")
    assert open_images(class_folders).fingerprint() != first


def test_rows_of_a_source_have_their_own(class_folders: Path) -> None:
    source = open_images(class_folders)
    assert source.select([0, 1, 3]).fingerprint() not in (source.fingerprint(), source.select([0, 1, 4]).fingerprint())


def test_files_that_cannot_be_read_do_not_stop_it(class_folders: Path) -> None:
    source = open_images(class_folders)
    first = source.fingerprint()
    (class_folders / "dog" / "0.png").unlink()
    assert source.fingerprint() != first


def test_pairs_by_their_captions_and_by_their_images(tmp_path: Path) -> None:
    def prints(name: str, seeds: list[int], first: str = "a dog") -> tuple[str, str]:
        rows = {"image": [{"bytes": picture(seed), "path": None} for seed in seeds], "caption": [first, "b", "c", "d"]}
        pq.write_table(pa.table(rows | {"id": list("wxyz")}), tmp_path / name)
        pairs = open_pairs(tmp_path / name)
        return pairs.caption_fingerprint, pairs.fingerprint

    captions, whole = prints("a.parquet", [0, 1, 2, 3])
    assert prints("copy.parquet", [0, 1, 2, 3]) == (captions, whole)
    same, other = prints("images.parquet", [0, 1, 2, 9])
    assert (same, other == whole) == (captions, False)
    assert not {captions, whole} & set(prints("captions.parquet", [0, 1, 2, 3], "a cat"))


def test_a_folder_of_pairs_by_its_files(class_folders: Path) -> None:
    for file in sorted(class_folders.rglob("*.png")):
        file.with_suffix(".txt").write_text("a pet")
    first = open_pairs(class_folders).fingerprint
    assert open_pairs(class_folders).fingerprint == first
    (class_folders / "cat" / "0.png").write_bytes(picture(77) + b" ")
    assert open_pairs(class_folders).fingerprint != first
