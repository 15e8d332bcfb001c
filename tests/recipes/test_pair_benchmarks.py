"""The benchmarks of UBT and CBPT, which are scripts and no package: what their variants mean."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from unpoison.benchmark.clip_cells import method_config
from unpoison.benchmark.settings import MethodSettings
from unpoison.data.pairs import open_pairs
from unpoison.defenses.cbpt import CBPTConfig
from unpoison.embedded_pairs import see_pairs
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run

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


@pytest.fixture(scope="module")
def kept_cells() -> Iterator[ModuleType]:
    yield from script("kept_cells")


@pytest.fixture(scope="module")
def cbpt() -> Iterator[ModuleType]:
    yield from script("cbpt")


def test_a_kept_cell_of_other_settings_is_made_again(
    kept_cells: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, inputs = tmp_path / "cell.json", kept_cells.inputs_of(CBPTConfig(), victim="a")
    assert (inputs["precision"], inputs["config"]["forms"]) == ("bf16", ["additive", "patch"])
    assert not kept_cells.is_done(file, inputs)
    file.write_text(json.dumps({"inputs": inputs}))
    assert kept_cells.is_done(file, inputs)
    assert capsys.readouterr().out == ""
    for other in (
        kept_cells.inputs_of(CBPTConfig(), victim="b"),
        kept_cells.inputs_of(CBPTConfig(steps=7), victim="a"),
    ):
        assert not kept_cells.is_done(file, other)
    assert capsys.readouterr().out.splitlines() == [
        "cell: kept with other victim, made again", "cell: kept with other config, made again",
    ]  # fmt: skip
    file.write_text("{}")  # as kept before cells said what they are made from
    assert not kept_cells.is_done(file, inputs)


def test_ablations_of_cbpt_change_one_thing(cbpt: ModuleType) -> None:
    plain = asdict(CBPTConfig())

    def changed(name: str) -> dict[str, Any]:
        return {key: value for key, value in asdict(cbpt.CONFIGS[name]).items() if value != plain[key]}

    assert changed("no-inversion") == {"delta": "none"}
    assert changed("no-inversion-labels") == {"delta": "none", "clean": "labels"}
    assert changed("contrast-epsilon-8") == {"dummies": "contrast", "forms": ("additive",), "epsilon": 8 / 255}
    assert changed("contrast-additive") == {"dummies": "contrast", "forms": ("additive",)}


@pytest.fixture(scope="module")
def cost() -> Iterator[ModuleType]:
    yield from script("ubt_cbpt_cost")


def test_costs_are_ratios_of_the_same_round(cost: ModuleType) -> None:
    def one(ubt: float, clean: float, epoch: float, cbpt: float, rvpt: float) -> dict[str, Any]:
        seconds = zip(("ubt", "clean-clip", "clean-clip-epoch", "cbpt", "rvpt"), (ubt, clean, epoch, cbpt, rvpt),
                      strict=True)  # fmt: skip
        return {name: {"seconds": value, "processor_seconds": 2 * value} for name, value in seconds}

    found = cost.ratios([one(1, 10, 5, 3, 6), one(4, 10, 5, 3, 12), one(3, 10, 10, 3, 3)])
    assert found["ubt"]["wall_ratio_to_cleanclip"] == pytest.approx(0.3)
    assert found["ubt"]["wall_ratio_to_cleanclip_epoch"] == pytest.approx(0.3)
    assert found["cbpt"]["wall_ratio_to_rvpt"] == pytest.approx(0.5)
    assert found["cbpt"]["processor_ratio_to_rvpt"] == pytest.approx(0.5)


@pytest.fixture
def any_precision() -> Iterator[None]:
    """accelerate holds one precision a process: other tests get theirs back."""
    state = AcceleratorState._shared_state
    before = dict(state)
    state.clear()
    yield
    state.clear()
    state.update(before)


@pytest.mark.usefixtures("one_thread", "any_precision")
def test_costs_are_measured_on_any_model(
    cost: ModuleType, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(small_folder), "--pairs", "shapes:1700:3", "--shots", "shapes:240:4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["ubt_cbpt_cost.py", *words, "--quick", "--result", str(tmp_path / "cost.json")])
    cost.main()
    result = json.loads((tmp_path / "cost.json").read_bytes())
    assert (result["precision"], result["threads"], result["quick"]) == ("bf16", 1, True)
    assert result["rounds"][0]["ubt"]["steps"] == result["rounds"][0]["clean-clip"]["steps"] == 2
    ratio = result["rounds"][0]["cbpt"]["seconds"] / result["rounds"][0]["rvpt"]["seconds"]
    assert result["cbpt"]["wall_ratio_to_rvpt"] == pytest.approx(ratio)


@pytest.fixture(scope="module")
def pair_detectors() -> Iterator[ModuleType]:
    yield from script("pair_detectors")


def test_false_alarms_on_clean_pairs_have_a_row(pair_detectors: ModuleType) -> None:
    quiet, loud = {"alarm": 0.0, "flagged": 0.0, "pairs": 9}, {"alarm": 1.0, "flagged": 0.031, "pairs": 9}
    rows = pair_detectors.clean_table([{"all": {"exposure": quiet}}, {"all": {"exposure": loud}, "odd": {}}])
    assert rows[-1] == "| exposure | all | 1 of 2 | 9 to 91 % | 3.10 % |"
    assert len(rows) == 6


def test_ranking_alone_is_no_alarm(pair_detectors: ModuleType, small_folder: Path) -> None:
    clip, pairs = load_clip(small_folder), open_pairs("shapes:300:3")
    known = see_pairs(pairs, clip=clip, reference=load_clip("tiny"), captions=True, run=Run())
    assert pair_detectors.alarms("density", known, Run()) is None
    found = pair_detectors.alarms("exposure", known, Run())
    assert found == {"alarm": 0.0, "flagged": 0.0, "pairs": 300}
    some = pair_detectors.part_of(known, np.arange(0, 300, 2))
    assert (len(some.rows), some.alone) == (150, known.alone)
