"""``purify par`` and its baselines as a user meets them: the plan, the model, the refusals, a kill and what follows."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import unpoison
from unpoison.clip_results import ClipPurification
from unpoison.data.pairs import open_pairs

QUICK = ("--pairs", "shapes:40:3", "--steps", "2", "--batch-size", "8", "--bound", "100", "--quiet")
FILES = {"run.json", "steps", "model", "card.md", "purification.json", "report.html", "finished.json"}


@pytest.fixture(scope="module")
def model(small_folder: Path) -> str:
    return str(small_folder)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_dry_run_writes_nothing(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    words = ("purify", "par", model, "--always", *QUICK, "-o", "out", "--dry-run")
    result = here(*words, "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["dry_run"] is True
    assert [step["amount"] for step in plan["steps"]] == [40, 16, 16]
    assert all(step["seconds"] > 0 for step in plan["steps"])
    assert plan["memory"] > 0
    assert plan["disk"] > 0
    assert set(plan["files"]) == FILES - {"steps", "model", "finished.json"} | {"steps/", "model/"}
    shown = here(*words, "--test", "shapes:24:5").out
    assert "train 2 steps of 8 pairs" in shown
    assert "measure before and after" in shown
    assert "look for a trigger" not in shown
    assert "look for a trigger" in here(*[word for word in words if word != "--always"]).out
    assert names(tmp_path) <= {"cache"}


@pytest.mark.parametrize("verb", ["par", "clean-clip", "fine-tuning"])
def test_a_model_comes_back_in_its_format(verb: str, here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    from transformers import CLIPModel

    untouched = content(Path(model))
    words = ("purify", verb, model, *(["--always"] if verb == "par" else []), *QUICK, "-o", "out", "--json")
    result = here(*words)
    assert result.code == 0, result.err
    assert result.err == ""
    answer = json.loads(result.out)
    assert answer["schema"] == "unpoison/clip-purification"
    assert (answer["method"], answer["config"]["batch_size"]) == (verb, 8)
    assert content(Path(model)) == untouched
    stored = ClipPurification.load(tmp_path / "out" / "purification.json")
    assert stored.steps == 2
    assert names(tmp_path / "out") == FILES
    assert names(tmp_path / "out" / "model") == names(Path(model)) | {"README.md"}
    purified = CLIPModel.from_pretrained(tmp_path / "out" / "model").state_dict()
    given = CLIPModel.from_pretrained(model).state_dict()
    assert list(purified) == list(given)
    assert any(not purified[name].equal(given[name]) for name in given)
    card = (tmp_path / "out" / "card.md").read_text(encoding="utf-8")
    assert card == (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert model in card
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "CLIP purification" in page
    own = " --always" if verb == "par" else ""
    assert f"unpoison purify {verb} {model} --pairs shapes:40:3{own} --steps 2" in page
    assert not list((tmp_path / "out" / "steps").iterdir())
    before = content(tmp_path / "out")
    assert json.loads(here(*words).out) == answer
    assert content(tmp_path / "out") == before


def test_figures_before_and_after(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    here("attack", "badnet", "shapes:24:5", "--rate", "0.5", "--target", "star", "--manifest-only", "-o", "attack")
    words = ("purify", "par", model, "--always", *QUICK, "-o", "out", "--test", "shapes:24:5", "--manifest",
             "attack/manifest.json", "--retrieval", "shapes:20:6")  # fmt: skip
    result = here(*words, "--json")
    assert result.code == 0, result.err
    answer = json.loads(result.out)
    for when, name in (("before", model), ("after", "out/model")):
        found = answer[when]
        assert found["model"] == name
        assert found["c_acc"]["n"] == 24
        assert 0 < found["asr"]["n"] == found["asr_floor"]["n"] == found["ra"]["n"] < 24  # without the stars
        assert (found["attack"], found["target"]) == ("badnet", "star")
        assert found["image_to_text"]["at_1"]["n"] == 20
    assert answer["before"]["drift"] is None
    assert -1 <= answer["after"]["drift"]["image_raw"] < 0.9999
    shown = here(*words).out
    for row in ("clean accuracy", "attack success (ASR)", "ASR floor", "robust accuracy", "R@1, image to text"):
        assert row in shown
    assert "Report: out/report.html" in shown
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "How far the embeddings moved" in page
    assert "Excess ASR" in page
    (tmp_path / "attack" / "manifest.json").write_bytes((tmp_path / "attack" / "manifest.json").read_bytes() + b" ")
    changed = here(*words)
    assert changed.code == 2
    assert "manifest_content" in changed.err


def test_what_is_measured_and_described_is_what_was_saved(
    here: Callable[..., Any], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unpoison.data.sources import open_images
    from unpoison.evaluation.clip import evaluate_clip
    from unpoison.models.clip_files import load_any_clip
    from unpoison.runs import Run

    monkeypatch.setattr("unpoison.models.clip_transformers.inference_dtype", lambda _: torch.float32)
    given = Path(shutil.copytree(model, tmp_path / "given"))
    weights = {key: value.bfloat16() for key, value in load_file(given / "model.safetensors").items()}
    save_file(weights, given / "model.safetensors", {"format": "pt"})
    (given / "open_clip_config.json").write_text("{}")
    words = ("purify", "fine-tuning", "given", *QUICK, "--learning-rate", "1e-3", "-o", "out", "--test", "shapes:24:5")
    result = here(*words, "--json")
    assert result.code == 0, result.err
    answer = json.loads(result.out)
    kept = load_any_clip(tmp_path / "out" / "model")
    measured = evaluate_clip(
        kept, open_images("shapes:24:5"), suspect=load_any_clip(given), run=Run(), name="out/model"
    )
    assert measured.drift is not None
    assert answer["after"]["drift"]["image_raw"] == pytest.approx(measured.drift.image_raw, abs=1e-7)
    assert answer["after"]["drift"]["image_raw"] < 1 - 1e-5
    assert any("open_clip_config.json" in warning for warning in answer["warnings"])
    assert "library_name: transformers\n" in (tmp_path / "out" / "card.md").read_text(encoding="utf-8")


def test_settings_from_a_file_below_those_of_the_command(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("tau = 1.5\nepochs = 1\nerase_area = [0.1, 0.2]\nlearning_rate = 1e-4\n")
    words = ("--pairs", "shapes:40:3", "--batch-size", "8", "--bound", "100", "--config", "own.toml", "-q", "--json")
    answer = json.loads(here("purify", "par", model, "--always", *words, "--tau", "2", "-o", "out").out)
    config = answer["config"]
    assert (config["tau"], config["epochs"], config["steps"], config["erase_area"]) == (2.0, 1, None, [0.1, 0.2])
    assert (config["learning_rate"], config["batch_size"], answer["steps"]) == (1e-4, 8, 4)
    dry = json.loads(
        here("purify", "par", model, "--always", "--pairs", "shapes:40:3", "--published", "--dry-run", "--json").out
    )
    assert "train 10 steps of 32 pairs" in [step["what"] for step in dry["steps"]]  # 2,048 where there are so many


def test_a_diverged_model_is_not_accepted(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    result = here("purify", "par", model, "--always", *QUICK, "--learning-rate", "1e30", "-o", "out")
    assert result.code == 3, result.err
    assert "Not accepted." in result.out
    assert "diverged at step 1" in result.out
    kept = load_file(tmp_path / "out" / "model-not-accepted" / "model.safetensors")
    given = load_file(Path(model) / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in given.items())
    assert not (tmp_path / "out" / "model").exists()
    assert "Not accepted: do not rely" in (tmp_path / "out" / "model-not-accepted" / "README.md").read_text()
    assert "do not rely on this purified CLIP" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_refused(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    def error(*words: str) -> dict[str, str]:
        result = here("purify", *words, "--json")
        assert result.code == 2
        return json.loads(result.out)["error"]

    few = error("par", model, "--pairs", "shapes:9", "-o", "few")
    assert "have 9, need at least 16" in few["message"]
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("tua = 2.0\n", encoding="utf-8")
    assert "'tau'" in error("par", model, "--always", *QUICK, "--config", str(wrong), "-o", "out")["hint"]
    for option, value in (("--manifest", "manifest.json"), ("--retrieval", "shapes:20")):
        alone = error("par", model, "--always", *QUICK, option, value, "-o", "out")
        assert f"{option} needs test images" in alone["message"]
        assert "--test" in alone["hint"]
    assert "tau must lie in (0, 4]" in error("par", model, "--always", *QUICK, "--tau", "5", "-o", "out")["message"]
    tests = ("--test", "shapes:24:5", "--manifest", "missing.json", "-o", "out")
    assert "missing.json: not a readable manifest" in error("par", model, "--always", *QUICK, *tests)["message"]
    assert error("par", "./nowhere/model", *QUICK, "-o", "out")["type"] == "ModelError"
    assert error("par", model, "--always", *QUICK[2:], "-o", "out")["type"] == "UsageError"  # no pairs
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "was not begun by unpoison" in error("par", model, "--always", *QUICK, "-o", "mine")["message"]
    assert names(tmp_path / "mine") == {"thesis.tex"}
    assert not (tmp_path / "out").exists()


def test_the_papers_method_and_the_recommended_one(here: Callable[..., Any], model: str) -> None:
    def config(*words: str) -> dict[str, Any]:
        answer = json.loads(here("purify", "par", model, "--always", *QUICK, *words, "--json").out)
        return answer["config"]

    ours, paper = config("-o", "ours"), config("--paper", "-o", "paper")
    assert (ours["adversary_share"], ours["text_tower"], ours["tau"]) == (0.1, "frozen", 0.5)
    assert (paper["adversary_share"], paper["text_tower"], paper["tau"]) == (0.0, "train", 2.15)
    assert ours["learning_rate"] == pytest.approx(2 * paper["learning_rate"])
    mixed = config("--tau", "1", "--text-tower", "train", "-o", "mixed")
    assert (mixed["tau"], mixed["text_tower"], mixed["adversary_share"]) == (1.0, "train", 0.1)


def test_a_model_without_a_trigger_is_left_alone(here: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "few.toml").write_text("search_concepts = 8\n")
    words = ("purify", "par", "tiny", "--pairs", "shapes:300:3", "--config", "few.toml", "-o", "out", "-q")
    result = here(*words)
    assert result.code == 0, result.err
    assert "Nothing suspicious was found." in result.out
    assert "handed back as it came" in " ".join(result.out.split())
    stored = ClipPurification.load(tmp_path / "out" / "purification.json")
    assert stored.left_alone
    assert stored.steps == stored.trained_pairs == 0
    assert stored.search is not None
    assert len(stored.search.found) == 8
    assert not stored.search.suspected
    assert stored.held_out_before == stored.held_out_after
    kept = load_file(tmp_path / "out" / "model" / "model.safetensors")
    given = load_file(Path(unpoison.__file__).parent / "assets" / "tiny_clip" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in given.items())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Left alone" in page
    assert "--always" in page
    assert page.count("data:image/png;base64,") == 3
    assert "no trigger was found" in (tmp_path / "out" / "card.md").read_text(encoding="utf-8").lower()
    assert here(*words).out == result.out  # done already


def test_made_up_pairs_alone_and_beside_others(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    short = QUICK[2:]
    alone = here("purify", "par", model, "--always", "--synthetic", "shapes:40:3", *short, "-o", "alone", "--json")
    assert alone.code == 0
    assert json.loads(alone.out)["synthetic_pairs"] == 40
    words = ("--pairs", "shapes:30:4", "--synthetic", "shapes:20:3")
    both = here("purify", "par", model, "--always", *words, *short, "-o", "both")
    assert both.code == 0
    result = ClipPurification.load(tmp_path / "both" / "purification.json")
    assert (result.synthetic_pairs, result.trained_pairs + result.held_out_pairs) == (20, 50)
    assert result.command.startswith(f"unpoison purify par {model} --pairs shapes:30:4 --synthetic shapes:20:3 ")
    assert "20 made up" in (tmp_path / "both" / "model" / "README.md").read_text()
    assert "20 made up" in (tmp_path / "both" / "report.html").read_text()
    for name, seed in (("found", 5), ("drawn", 6)):
        (tmp_path / name).mkdir()
        world = open_pairs(f"shapes:20:{seed}")
        for row, (image, (text, *_)) in enumerate(zip(world.raw(range(20)), world.captions(range(20)), strict=True)):
            assert isinstance(image, bytes)
            (tmp_path / name / f"{row}.png").write_bytes(image)
            (tmp_path / name / f"{row}.txt").write_text(text)
    folders = here("purify", "par", model, "--always", "--pairs", "found", "--synthetic", "drawn", *short, "-o", "two")
    assert folders.code == 0, folders.err
    result = ClipPurification.load(tmp_path / "two" / "purification.json")
    assert (result.synthetic_pairs, result.trained_pairs + result.held_out_pairs, result.skipped) == (20, 40, ())
    neither = here("purify", "par", model, "--always", *short, "-o", "neither")
    assert neither.code == 2
    assert "--synthetic SOURCE" in neither.err


def test_another_command_does_not_continue_the_run(here: Callable[..., Any], model: str) -> None:
    assert here("purify", "par", model, "--always", *QUICK, "-o", "out").code == 0
    for words, said in (
        (("par", model, "--always", *QUICK, "--seed", "1"), "seed: 0 there, 1 now"),
        (("fine-tuning", model, *QUICK), "verb: 'purify par' there, 'purify fine-tuning' now"),
        (("par", model, "--always", *QUICK[2:], "--pairs", "shapes:40:4"), "content"),
    ):
        result = here("purify", *words, "-o", "out", "--json")
        assert result.code == 2
        assert said in json.loads(result.out)["error"]["message"]


@pytest.fixture
def other_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Accelerate's own settings, as `accelerate launch` hands them over."""
    from accelerate.state import AcceleratorState

    def choose(precision: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)

    yield choose
    AcceleratorState._reset_state(reset_partial_state=True)


