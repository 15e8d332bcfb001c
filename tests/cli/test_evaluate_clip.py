"""``evaluate`` of a CLIP as a user meets it: rates, retrieval, drift, rebound, files and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unpoison.models.classifier import new_classifier, save_classifier
from unpoison.results import ClipEvaluation, Rebound

DATA = ("--data", "shapes:24:5")
MORE = (*DATA, "--manifest", "attack/manifest.json", "--retrieval", "shapes:20:6", "--suspect", "tiny")


@pytest.fixture(scope="module")
def model(small_folder: Path) -> str:
    return str(small_folder)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def attack(here: Callable[..., Any]) -> None:
    words = ("attack", "badnet", "shapes:24:5", "--rate", "0.5", "--target", "star", "--manifest-only", "-o", "attack")
    assert here(*words).code == 0


def test_all_that_is_measured_of_a_clip(process: Callable[..., Any], tmp_path: Path) -> None:
    attack(process)
    result = process("evaluate", "tiny", *MORE, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["schema"], found["model"]) == ("unpoison/clip-evaluation", "tiny")
    assert (found["c_acc"]["n"], found["c_acc"]["value"] > 80) == (24, True)
    assert 0 < found["asr"]["n"] == found["asr_floor"]["n"] == found["ra"]["n"] < 24  # without the stars
    assert found["asr_excess"] == pytest.approx(max(0, found["asr"]["value"] - found["asr_floor"]["value"]))
    assert [found["image_to_text"][f"at_{k}"]["n"] for k in (1, 5, 10)] == [20, 20, 20]
    assert found["retrieval_asr"]["n"] > 0
    assert found["drift"]["image_raw"] == pytest.approx(1)
    assert found["drift"]["text_aligned"] == pytest.approx(1)
    assert names(tmp_path) <= {"attack", "cache", "hf"}


def test_what_is_shown_and_stored(here: Callable[..., Any], tmp_path: Path) -> None:
    attack(here)
    words = ("evaluate", "tiny", *MORE, "-o", "ev")
    shown = here(*words)
    assert shown.code == 0, shown.err
    for text in ("clean accuracy", "ASR floor", "retrieval ASR", "image to text: R@1 ", "Mean cosine with tiny: "):
        assert text in shown.out
    assert "No manifest was given" not in shown.out
    assert names(tmp_path / "ev") == {"run.json", "steps", "evaluation.json", "report.html", "finished.json"}
    assert names(tmp_path / "ev" / "steps") == set()
    page = (tmp_path / "ev" / "report.html").read_text(encoding="utf-8")
    for text in ("Excess ASR", "R@10, text to image", "mean cosine between the suspect and this model"):
        assert text in page
    assert here(*words).out == shown.out  # done already
    other = here("evaluate", "tiny", *DATA, "-o", "ev", "--json")
    assert "suspect: 'tiny' there, None now" in json.loads(other.out)["error"]["message"]
    alone = here("evaluate", "tiny", *DATA, "--limit", "9")
    assert "No manifest was given, so no trigger was tested." in alone.out
    assert " 9" in alone.out.splitlines()[1]
    assert here("report", "ev/evaluation.json", "-o", "again.html").code == 0


def test_rebound_after_fine_tuning(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    attack(here)
    words = ("evaluate", model, *MORE[:4], "--rebound", "shapes:80:3", "-q")
    result = here(*words, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["schema"] == "unpoison/rebound"
    assert (found["pairs"], found["before"]["model"], found["after"]["model"]) == (
        "shapes:80:3", model, f"{model}, fine-tuned",
    )  # fmt: skip
    assert found["before"]["asr"]["n"] == found["after"]["asr"]["n"] > 0
    stored = here(*words, "-o", "ev")
    assert stored.code == 0, stored.err
    assert "after fine-tuning" in stored.out
    assert "Fine-tuning on shapes:80:3 changed the excess ASR by " in stored.out
    kept = Rebound.load(tmp_path / "ev" / "rebound.json")
    assert kept.after.c_acc.value == found["after"]["c_acc"]["value"]
    assert ClipEvaluation.load(tmp_path / "ev" / "evaluation.json") == kept.before
    assert ClipEvaluation.load(tmp_path / "ev" / "evaluation-fine-tuned.json") == kept.after
    assert names(tmp_path / "ev" / "steps") == set()
    assert "fine-tuned" in (tmp_path / "ev" / "report.html").read_text(encoding="utf-8")


def test_what_is_refused(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    def error(*words: str) -> dict[str, str]:
        result = here("evaluate", *words, "--json")
        assert result.code == 2
        return json.loads(result.out)["error"]

    save_classifier(new_classifier("small-resnet", ("a", "b"), seed=3), tmp_path / "net")
    found = error("net", *DATA, "--suspect", "tiny", "--rebound", "shapes:80")
    assert found["message"].startswith("--suspect, --rebound cannot be measured: net is a classifier")
    assert found["hint"]
    assert "have 9, need at least 16" in error(model, *DATA, "--rebound", "shapes:9")["message"]
    assert "not a readable manifest" in error(model, *DATA, "--manifest", "missing.json")["message"]
    assert error(model, *DATA, "--suspect", "./nowhere")["type"] == "ModelError"
    width = error(model, *DATA, "--suspect", "tiny")
    assert "The suspect's embeddings have " in width["message"]
    assert names(tmp_path) <= {"net", "cache"}
