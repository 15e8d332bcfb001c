"""Cells that are computed here: attacks with a choice or a training first, repairs of a zero-shot classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from unpoison.api_zero_shot import ZeroShotOutcome
from unpoison.attacks.low_gap import LowGap
from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.parts import PoisoningParts
from unpoison.attacks.poison import apply_poisoning
from unpoison.benchmark import classifier_cells, clip_cells
from unpoison.benchmark.cell import Names
from unpoison.benchmark.compute import try_cell
from unpoison.benchmark.grid import Grid, make_grid
from unpoison.benchmark.settings import MethodSettings
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.ubt import PUBLISHED
from unpoison.models.clip_files import load_any_clip
from unpoison.runs import Silent

NAMES = Names(data="shapes", model="net", attack="mine", rate=0.03, method="none", seed=3)
LOW = {"epochs": 1, "rounds": 1, "grid": 2}


def grid_of(
    small_folder: Path, kind: str, attack: dict[str, Any], methods: dict[str, dict[str, Any]], rate: float = 0.1
) -> Grid:
    clip = str(small_folder)
    models = {
        "net": {"kind": "classifier", "epochs": 1, "clip": clip},
        "clip": {"kind": "clip", "model": clip, "clip": clip, "victim": {"steps": 4, "batch": 16, "warm_up": 1}},
    }
    data = {"train": "shapes:160:0", "test": "shapes:80:1", "target": "star"}
    if kind == "clip":
        data |= {"captioned": "shapes:120:2", "shots": "shapes:100:4", "retrieval": "shapes:40:3"}
    tables = {
        "least_asr": 0,
        "data": {"shapes": data},
        "model": {kind: models[kind]},
        "attack": {"mine": attack},
        "method": methods,
        "cells": [{"data": ["shapes"], "model": [kind], "attack": ["mine"], "rate": [rate],
                   "method": list(methods) or ["none"], "seed": [3]}],
    }  # fmt: skip
    return make_grid(tables, name="g", path="g.toml")


@pytest.mark.parametrize(("kind", "cells"), [("net", classifier_cells), ("clip", clip_cells)])
def test_steps_run_and_are_named_in_the_precision_of_the_grid(
    small_folder: Path, tmp_path: Path, kind: str, cells: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = grid_of(small_folder, kind, {"trigger": "badnet"}, {}).cells[0]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    state = AcceleratorState._shared_state  # accelerate holds one precision a process: other tests get theirs back
    before, found = dict(state), {}
    try:
        for precision in ("no", "bf16"):
            setting = cells.open_setting(replace(cell, precision=precision), tmp_path, Silent())
            assert setting.run.accelerator.mixed_precision == precision
            found[precision] = setting.inputs
    finally:
        state.clear()
        state.update(before)
    assert found["no"] == found["bf16"] | {"precision": "no"}
    assert len(list((tmp_path / "shared").glob("poisoning-*.lock"))) == 2


def test_samples_near_the_boundary_are_chosen_with_the_models_clip(small_folder: Path, tmp_path: Path) -> None:
    cell = grid_of(small_folder, "net", {"trigger": "badnet", "select": "boundary"}, {}).cells[0]
    found = classifier_cells.open_setting(cell, tmp_path, Silent()).poisoning
    assert isinstance(found, Poisoning)
    assert (found.selection, found.selected_by) == ("boundary", load_any_clip(small_folder).fingerprint)
    assert len(found.ids) == 16


def test_strengths_of_low_gap_are_fitted_to_the_samples(small_folder: Path, tmp_path: Path) -> None:
    cell = grid_of(small_folder, "net", {"trigger": "low-gap", "prepare": LOW}, {}).cells[0]
    found = classifier_cells.open_setting(cell, tmp_path, Silent()).poisoning
    assert isinstance(found, Poisoning)
    trigger = found.make_trigger()
    assert isinstance(trigger, LowGap)
    assert trigger.strengths
    assert set(trigger.strengths) <= set(found.ids) - set(found.covers)


def test_samples_of_label_consistent_are_perturbed_against_the_clean_victim(small_folder: Path, tmp_path: Path) -> None:
    attack = {"trigger": "label-consistent", "prepare": {"radius": 32.0, "steps": 2}}
    cell = replace(grid_of(small_folder, "net", attack, {}, NAMES.rate).cells[0], names=NAMES)
    setting = classifier_cells.open_setting(cell, tmp_path, Silent())
    found, clean = setting.poisoning, open_images("shapes:160:0")
    assert isinstance(found, Poisoning)
    rows = [row for row, name in enumerate(clean.ids) if name in found.ids]
    others = [row for row in range(20) if row not in rows]

    def pixels(source: LabelledImages, of: list[int]) -> list[np.ndarray]:
        return [np.asarray(image, dtype=int) for image in source.decode(of) if isinstance(image, Image.Image)]

    ours, planted = pixels(setting.train, rows), pixels(apply_poisoning(clean, found), rows)
    away = [np.abs(one - other).max() for one, other in zip(ours, planted, strict=True)]
    assert len(away) == len(rows)
    assert all(0 < change <= 33 for change in away)
    assert (setting.train.labels == clean.labels).all()
    same = [np.array_equal(*two) for two in zip(pixels(setting.train, others), pixels(clean, others), strict=True)]
    assert same == [True] * len(others)
    assert [step.name.split("-")[0] for step in sorted((tmp_path / "shared").iterdir()) if step.is_dir()] == [
        "poisoning", "victim"
    ]  # fmt: skip
    control = classifier_cells.open_setting(replace(cell, attack=None), tmp_path, Silent())
    assert setting.inputs["surrogate"] == classifier_cells._victim(control).key


def test_captions_and_images_are_chosen_with_the_clean_clip(small_folder: Path, tmp_path: Path) -> None:
    attack = {"trigger": "badnet-rand", "captions": "aligned", "select": "captions"}
    cell = grid_of(small_folder, "clip", attack, {}).cells[0]
    found = clip_cells.open_setting(cell, tmp_path, Silent()).poisoning
    assert isinstance(found, PairPoisoning)
    clip = load_any_clip(small_folder)
    assert (found.captions, found.aligned_by) == ("aligned", clip.fingerprint)
    assert (found.selection, found.selected_by) == ("near captions", clip.fingerprint)
    assert all("star" in caption for caption in found.new_captions)


@pytest.mark.parametrize(
    ("attack", "fitted"),
    [
        ({"trigger": "feature-small", "prepare": {"epochs": 1}}, "pattern"),
        ({"trigger": "badclip", "through_par": True, "prepare": {"epochs": 1, "batch_size": 16}}, "patch"),
    ],
)
def test_patterns_are_trained_on_the_clean_clip(
    small_folder: Path, tmp_path: Path, attack: dict[str, Any], fitted: str
) -> None:
    cell = grid_of(small_folder, "clip", attack, {}).cells[0]
    found = clip_cells.open_setting(cell, tmp_path, Silent()).poisoning
    assert isinstance(found, PairPoisoning)
    assert found.config[fitted]


def test_no_more_natural_captions_than_asked(small_folder: Path, tmp_path: Path) -> None:
    attack = {"trigger": "badnet-rand", "captions": "natural", "most_captions": 3}
    cell = grid_of(small_folder, "clip", attack, {}).cells[0]
    found = clip_cells.open_setting(cell, tmp_path, Silent()).poisoning
    assert isinstance(found, PairPoisoning)
    assert len(found.ids) == 28
    assert len(set(found.new_captions)) == 3
    assert all("star" in caption for caption in found.new_captions)


def test_an_attack_without_pixels_has_no_asr_of_images(small_folder: Path, tmp_path: Path) -> None:
    grid = grid_of(small_folder, "clip", {"trigger": "text-key"}, {})
    strict = [replace(cell, least_asr=90.0, names=replace(cell.names, rate=0.05)) for cell in grid.cells]
    given = try_cell(strict[0], tmp_path)
    assert (given.status, given.reason) == ("done", "")  # not refused for an ASR that it cannot have
    assert given.after is not None
    assert (given.after.asr, given.after.asr_excess, given.after.ra, given.picture) == (None, None, None, None)
    assert given.after.retrieval_asr is not None  # of texts with the key


@pytest.mark.parametrize(("kind", "cells"), [("net", classifier_cells), ("clip", clip_cells)])
def test_two_backdoors_stand_in_one_set(small_folder: Path, tmp_path: Path, kind: str, cells: Any) -> None:
    further = {"trigger": "blended", "target": "rings", "rate": 0.05}
    attack = {"trigger": "badnet", "also": [further]}
    grid = grid_of(small_folder, kind, attack, {})
    setting = cells.open_setting(grid.cells[0], tmp_path, Silent())
    assert isinstance(setting.poisoning, PoisoningParts)
    assert [part.target_name for part in setting.poisoning.parts] == ["star", "rings"]
    assert [part.trigger for part in setting.poisoning.parts] == ["badnet", "blended"]
    assert grid.cells[0].key != grid_of(small_folder, kind, {"trigger": "badnet"}, {}).cells[0].key
    given = try_cell(grid.cells[0], tmp_path)
    assert (given.status, given.reason) == ("done", "")
    assert given.after is not None
    assert given.after.asr is not None
    assert given.picture


def test_repairs_of_a_zero_shot_classifier_leave_the_weights(small_folder: Path, tmp_path: Path) -> None:
    methods = {
        "linear-probe": {"config": {"shots": 4}},
        "rvpt": {"config": {"shots": 4, "epochs": 1, "prompts": 2}},
        "cbpt": {"config": {"shots": 4}},
    }
    attack = {"trigger": "badnet-rand", "resample": True, "params": {"share": 0.5}}
    grid = grid_of(small_folder, "clip", attack, methods)
    begun = next(cell for cell in grid.cells if cell.names.method == "cbpt")
    (tmp_path / "work" / begun.key).mkdir(parents=True)  # as a killed run leaves it
    results = {cell.names.method: try_cell(cell, tmp_path) for cell in grid.cells}
    assert [name for name, result in results.items() if result.cost.resumed] == ["cbpt"]
    assert {name: (result.status, result.reason) for name, result in results.items()} == dict.fromkeys(
        ("none", *methods), ("done", "")
    )
    for name in methods:
        result = results[name]
        assert result.repaired is not None
        assert result.after is not None
        assert result.before is not None
        assert result.repaired.changed_share == 0
        assert result.repaired.config["shots"] == 4
        assert result.after.image_to_text is not None
        assert np.isfinite(result.after.c_acc.value)
    probe = results["linear-probe"]
    assert probe.after is not None
    assert probe.before is not None
    assert probe.after.c_acc != probe.before.c_acc  # the probe's rows are measured, not the names' embeddings
    assert probe.after.image_to_text == probe.before.image_to_text


@pytest.mark.parametrize(
    ("suspected", "found", "exact"),
    [(("star",), 100.0, 100.0), (("star", "rings"), 100.0, 0.0), (("rings",), 0.0, 0.0)],
)
def test_what_a_search_named_is_held_against_the_manifest(
    suspected: tuple[str, ...], found: float, exact: float, small_folder: Path, tmp_path: Path
) -> None:
    cell = grid_of(small_folder, "clip", {"trigger": "badnet"}, {}).cells[0]
    setting = clip_cells.open_setting(cell, tmp_path, Silent())
    outcome: Any = ZeroShotOutcome.__new__(ZeroShotOutcome)
    object.__setattr__(outcome, "purification", SimpleNamespace(search=object(), targets=suspected))
    assert clip_cells._detection(setting, outcome) == {
        "suspected": float(len(suspected)), "target_found": found, "target_exact": exact,
    }  # fmt: skip
    clean = replace(setting, poisoning=None)
    assert clip_cells._detection(clean, outcome) == {"suspected": float(len(suspected))}


def test_the_share_of_pairs_that_are_unlearnt_is_a_figure(small_folder: Path, tmp_path: Path) -> None:
    config = {"steps": 2, "batch_size": 16, "unlearn_share": 0.1, "exposure": {"confirmation": 0.0, "misfit": 0.0}}
    grid = grid_of(small_folder, "clip", {"trigger": "badnet"}, {"ubt": {"config": config}})
    cell = next(cell for cell in grid.cells if cell.names.method == "ubt")
    for given in grid.cells:
        result = try_cell(given, tmp_path)
        assert (result.status, result.reason) == ("done", "")
    stored = try_cell(cell, tmp_path)
    assert stored.repaired is not None
    assert stored.repaired.detection["unlearnt"] == pytest.approx(100 * 28 / 280)


def test_a_published_method_of_clips_has_its_papers_constants_at_the_models_rate() -> None:
    clip = load_any_clip("tiny")
    paper, ours = (
        clip_cells.method_config(MethodSettings(method="ubt", published=which, config={"steps": 7}), clip, 1000)
        for which in (True, False)
    )
    assert {name: getattr(paper, name) for name in PUBLISHED} == PUBLISHED
    assert (ours.expose, ours.loss) == ("concept", "disbelief")
    assert paper.learning_rate < ours.learning_rate
    assert paper.steps == ours.steps == 7