def test_precision_is_part_of_a_run_wherever_it_was_set(
    here: Callable[..., Any], model: str, tmp_path: Path, other_precision: Callable[[str], None]
) -> None:
    words = ("purify", "fine-tuning", model, *QUICK, "-o", "out")
    assert here(*words).code == 0
    other_precision("bf16")
    result = here(*words)
    assert result.code == 2
    assert "precision: 'no' there, 'bf16' now" in " ".join(result.err.split())
    other_precision("fp16")
    for more in ((), ("--dry-run",)):
        result = here(*words[:-1], "never", *more)
        assert result.code == 2
        assert "fp16 does not train" in result.err
        assert "--precision bf16" in result.err
    assert not (tmp_path / "never").exists()


def test_other_images_under_the_same_captions_are_other_pairs(
    here: Callable[..., Any], model: str, tmp_path: Path
) -> None:
    def write(name: str, seed: int) -> None:
        world = open_pairs("shapes:40:3")
        images = [*world.raw(range(39)), *open_pairs(f"shapes:1:{seed}").raw([0])]
        rows = {"image": [{"bytes": image, "path": None} for image in images], "id": world.ids}
        rows["captions"] = [list(texts) for texts in world.captions(range(40))]
        pq.write_table(pa.table(rows), tmp_path / name)

    def refused() -> str:
        result = here(*words, "--json")
        assert result.code == 2
        return json.loads(result.out)["error"]["message"]

    write("pairs.parquet", 8)
    write("test.parquet", 8)
    words = ("purify", "fine-tuning", model, "--pairs", "pairs.parquet", "--test", "shapes:24:5", "--retrieval",
             "test.parquet", *QUICK[2:], "-o", "out")  # fmt: skip
    first = json.loads(here(*words, "--json").out)
    content = first["inputs"]["pairs_content"]
    assert content in (tmp_path / "out" / "card.md").read_text()
    write("test.parquet", 9)
    assert "retrieval_content: '40 pairs, " in refused()
    write("test.parquet", 8)
    write("pairs.parquet", 9)
    assert f"content: '40 pairs, {content}' there, '40 pairs, " in refused()
    assert json.loads(here(*words[:-1], "other", "--json").out)["inputs"]["pairs_content"] != content


