"""The benchmarks of UBT and CBPT, which are scripts and no package: what their variants mean."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from unpoison.benchmark.clip_cells import method_config
from unpoison.benchmark.settings import MethodSettings
from unpoison.models.clip_transformers import load_clip

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "recipes")]
    try:
        yield importlib.import_module(name)
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def ubt() -> Iterator[ModuleType]:
    yield from script("ubt")


def test_the_paper_is_that_of_the_grid(ubt: ModuleType, small_folder: Path) -> None:
    clip: Any = load_clip(small_folder)
    paper = ubt.ubt_config(clip, 30_000, "paper")
    assert paper == method_config(MethodSettings(method="ubt", published=True), clip, 30_000)
    faster = ubt.ubt_config(clip, 30_000, "paper-rate-30")
    assert faster.learning_rate == pytest.approx(30 * paper.learning_rate)
    assert (faster.loss, faster.bound) == ("hinge", 1.5)
    assert ubt.ubt_config(clip, 30_000, "paper-no-overfit").expose == "similarity"
    assert ubt.ubt_config(clip, 30_000, "ours") == method_config(MethodSettings(method="ubt"), clip, 30_000)
