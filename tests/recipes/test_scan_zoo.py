"""The zoo that ``scan model`` is calibrated on, at a small size."""

from __future__ import annotations

import tomllib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
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


def test_the_zoo_is_large_and_both_halves_have_the_same(zoo: ModuleType) -> None:
    plan = zoo.plan_zoo()
    clean = [entry for entry in plan if entry.family == zoo.CLEAN]
    assert len(clean) >= 20
    assert len(plan) - len(clean) >= 40
    assert len({entry.name for entry in plan}) == len(plan)
    halves = {half: [entry for entry in plan if entry.half == half] for half in zoo.HALVES}
    assert all(sum(entry.family == zoo.CLEAN for entry in half) >= 18 for half in halves.values())
    made = [
        sorted((e.family, e.rate, e.world, e.arch) for e in half if e.kind == "classifier") for half in halves.values()
    ]
    assert made[0] == made[1]  # the multiset of family and rate, of both networks and worlds
    assert {arch for _, _, _, arch in made[0]} == {"small-resnet", "wrn-16-1"}
    assert {family for family, rate, _, _ in made[0] if rate == 0.02} == set(zoo.LOW_FAMILIES)
    clips = [{entry.family for entry in half if entry.kind == "clip"} for half in halves.values()]
    assert clips[0] == clips[1]
    poisoned = [entry for entry in plan if entry.kind == "classifier" and entry.family != zoo.CLEAN]
    assert len({entry.target for entry in poisoned}) >= 5
    assert len({entry.rate for entry in poisoned}) >= 3


def test_the_search_was_designed_on_no_held_out_model(zoo: ModuleType) -> None:
    plan = zoo.plan_zoo()
    for entry in plan:
        if entry.kind == "clip" and entry.family != zoo.CLEAN:
            assert entry.half == ("calibration" if entry.seed < 2 else "held-out")
        elif entry.kind == "clip":
            assert entry.half == ("calibration" if entry.seed < 3 else "held-out")
    patches = ("badnet", "badnet-grid", "badnet-stripes")
    assert not [e for e in plan if e.arch == "wrn-16-1" and e.family in patches]  # near copies of the published victim
    seeds = [{e.seed for e in plan if e.kind == "classifier" and e.half == half} for half in zoo.HALVES]
    assert not seeds[0] & seeds[1]


def test_probe_images_are_of_no_models_training(
    zoo: ModuleType, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Rows:
        def __len__(self) -> int:
            return 25_000

        def select(self, rows: np.ndarray) -> Rows:
            return self

    monkeypatch.setattr(zoo, "open_images", lambda source: opened.append(source) or Rows())
    for entry in zoo.plan_zoo(("classifier",)):
        zoo.open_world(entry.world, Path("shared"), entry.seed)
    grid = tomllib.loads((ROOT / "grids/cpu.toml").read_text())["data"]["cifar10-flickr8k"]
    learnt = {*opened, *(str(grid[name]) for name in ("train", "test", "shots", "later"))}
    assert benchmark.PROBE["cifar10"] == "{}/data/cifar10/test.parquet[5000:5480]"
    assert benchmark.PROBE["shapes"] not in learnt
    ends = [int(source.rpartition(":")[2].rstrip("]")) for source in learnt if "test.parquet[" in source]
    assert ends
    assert max(ends) <= 5000  # rows that trained or tested any of them end where the probe begins


def test_references_are_as_many_for_all_and_never_the_model_itself(zoo: ModuleType, benchmark: ModuleType) -> None:
    cells = [
        benchmark.Cell(
            name=entry.name, model=entry.name, kind=entry.kind, family=entry.family, half=entry.half,
            world=entry.world or "cifar10", arch=entry.arch, target=None,
        )
        for entry in zoo.plan_zoo()
    ]  # fmt: skip
    clean = [cell for cell in cells if cell.family == zoo.CLEAN and cell.half == "calibration"]
    for cell in [*cells, *benchmark.published(Namespace(shared=ROOT))]:
        found = benchmark.references_of(cell, clean)
        assert len(set(found)) == benchmark.REFERENCES
        assert cell.name not in found
    with pytest.raises(SystemExit, match="make the zoo"):
        benchmark.references_of(cells[0], clean[:1])


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
    clean = next(
        entry for entry in zoo.plan_zoo(("classifier",)) if (entry.family, entry.world) == (zoo.CLEAN, "shapes")
    )
    other = zoo.make_classifier(clean, tmp_path, tmp_path / "zoo")
    assert [found for found, _ in zoo.find_zoo(tmp_path / "zoo")] == [other]
    assert zoo.poisoning_of(other) is None
    monkeypatch.setitem(zoo.TRAINING, "shapes", zoo.Training(epochs=2))
    again = zoo.make_classifier(clean, tmp_path, tmp_path / "zoo")
    assert again != other
    assert [found for found, _ in zoo.find_zoo(tmp_path / "zoo")] == [again]  # the one that was made last
    zoo.make_classifier(replace(clean, seed=99), tmp_path, tmp_path / "zoo")
    assert [found for found, _ in zoo.find_zoo(tmp_path / "zoo")] == [again]  # no entry of the plan


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


def test_a_clip_that_the_grid_refused_is_counted_as_refused(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SimpleNamespace(has=lambda key: True, load=lambda key: SimpleNamespace(status="refused"))
    monkeypatch.setattr(zoo, "Store", SimpleNamespace(read=lambda bench: store))
    cell = SimpleNamespace(key="k", data=SimpleNamespace(target="horse"))
    monkeypatch.setattr(zoo, "cell_of", lambda *_: cell)
    entry = next(entry for entry in zoo.plan_zoo(("clip",)) if entry.family == "wanet-strong")
    zoo.note_clip(entry, None, tmp_path / "bench", tmp_path / "zoo")
    assert zoo.find_zoo(tmp_path / "zoo") == []
    ((_, body),) = zoo.find_made(tmp_path / "zoo").values()
    assert (body["accepted"], body["target_name"]) == (False, "horse")


def test_zoo_json_of_a_clip_has_its_cells_rate_and_target(zoo: ModuleType) -> None:
    figures = SimpleNamespace(c_acc=SimpleNamespace(value=80.0), asr=SimpleNamespace(value=99.0))
    found = SimpleNamespace(
        result=SimpleNamespace(after=figures), model=Path("m"),
        cell=SimpleNamespace(attack=object(), data=SimpleNamespace(target="horse"), names=SimpleNamespace(rate=0.15)),
        setting=SimpleNamespace(test=SimpleNamespace(class_names=("cat", "dog", "horse"))),
    )  # fmt: skip
    body = zoo._clip_figures(found)
    assert (body["rate"], body["target"], body["target_name"], body["asr"]) == (0.15, 2, "horse", 99.0)


def test_a_clip_of_the_zoo_is_a_cells_victim(zoo: ModuleType, tmp_path: Path) -> None:
    tables: dict[str, Any] = {
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
    tables["model"]["tiny"]["victim"]["steps"] = 2  # another cell, which is another model
    other = make_grid(tables, name="tiny", path="tiny.toml")
    with pytest.raises(UsageError, match="has not run"):
        zoo.note_clip(entry, other, bench, tmp_path / "zoo")
    run_grid(other, Store.open(bench), execute=lambda cell, folder: clip_cell(cell, folder, Silent()))
    assert zoo.note_clip(entry, other, bench, tmp_path / "zoo") != folder
    ((_, second),) = zoo.find_zoo(tmp_path / "zoo")
    assert second["model"] != body["model"]