@pytest.mark.usefixtures("one_thread")
def test_a_killed_command_ends_with_the_same_weights(
    here: Callable[..., Any], begin: Callable[..., subprocess.Popen[str]], model: str, tmp_path: Path
) -> None:
    (tmp_path / "looks.toml").write_text("check_every = 2\n")
    words = ("purify", "par", model, "--always", "--pairs", "shapes:40:3", "--steps", "8", "--batch-size", "8",
             "--bound", "100", "--config", "looks.toml", "--cache", "cache")  # fmt: skip
    assert here(*words, "-o", "whole", "-q").code == 0
    whole = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    wanted = ClipPurification.load(tmp_path / "whole" / "purification.json")
    for folder, sign in (("early", "steps/par-000000.safetensors"), ("late", "model/model.safetensors")):
        running = begin(*words, "-o", folder)
        deadline = time.monotonic() + 200
        while not (tmp_path / folder / sign).exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=100)
        (tmp_path / folder / "steps" / ".par-000000.safetensors.1.partial").write_bytes(b"half")  # as a kill may leave
        assert running.returncode == -signal.SIGKILL
        assert (tmp_path / folder / sign).exists()
        assert not (tmp_path / folder / "finished.json").exists()
        result = here(*words, "-o", folder)
        assert result.code == 0, result.err
        assert "par: continued after step" in result.err
        assert names(tmp_path / folder) == FILES
        assert names(tmp_path / folder / "steps") == set()
        assert (tmp_path / folder / "model" / "model.safetensors").read_bytes() == whole
        assert ClipPurification.load(tmp_path / folder / "purification.json").history == wanted.history
