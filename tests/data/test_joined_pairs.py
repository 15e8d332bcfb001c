"""Pairs of several folders as one set: each part reads its own folder and no other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unpoison.data.encoded import Overlay
from unpoison.data.pairs import join_pairs, open_pairs
from unpoison.results import SkippedRow

Draw = Callable[[int], bytes]


def write_captioned(folder: Path, kind: str, pictures: list[bytes]) -> Path:
    """Three pictures with captions under the names that every such folder has; gives back what is to be opened."""
    folder.mkdir(parents=True)
    names = [f"{row}.png" for row in range(3)]
    for row, name in enumerate(names):
        (folder / name).write_bytes(pictures[row])
        if kind == "folder":
            (folder / name).with_suffix(".txt").write_text(f"{folder.name} {row}")
    lines = [{"image": name, "caption": f"{folder.name} {row}"} for row, name in enumerate(names)]
    if kind == ".csv":
        (folder / "list.csv").write_text("\n".join(["image,caption", *(",".join(line.values()) for line in lines)]))
    elif kind == ".jsonl":
        (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder if kind == "folder" else folder / f"list{kind}"


@pytest.mark.parametrize(("one", "two"), [("folder", "folder"), ("folder", ".csv"), (".jsonl", ".csv")])
def test_each_of_the_joined_sets_reads_its_own_folder(
    one: str, two: str, black: Overlay, picture: Draw, tmp_path: Path
) -> None:
    parts = {
        name: open_pairs(write_captioned(tmp_path / name, kind, [picture(seed + row) for row in range(3)]))
        for name, kind, seed in (("a", one, 0), ("b", two, 10))
    }
    joined = join_pairs({"found": parts["a"], "drawn": parts["b"]})
    assert joined.raw(range(6)) == [picture(seed) for seed in (0, 1, 2, 10, 11, 12)]
    assert joined.captions([1, 4]) == [("a 1",), ("b 1",)]
    few = joined.select([4, 1, 4])
    assert few.raw([0, 1, 2]) == [picture(11), picture(1), picture(11)]
    assert few.with_overlay(black, {}).raw([1]) == [picture(1)]
    more = join_pairs({"few": few, "shapes": open_pairs("shapes:2"), "again": parts["a"]})
    assert [more.raw([row])[0] for row in (0, 1, 5)] == [picture(11), picture(1), picture(0)]
    before = joined.fingerprint
    (tmp_path / "b" / "2.png").write_bytes(picture(99) + b" ")
    assert join_pairs({"found": parts["a"], "drawn": parts["b"]}).fingerprint != before


def test_joined_sets_are_confined_to_their_own_folders(picture: Draw, tmp_path: Path) -> None:
    pictures = [picture(row) for row in range(3)]
    parts = {name: open_pairs(write_captioned(tmp_path / name, "folder", pictures)) for name in ("a", "b")}
    joined = join_pairs(parts)
    (tmp_path / "b" / "1.png").unlink()
    (tmp_path / "b" / "1.png").symlink_to(tmp_path / "a" / "1.png")
    good, bad = joined.raw([1, 4])
    assert good == picture(1)
    assert isinstance(bad, SkippedRow)
    assert (bad.id, "leads out of the data set's folder" in bad.reason) == ("b/1.png", True)
