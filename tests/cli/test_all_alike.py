"""Captions and class names that a model cannot tell apart, as a user meets them: exit code 3 and a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SAID = "the same embedding"


def save_pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for place in range(count):
        Image.fromarray(random.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(folder / f"{place}.png")
    return [f"{place}.png" for place in range(count)]


@pytest.mark.parametrize(
    "words",
    [
        ("purify", "ubt", "MODEL", "--pairs", "pictures/pairs.csv"),
        ("purify", "ubt", "MODEL", "--paper", "--pairs", "pictures/pairs.csv"),
        ("scan", "dataset", "pictures/pairs.csv", "--method", "gain", "--clip", "MODEL"),
    ],
)
def test_captions_that_read_alike(
    words: tuple[str, ...], process: Callable[..., Any], small_folder: Path, tmp_path: Path
) -> None:
    names = save_pictures(tmp_path / "pictures", 200)
    rows = [f"{name},{'A Thing' if place % 2 else 'a thing'}" for place, name in enumerate(names)]
    (tmp_path / "pictures/pairs.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    result = process(*(str(small_folder) if word == "MODEL" else word for word in words), "-o", "out")
    assert result.code == 3, result.err
    assert SAID in " ".join(result.err.split())
    assert "Traceback" not in result.err


@pytest.mark.parametrize("method", ["cbpt", "rvpt"])
def test_class_names_that_read_alike(
    method: str, process: Callable[..., Any], small_folder: Path, tmp_path: Path
) -> None:
    for name in ("cat", "Cat", "CAT"):
        save_pictures(tmp_path / "data" / name, 20)
    result = process("purify", method, str(small_folder), "--data", "data", "-o", "out")
    assert result.code == 3, result.err
    assert f"all 3 class names ('CAT', 'Cat', ...) {SAID}" in " ".join(result.err.split())
    assert "Traceback" not in result.err
