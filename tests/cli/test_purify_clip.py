"""``purify par`` and its baselines as a user meets them: the plan, the model, the refusals."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unpoison.clip_results import ClipPurification

QUICK = ("--pairs", "shapes:40:3", "--steps", "2", "--batch-size", "8", "--bound", "100", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = Path(__file__).parents[1] / "defenses" / "small_clip.py"
    spec = importlib.util.spec_from_file_location("small_clip", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.make_folder(tmp_path_factory.mktemp("clip") / "model"))


def test_a_dry_run_writes_nothing(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    result = here("purify", "par", model, *QUICK, "-o", "out", "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["dry_run"] is True
    assert [step["amount"] for step in plan["steps"]] == [40, 16, 4]
    assert plan["memory"] > 0
    assert plan["disk"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["par", "clean-clip", "fine-tune"])
def test_a_model_comes_back_in_its_format(verb: str, here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    from transformers import CLIPModel

    result = here("purify", verb, model, *QUICK, "-o", "out", "--json")
    assert result.code == 0, result.err
    answer = json.loads(result.out)
    assert answer["schema"] == "unpoison/clip-purification"
    assert answer["config"]["batch_size"] == 8
    stored = ClipPurification.load(tmp_path / "out" / "purification.json")
    assert stored.steps == 2
    purified = CLIPModel.from_pretrained(tmp_path / "out" / "model").state_dict()
    given = CLIPModel.from_pretrained(model).state_dict()
    assert list(purified) == list(given)
    assert any(not purified[name].equal(given[name]) for name in given)
    assert "Purified CLIP" in (tmp_path / "out" / "card.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "out" / "steps").iterdir())
    again = here("purify", verb, model, *QUICK, "-o", "out", "--json")
    assert json.loads(again.out) == answer


def test_a_diverged_model_is_not_accepted(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    result = here("purify", "par", model, *QUICK, "--learning-rate", "1e30", "-o", "out")
    assert result.code == 3, result.err
    assert "Not accepted." in result.out
    assert "diverged at step 1" in result.out
    assert (tmp_path / "out" / "model-not-accepted" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model").exists()


def test_what_is_refused(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    few = here("purify", "par", model, "--pairs", "shapes:9", "-o", "few")
    assert few.code == 2
    assert "have 9, need at least 16" in few.err
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("tua = 2.0\n", encoding="utf-8")
    unknown = here("purify", "par", model, *QUICK, "--config", str(wrong), "-o", "out")
    assert unknown.code == 2
    assert "'tau'" in unknown.err
    alone = here("purify", "par", model, *QUICK, "--manifest", "manifest.json", "-o", "out")
    assert "--manifest needs test images" in alone.err
    far = here("purify", "par", model, *QUICK, "--tau", "5", "-o", "out")
    assert "tau must lie in (0, 4]" in far.err
    assert not (tmp_path / "out").exists()
