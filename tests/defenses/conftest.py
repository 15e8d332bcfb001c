"""A small CLIP, made on the spot, and pairs of the built-in world."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def small_clip() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_clip", Path(__file__).with_name("small_clip.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small_folder(small_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_clip.make_folder(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture
def clip(small_folder: Path) -> Any:
    from unpoison.models.clip_transformers import load_clip

    return load_clip(small_folder)


@pytest.fixture(scope="session")
def pairs() -> Any:
    from unpoison.data.pairs import open_pairs

    return open_pairs("shapes:48:3")
