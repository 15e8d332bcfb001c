"""A small CLIP, loaded anew for each test, and pairs of the built-in world."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def clip(small_folder: Path) -> Any:
    from unpoison.models.clip_transformers import load_clip

    return load_clip(small_folder)


@pytest.fixture(scope="session")
def pairs() -> Any:
    from unpoison.data.pairs import open_pairs

    return open_pairs("shapes:48:3")
