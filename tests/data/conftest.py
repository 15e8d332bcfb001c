"""What the tests of the data part share."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets.config
import numpy as np
import pytest
from PIL import Image

from unpoison.data.encoded import Overlay, Picture
from unpoison.results import SkippedRow


@pytest.fixture(autouse=True)
def _own_arrow_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Arrow cache of these tests' tables goes away with them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))


def picture(seed: int, size: int = 8) -> bytes:
    """A small PNG that differs from seed to seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two classes of three pictures each."""
    root = tmp_path / "pets"
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index in range(3):
            (root / name / f"{index}.png").write_bytes(picture(10 * label + index))
    return root


class _Black:
    fingerprint = "black"

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]:
        return [
            image if isinstance(image, SkippedRow) or not name.endswith(":1") else Image.new("RGB", image.size)
            for name, image in zip(ids, images, strict=True)
        ]


@pytest.fixture
def black() -> Overlay:
    """Paints the picture black whose id ends with ":1"."""
    return _Black()


@pytest.fixture(name="picture")
def picture_of_seed() -> Callable[[int], bytes]:
    return picture
