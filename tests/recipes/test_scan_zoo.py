"""The zoo that ``scan model`` is calibrated on, at a small size, and the figures that its benchmark makes."""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from unpoison.attacks.manifest import Poisoning
from unpoison.benchmark.clip_cells import clip_cell
from unpoison.benchmark.grid import make_grid
from unpoison.benchmark.runner import run_grid
from unpoison.benchmark.store import Store
from unpoison.errors import UsageError
from unpoison.models.classifier import load_classifier
from unpoison.models.clip_files import load_any_clip
from unpoison.runs import Silent

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


def test_the_zoo_is_large_and_both_halves_have_all_families(zoo: ModuleType) -> None:
    plan = zoo.plan_zoo()
    clean = [entry for entry in plan if entry.family == zoo.CLEAN]
    assert len(clean) >= 20
    assert len(plan) - len(clean) >= 40
    assert len({(entry.name, entry.half) for entry in plan}) == len(plan)
    for kind in ("classifier", "clip"):
        halves = [
            {entry.family for entry in plan if entry.kind == kind and entry.half == half}
            for half in ("calibration", "held-out")
        ]
        assert halves[0] == halves[1]
    poisoned = [entry for entry in plan if entry.kind == "classifier" and entry.family != zoo.CLEAN]
    assert len({entry.target for entry in poisoned}) >= 5
    assert len({entry.rate for entry in poisoned}) >= 3


def test_a_classifier_is_made_once(zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "TRAINED_ON", 64)
    monkeypatch.setattr(zoo, "TESTED_ON", 48)
    monkeypatch.setitem(zoo.TRAINING, "shapes", zoo.Training(epochs=1))
    entry = next(
        entry for entry in zoo.plan_zoo(("classifier",)) if (entry.family, entry.world) == ("badnet", "shapes")
    )
    folder = zoo.make_classifier(entry, tmp_path, tmp_path / "zoo")
    assert len(load_classifier(folder / "model").class_names) == 12
    assert Poisoning.load(folder / "manifest.json").target == entry.target
    before = (folder / "zoo.json").read_bytes()
    assert zoo.make_classifier(entry, tmp_path, tmp_path / "zoo") == folder
    assert (folder / "zoo.json").read_bytes() == before
    assert zoo.find_zoo(tmp_path / "zoo") == []  # one epoch plants nothing: it is refused
    other = zoo.make_classifier(replace(entry, family=zoo.CLEAN), tmp_path, tmp_path / "zoo")
    assert [found for found, _ in zoo.find_zoo(tmp_path / "zoo")] == [other]
    assert zoo.poisoning_of(other) is None


def test_every_clip_of_the_zoo_is_a_victim_of_the_grid(zoo: ModuleType) -> None:
    grid = tomllib.loads((ROOT / "grids/cpu.toml").read_text())
    there = {
        (attack, seed)
        for block in grid["cells"]
        if block["model"] == ["tiny-clip"]
        for attack in block["attack"]
        for seed in block["seed"]
    }
    assert {(entry.family, entry.seed) for entry in zoo.plan_zoo(("clip",))} <= there


def test_a_clip_of_the_zoo_is_a_cells_victim(zoo: ModuleType, tmp_path: Path) -> None:
    tables = {
        "data": {"shapes": {"train": "shapes:40:0", "test": "shapes:30:1", "target": "star"}},
        "model": {"tiny": {"kind": "clip", "victim": {"steps": 1, "batch": 8}}},
        "cells": [{
            "data": ["shapes"], "model": ["tiny"], "attack": ["clean"], "rate": [0.1], "method": ["none"], "seed": [0],
        }],
    }  # fmt: skip
    grid = make_grid(tables, name="tiny", path="tiny.toml")
    entry = next(entry for entry in zoo.plan_zoo(("clip",)) if (entry.family, entry.seed) == (zoo.CLEAN, 0))
    bench = tmp_path / "bench"
    Store.open(bench)
    with pytest.raises(UsageError, match="has not run"):
        zoo.note_clip(entry, grid, bench, tmp_path / "zoo")
    run_grid(grid, Store.open(bench), execute=lambda cell, folder: clip_cell(cell, folder, Silent()))
    folder = zoo.note_clip(entry, grid, bench, tmp_path / "zoo")
    ((found, body),) = zoo.find_zoo(tmp_path / "zoo")
    assert found == folder
    assert (body["kind"], body["target_name"], body["half"]) == ("clip", None, "calibration")
    assert load_any_clip(Path(body["model"])).image_size == 32


def row(score: float, word: str, target: str | None, named: str | None) -> dict[str, Any]:
    return {"score": score, "word": word, "target": target, "named": named}


def test_the_figures(benchmark: ModuleType) -> None:
    rows = [
        row(9.0, "backdoored", "a", "a"), row(5.0, "suspicious", "a", "b"), row(1.0, "no evidence", "a", "a"),
        row(2.0, "no evidence", None, "a"), row(4.0, "suspicious", None, "a"),
    ]  # fmt: skip
    found = benchmark.figures(rows)
    assert found["auroc"] == pytest.approx(4 / 6)
    assert found["detection_rate"] == pytest.approx(200 / 3)
    assert found["false_alarm_rate"] == 50
    assert found["target_named_rate"] == 50
    assert benchmark.figures([])["auroc"] is None
