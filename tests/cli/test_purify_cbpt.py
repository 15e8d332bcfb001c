"""``purify cbpt`` and its baselines as a user meets them: the plan, a classifier to load, nothing found, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unpoison.models.clip_transformers import load_clip
from unpoison.models.zero_shot import TEMPLATES, class_embeddings
from unpoison.models.zero_shot_classifier import load_zero_shot
from unpoison.zero_shot_results import ZeroShotPurification

DATA = ("--data", "shapes:200:3", "--shots", "4", "--quiet")
SETTINGS = """
views = 2
steps = 3
loud_steps = 2
bound_asr = 100.0
search_images = 60
[inversion]
steps = 2
batch_size = 8
[search]
success = 100.0
index = 99.0
index_apart = 99.0
finalists = 3
first_steps = 1
[search.inversion]
steps = 2
batch_size = 8
"""


@pytest.fixture(scope="module")
def model(small_folder: Path) -> str:
    return str(small_folder)


def test_a_named_target(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS)
    words = ("purify", "cbpt", model, *DATA, "--config", "settings.toml", "--target", "cross", "--bound", "100",
             "--test", "shapes:60:4", "-o", "out")  # fmt: skip
    result = here(*words)
    assert result.code == 0, result.err
    assert "Accepted." in result.out
    assert "clean accuracy" in result.out
    assert "Protects: this zero-shot classifier alone" in result.out
    assert "Classifier: out/classifier.safetensors" in result.out
    found = ZeroShotPurification.load(tmp_path / "out/purification.json")
    assert found.targets == ("cross",)
    assert "--target cross" in found.command
    classifier = load_zero_shot(tmp_path / "out", load_clip(model))
    assert classifier.class_names == found.class_names
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "The inverted triggers" in page
    assert page.count("data:image/png;base64,") >= 5
    assert "retrieval, captioning" in page
    again = here(*words, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["targets"] == ["cross"]
    assert here("report", "out", "-o", "page.html", "--quiet").code == 0


def test_nothing_found(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS)
    result = here("purify", "cbpt", model, *DATA, "--config", "settings.toml", "-o", "out")
    assert result.code == 0, result.err
    assert "Nothing suspicious was found." in result.out
    clip = load_clip(model)
    classifier = load_zero_shot(tmp_path / "out", clip)
    assert torch.equal(classifier.classes, class_embeddings(clip, classifier.class_names, TEMPLATES))


def test_what_is_not_accepted_says_so_in_its_name(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("iterations = 1\nstrength = 1e-9\n")
    words = ("purify", "linear-probe", model, *DATA, "--config", "settings.toml", "--bound", "0", "-o", "out")
    result = here(*words)
    found = ZeroShotPurification.load(tmp_path / "out/purification.json")
    assert result.code == (0 if found.accepted else 3)
    assert found.accepted == (found.held_out_after >= found.held_out_before)
    name = "classifier.safetensors" if found.accepted else "not-accepted-classifier.safetensors"
    assert (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("words", [("cbpt",), ("cbpt", "--target", "cat"), ("rvpt",), ("linear-probe",)])
def test_one_class_is_an_error_of_the_data(
    words: tuple[str, ...], here: Callable[..., Any], model: str, tmp_path: Path
) -> None:
    (tmp_path / "data/cat").mkdir(parents=True)
    for shade in range(6):
        Image.new("RGB", (16, 16), (40 * shade, 99, 7)).save(tmp_path / f"data/cat/{shade}.png")
    result = here("purify", words[0], model, "--data", "data", *words[1:], "--quiet", "-o", "out")
    assert result.code == 2
    assert "have 1, need at least 2." in result.err


def test_the_plan_and_the_refusals(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    plan = here("purify", "cbpt", model, *DATA, "--dry-run", "-o", "out", "--json")
    assert plan.code == 0, plan.err
    steps = [step["what"] for step in json.loads(plan.out)["steps"]]
    assert "look for a trigger" in steps
    assert not (tmp_path / "out").exists()
    unknown = here("purify", "cbpt", model, *DATA, "--target", "banana", "-o", "other")
    assert unknown.code == 2
    assert "'banana' is none of the" in unknown.err
    plan = here("purify", "rvpt", model, *DATA, "--dry-run", "--json")
    assert "learn visual prompts" in [step["what"] for step in json.loads(plan.out)["steps"]]
