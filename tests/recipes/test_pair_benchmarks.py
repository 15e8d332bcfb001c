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

import pytest

from unpoison.benchmark.clip_cells import method_config
from unpoison.benchmark.settings import MethodSettings
from unpoison.defenses.cbpt import CBPTConfig
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


def test_natural_captions_are_no_part_of_the_claimed_auroc(ubt: ModuleType) -> None:
    assert "badclip" not in ubt.TEMPLATES
    assert set(ubt.TEMPLATES) < set(ubt.GRID_ATTACKS)
