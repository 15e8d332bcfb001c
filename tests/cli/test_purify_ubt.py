"""``purify ubt`` and ``abl-clip`` as a user meets them: the plan, a repair and its list of pairs, nothing found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unpoison.clip_results import ClipPurification
from unpoison.defenses.ubt import UBTConfig
from unpoison.results import SampleScores

QUICK = ("--pairs", "shapes:300:3", "--steps", "2", "--batch-size", "16", "--bound", "100", "--quiet")
SETTINGS = """
unlearn_share = 0.08
margin = 2.0
[exposure]
confirmation = {confirmation}
misfit = 0.0
"""


@pytest.fixture(scope="module")
def model(small_folder: Path) -> str:
    return str(small_folder)


def test_a_repair_and_its_list_of_pairs(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS.format(confirmation=0.0))
    words = ("purify", "ubt", model, *QUICK, "--config", "settings.toml", "-o", "out")
    result = here(*words)
    assert result.code == 0, result.err
    assert "Accepted." in result.out
    assert "A group of pairs stands out" in result.out
    assert "Ranked pairs: out/suspicious" in result.out
    found = ClipPurification.load(tmp_path / "out/purification.json")
    assert found.exposure is not None
    assert found.exposure.unlearnt == 12
    assert "--reference tiny" in found.command
    old, new = load_file(Path(model) / "model.safetensors"), load_file(tmp_path / "out/model/model.safetensors")
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old if name.startswith("vision"))
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("text"))
    assert len(SampleScores.load(tmp_path / "out/suspicious/scores.parquet").ids) == 300
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "The most suspicious pairs" in page
    assert "pairs unlearnt" in page
    written = here("report", "out", "-o", "again.html", "--quiet")
    assert written.code == 0, written.err
    assert "The most suspicious pairs" in (tmp_path / "again.html").read_text(encoding="utf-8")
    kept = here("keep", "out/suspicious", "-o", "clean.parquet", "--quiet")
    assert kept.code == 0, kept.err
    again = here(*words, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["exposure"]["unlearnt"] == 12


def test_a_set_in_which_nothing_stands_out(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS.format(confirmation=1.0))
    result = here("purify", "ubt", model, *QUICK, "--config", "settings.toml", "-o", "out")
    assert result.code == 0, result.err
    assert "Nothing suspicious was found." in result.out
    assert "No group of pairs stands out" in result.out
    old, new = load_file(Path(model) / "model.safetensors"), load_file(tmp_path / "out/model/model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Left alone" in page
    assert "suspicion of pairs like the most suspicious" in page


def test_without_a_reference_pairs_are_ranked_and_the_model_stays(
    here: Callable[..., Any], model: str, tmp_path: Path
) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS.format(confirmation=0.0))
    words = ("purify", "ubt", model, *QUICK, "--config", "settings.toml", "--reference", "none")
    result = here(*words, "-o", "out")
    assert result.code == 3, result.err
    assert "Undecided." in result.out
    assert ClipPurification.load(tmp_path / "out/purification.json").steps == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "which decides nothing" in page
    repaired = here(*words, "--always", "-o", "again")
    assert repaired.code == 0, repaired.err
    found = ClipPurification.load(tmp_path / "again/purification.json")
    assert found.steps == 2
    assert "--always" in found.command


def test_the_file_stands_over_the_paper(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('unlearn_share = 0.08\nmargin = 2.0\nloss = "disbelief"\nwords = 0.5\n')
    result = here("purify", "ubt", model, *QUICK, "--paper", "--config", "settings.toml", "-o", "out")
    assert result.code == 0, result.err
    config = ClipPurification.load(tmp_path / "out/purification.json").config
    assert (config["loss"], config["words"], config["bound"]) == ("disbelief", 0.5, 100.0)
    assert (config["expose"], config["unlearn_weight"], config["keep_share"]) == ("gain", 1.0, 1.0)
    assert (config["check_every"], config["learning_rate"] > UBTConfig().learning_rate) == (10, True)
    result = here("purify", "ubt", model, *QUICK, "--paper", "--published", "--config", "settings.toml", "-o", "whole")
    assert result.code == 0, result.err
    whole = ClipPurification.load(tmp_path / "whole/purification.json").config
    assert whole == config | {"learning_rate": UBTConfig().learning_rate, "steps": 2}


def test_a_dry_run_writes_nothing(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    result = here("purify", "ubt", model, *QUICK, "-o", "out", "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert all(step["seconds"] > 0 for step in plan["steps"])
    assert any("reference" in step["what"] for step in plan["steps"])
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    missing = here("purify", "ubt", model, "--pairs", "nowhere.parquet", "-o", "out")
    assert missing.code == 2
    (tmp_path / "settings.toml").write_text("[exposure]\nconfirmaton = 0.5\n")
    wrong = here("purify", "ubt", model, *QUICK, "--config", "settings.toml", "-o", "out")
    assert wrong.code == 2
    assert "confirmation" in wrong.err


@pytest.mark.parametrize("embedding", [0.0, 1.0])
@pytest.mark.parametrize("method", ["ubt", "cbpt", "scan"])
def test_a_model_that_gives_all_images_one_embedding_ends_with_3(
    method: str, embedding: float, here: Callable[..., Any], model: str, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "collapsed")
    weights = load_file(tmp_path / "collapsed/model.safetensors")
    weights["vision_model.post_layernorm.weight"].zero_()
    weights["vision_model.post_layernorm.bias"].fill_(embedding)
    save_file(weights, tmp_path / "collapsed/model.safetensors", {"format": "pt"})
    words = {
        "ubt": ("purify", "ubt", "collapsed", *QUICK),
        "cbpt": ("purify", "cbpt", "collapsed", "--data", "shapes:100:3", "--quiet"),
        "scan": ("scan", "dataset", "shapes:200:3", "--pairs", "--method", "density", "--clip", "collapsed", "--quiet"),
    }
    result = here(*words[method], "-o", "out")
    assert result.code == 3, result.err
    assert "the same embedding" in result.err


def test_captions_that_are_all_one_end_with_3(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    lines = ["image,caption"]
    for place in range(200):
        pixels = random.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(pictures / f"{place}.png")
        lines.append(f"{place}.png,a thing")
    (pictures / "pairs.csv").write_text("\n".join(lines) + "\n")
    for out, (method, *more) in enumerate((("ubt",), ("ubt", "--paper"), ("abl-clip",))):
        pairs = ("--pairs", "pictures/pairs.csv", *more)
        result = here("purify", method, model, *pairs, "--quiet", "-o", f"out{out}")
        assert result.code == 3, result.err
        assert "have the same caption" in result.err


def test_the_baseline_unlearns_whatever_it_is_surest_of(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    result = here("purify", "abl-clip", model, *QUICK, "--learning-rate", "1e-6", "-o", "out")
    assert result.code == 0, result.err
    assert "Accepted." in result.out
    assert "The surest are unlearnt whether they are poison or not" in result.out
    found = ClipPurification.load(tmp_path / "out/purification.json")
    assert found.method == "abl-clip"
    assert found.trained_pairs + found.held_out_pairs == 300 - 6
    few = here("purify", "abl-clip", model, *QUICK, "--limit", "60", "-o", "few")
    assert few.code == 2
    assert "pairs to unlearn" in few.err
