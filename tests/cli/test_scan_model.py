"""``unpoison scan model`` as a process: exit codes, JSON and nothing else, a run that goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unpoison.cli.scan_model import parse_duration, words_of
from unpoison.data.shapes import SHAPES_CLASSES
from unpoison.errors import UsageError
from unpoison.model_results import ModelScan
from unpoison.models.classifier import new_classifier, save_classifier

QUICK = """
[weights]
images = 64
[weights.search]
steps = 2
turn = 1
finalists = 3
first_steps = 1
inversion = {batch_size = 4}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_classifier(new_classifier("small-resnet", SHAPES_CLASSES[:4]), tmp_path / "model")
    (tmp_path / "quick.toml").write_text(QUICK)
    return tmp_path / "model"


def test_a_scan_as_a_process(process: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    words = ("scan", "model", "model", "--data", "shapes:80:3", "--config", "quick.toml", "-o", "scan", "--json")
    result = process(*words)
    answer = json.loads(result.out)
    assert (answer["schema"], answer["schema_version"]) == ("unpoison/model-scan", 1)
    assert answer["file"]["word"] == "accepted"
    scan = ModelScan.load(tmp_path / "scan" / "model-scan.json")
    assert result.code == scan.exit_code
    assert (tmp_path / "scan" / "finished.json").exists()
    page = (tmp_path / "scan" / "report.html").read_text(encoding="utf-8")
    assert "Weights verdict" in page
    again = "unpoison scan model model --data shapes:80:3 --config quick.toml"
    assert f"{again} --power" in page  # as it was given, so that what is suggested can be run
    assert f"{again} --clean-reference MODEL" in page
    assert "has not been measured yet" in page or "Measured on" in page


def test_refused_files_and_unknown_formats(here: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {canary}",)

    torch.save({"hook": Runs()}, tmp_path / "evil.pth")
    refused = here("scan", "model", "evil.pth", "-o", "refused")
    assert refused.code == 1, refused.err
    assert "File: refused" in refused.out
    assert "Weights: inconclusive" in refused.out
    assert "Next: Do not load these files" in refused.out
    assert "Not covered" not in refused.out  # of weights that nobody looked at
    assert not canary.exists()
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    unknown = here("scan", "model", "model.gguf", "-o", "unknown")
    assert unknown.code == 3
    assert "recognized: a .safetensors file" in unknown.out
    assert here("scan", "model", "model.gguf", "-o", "unknown", "--exit-zero").code == 0
    assert here("scan", "model", "nowhere/at/all", "-o", "nowhere").code == 2


def test_the_same_command_shows_its_result_and_another_model_is_refused(
    here: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    words = ("scan", "model", "model", "--config", "quick.toml", "-o", "scan", "--json")
    first = here(*words, "-q")
    assert first.err == ""
    stored = (tmp_path / "scan" / "model-scan.json").read_bytes()
    again = here(*words)
    assert json.loads(again.out) == json.loads(first.out)
    assert "holds the finished run" in again.err
    assert (tmp_path / "scan" / "model-scan.json").read_bytes() == stored
    (tmp_path / "scan" / "finished.json").unlink()  # as a kill at the very end leaves it
    assert json.loads(here(*words, "-q").out)["weights"] == json.loads(first.out)["weights"]
    (model / "notes.txt").write_text("changed")
    changed = here(*words)
    assert changed.code == 2
    assert "files:" in json.loads(changed.out)["error"]["message"]


def test_a_scan_goes_on_after_a_kill(
    process: Callable[..., Any], kill_once: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.toml").write_text(QUICK.replace("steps = 2", "steps = 60").replace("= 3", "= 4"))
    words = ("scan", "model", "model", "--data", "shapes:80:3", "--config", "slow.toml", "--json", "-o")
    kill_once("cut/steps/search-patch-00001.safetensors", *words, "cut")
    assert not (tmp_path / "cut/finished.json").exists()
    cut, whole = (process(*words, folder) for folder in ("cut", "whole"))
    assert "search-patch-00001: continued" in cut.err
    assert json.loads(cut.out)["weights"]["classes"] == json.loads(whole.out)["weights"]["classes"]
    assert not list((tmp_path / "cut/steps").glob("search-*"))  # replaced by the verdict


def test_a_dry_run_writes_nothing(here: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    words = ("scan", "model", "model", "--power", "--dry-run", "--config", "quick.toml", "--trained-on", "shapes:60:3")
    result = here(*words, "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["steps"][0]["what"].startswith("file verdict: accepted")
    assert any(step["what"].startswith("power: 6 canaries") for step in plan["steps"])
    assert min(step["seconds"] for step in plan["steps"]) > 0
    assert plan["memory"] > 0
    shown = here(*words)
    assert "Time: about" in shown.out
    assert "Memory: about" in shown.out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_clip_for_the_training_data(here: Callable[..., Any], model: Path) -> None:
    words = ("scan", "model", "model", "--config", "quick.toml", "-o", "scan", "--json", "-q")
    result = here(*words, "--trained-on", "shapes:60:3", "--clip", "nowhere/at/all")
    assert result.code == 2
    assert "nowhere/at/all" in json.loads(result.out)["error"]["message"]


def test_training_pairs_are_told_apart_from_others(here: Callable[..., Any], model: Path) -> None:
    words = ("scan", "model", "model", "--trained-on", "shapes:60:3", "--pairs", "--config", "quick.toml", "-o", "scan")
    result = here(*words, "--json", "-q")
    assert result.code in (0, 1, 3), result.err
    assert json.loads(result.out)["data"]["scan"] is None  # pairs say nothing of a classifier
    other = here(*words[:4], "shapes:60:4", *words[5:])
    assert other.code == 2
    assert "trained_on" in other.err


def test_the_command_is_made_again_as_it_was_given() -> None:
    words = words_of(
        "a b.pth", arch="wrn-16-1", image_size=32, mean=(0.0, 0.5, 1.0), std=None, pairs=True, clip=None,
        clean_reference=["one", "two"], data=Path("rows.parquet"), strict=False, limit=None,
    )  # fmt: skip
    assert words == [
        "unpoison", "scan", "model", "a b.pth", "--arch", "wrn-16-1", "--mean", "0.0", "0.5", "1.0", "--pairs",
        "--clean-reference", "one", "--clean-reference", "two", "--data", "rows.parquet",
    ]  # fmt: skip


def test_the_schema_is_printed(here: Callable[..., Any]) -> None:
    assert json.loads(here("schema").out)["properties"]["schema"] == {"const": "unpoison/model-scan"}


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_times(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3s", "0", "10 parsecs", "nan", "inf"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)
