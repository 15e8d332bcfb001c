"""PAD-FT, the classics and the classic detectors as their users run them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unpoison.models.checkpoints import hash_weights
from unpoison.models.classifier import load_classifier, new_classifier, save_classifier
from unpoison.results import CLEAN, SUSPECT, DatasetScan, Purification, SampleScores, Split

Here = Callable[..., Any]
DATA = ("--data", "shapes:240")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    from unpoison.data.sources import open_images

    names = open_images("shapes:240").class_names
    save_classifier(new_classifier("small-resnet", names), tmp_path / "victim")
    return tmp_path / "victim"


@pytest.fixture
def scanned(tmp_path: Path) -> Path:
    """The files of a scan of the set, with every tenth sample suspect."""
    from unpoison.data.sources import open_images

    source = open_images("shapes:240")
    common: dict[str, Any] = {"method": "cgd", "ids": list(source.ids), "labels": source.labels,
                              "class_names": source.class_names}  # fmt: skip
    suspect = np.arange(240) % 10 == 0
    (tmp_path / "scan").mkdir()
    Split(**common, region=np.where(suspect, SUSPECT, CLEAN).astype(np.int8)).save(tmp_path / "scan/split.parquet")
    random = np.random.default_rng(0).random(240)
    axes = {"clip_rank": random, "early_rank": random[::-1].copy()}
    SampleScores(**common, axes=axes, primary="clip_rank").save(tmp_path / "scan/scores.parquet")
    return tmp_path / "scan"


def test_pad_ft_with_the_scores_of_a_scan(process: Here, victim: Path, scanned: Path, tmp_path: Path) -> None:
    words = ("purify", "pad-ft", "victim", *DATA, "--scores", "scan", "--per-class", "6", "--test", "shapes:60:1",
             "-o", "out")  # fmt: skip
    before = hash_weights(load_classifier(victim).weights())
    result = process(*words, "--bound", "100")
    assert result.code == 0, result.err
    assert "Accepted." in result.out
    assert "percent of the parameters free to change" in " ".join(result.out.split())
    assert "labels look shuffled" in " ".join(result.out.split())  # this victim was never trained
    assert "Traceback" not in result.err
    assert hash_weights(load_classifier(victim).weights()) == before
    repaired = load_classifier(tmp_path / "out/model")
    assert len(repaired.bounds) == 7
    assert "clipped activations" in (tmp_path / "out/card.md").read_text()
    again = process(*words, "--bound", "100", "--json")
    assert again.code == 0
    body = json.loads(again.out)
    assert body["method"] == "pad-ft"
    assert body["clean_count"] == 72
    assert Purification.load(tmp_path / "out/purification.json").changed_share == body["changed_share"]


def test_the_papers_rule_warns(process: Here, victim: Path) -> None:
    result = process("purify", "pad-ft", "victim", *DATA, "--paper", "--per-class", "6", "--bound", "100", "-o", "out")
    assert result.code == 0, result.err
    assert "chosen by the model's own losses alone" in " ".join(result.out.split())


def test_a_classic_goes_on_after_a_kill(
    process: Here, kill_once: Here, elsewhere: Here, victim: Path, scanned: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("steps = 60\ncheck_every = 5\nbatch_size = 16\nbound = 100.0\nheld_out = 0.2\n")
    words = ("purify", "ft", "victim", *DATA, "--split-from", str(scanned), "--config", str(settings), "-o")
    kill_once("cut/steps/ft-0.1-00010.safetensors", *words, "cut")
    assert not (tmp_path / "cut/finished.json").exists()
    for folder in ("cut", "whole"):
        result = process(*words, folder)
        assert result.code == 0, result.err
    cut, whole = (load_classifier(tmp_path / folder / "model") for folder in ("cut", "whole"))
    assert hash_weights(cut.weights()) == hash_weights(whole.weights())


@pytest.mark.parametrize("verb", ["pad-ft", "ft", "ft-sam", "fine-pruning", "nad", "anp", "i-bau", "abl"])
def test_a_dry_run_writes_nothing(here: Here, victim: Path, tmp_path: Path, verb: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = here("purify", verb, "victim", *DATA, "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["dry_run"]
    again = ", one attempt of at most 4" if verb in ("ft", "ft-sam", "fine-pruning", "nad") else ""
    assert plan["steps"][-1]["what"] == f"repair the model{again}"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == before


@pytest.mark.parametrize("method", ["activation-clustering", "spectral-signatures", "strip", "ibd-psc"])
def test_a_scan_with_a_detector(here: Here, victim: Path, tmp_path: Path, method: str) -> None:
    result = here("scan", "dataset", "shapes:240", "--method", method, "--model", "victim", "-o", "scan-d")
    assert result.code == 3, result.err
    assert "Inconclusive: 240 samples were ranked" in " ".join(result.out.split())
    scan = DatasetScan.load(tmp_path / "scan-d/scan.json")
    assert (scan.method, scan.clip) == (method, None)
    page = (tmp_path / "scan-d/report.html").read_text()
    assert "this method ranks samples by suspicion" in page
    assert "CLIP agrees" not in page
    assert here("scan", "dataset", "shapes:240", "--method", method, "--model", "victim", "-o", "scan-d",
                "--exit-zero", "--json").code == 0  # fmt: skip


def test_a_detector_trains_its_own_network(here: Here, tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text("epochs = 1\n")
    words = ("scan", "dataset", "shapes:240", "--method", "spectral-signatures", "--assumed-rate", "0.1")
    plan = json.loads(here(*words, "--dry-run", "--json").out)
    assert any("train a network, 15 epochs" in step["what"] for step in plan["steps"])
    result = here(*words, "--config", "quick.toml", "-o", "out", "--json")
    assert result.code == 3, result.err
    assert json.loads(result.out)["flagged"] == 36


def test_what_does_not_fit_is_said(here: Here, victim: Path, scanned: Path, tmp_path: Path) -> None:
    result = here("scan", "dataset", "shapes:60", "--model", "victim")
    assert result.code == 2
    assert "not for cgd" in result.err
    result = here("purify", "ft", "victim", "--data", "shapes:120", "--split-from", str(scanned), "-o", "x")
    assert result.code == 2
    assert "another set" in result.err
    result = here("purify", "pad-ft", "victim", *DATA, "--scores", str(tmp_path / "nothing"), "-o", "y")
    assert result.code == 2
    assert "hint" in result.err
