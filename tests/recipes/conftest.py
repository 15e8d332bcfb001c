"""The zoo's recipe and the benchmark of ``scan model``, which are scripts and no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        return importlib.import_module("scan_zoo")
    finally:
        sys.path.remove(str(ROOT / "recipes"))


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    for folder in ("benchmarks", "recipes"):
        sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module("scan_model")
    finally:
        for folder in ("benchmarks", "recipes"):
            while str(ROOT / folder) in sys.path:
                sys.path.remove(str(ROOT / folder))
