"""PAD-FT, the classics and the classic detectors as their users run them."""

import json
from collections.abc import Callable
from dataclasses import replace
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


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that knows the labels of the set, as nothing else is repaired."""
    from unpoison.data.pixels import load_pixels
    from unpoison.data.sources import open_images
    from unpoison.runs import Run, Silent
    from unpoison.training import train_classifier

    source = open_images("shapes:240")
    pixels = load_pixels(source, 32, cache=None, progress=Silent())
    fresh = new_classifier("small-resnet", source.class_names)
    trained = train_classifier(fresh, pixels, source.labels, run=Run(), epochs=6, batch_size=32, augment=False)
    folder = tmp_path_factory.mktemp("learnt") / "victim"
    save_classifier(trained, folder)
    return folder


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


def test_pad_ft_with_the_scores_of_a_scan(process: Here, learnt: Path, scanned: Path, tmp_path: Path) -> None:
    from unpoison.attacks.poison import plan_poisoning
    from unpoison.data.sources import open_images

    poisoning = plan_poisoning(open_images("shapes:240"), "badnet", rate=0.3, target=0)
    poisoning.save(tmp_path / "train.json")
    words = ("purify", "pad-ft", str(learnt), *DATA, "--scores", "scan", "--per-class", "6", "--test", "shapes:60:1",
             "--train-manifest", "train.json", "-o", "out")  # fmt: skip
    before = hash_weights(load_classifier(learnt).weights())
    result = process(*words, "--bound", "100")
    assert result.code == 0, result.err
    said = " ".join(result.out.split())
    assert "Accepted." in said
    assert "percent of the parameters free to change" in said
    assert "No label was unlearnt" in said
    assert "Purity of the trusted samples, by the manifest of the training set" in said
    assert "Traceback" not in result.err
    assert hash_weights(load_classifier(learnt).weights()) == before
    repaired = load_classifier(tmp_path / "out/model")
    assert len(repaired.bounds) == 7
    assert "clipped activations" in (tmp_path / "out/card.md").read_text()
    page = (tmp_path / "out/report.html").read_text()
    assert "Purity of the trusted samples" in page
    assert "No label was unlearnt" in page
    again = process(*words, "--bound", "100", "--json")
    assert again.code == 0
    body = json.loads(again.out)
    assert body["method"] == "pad-ft"
    assert body["clean_count"] == 72
    assert body["used"] == {"clip.rule": "quantile", "unlearn": "0"}
    split = Split.load(tmp_path / "out/split.parquet")
    pure = ~np.isin(split.ids, poisoning.ids)[split.clean]
    of_label = {name: pure[split.labels[split.clean] == label] for label, name in enumerate(split.class_names)}
    assert body["purity"] == {name: pytest.approx(100 * kept.mean()) for name, kept in of_label.items()}
    assert min(body["purity"].values()) < 100
    assert Purification.load(tmp_path / "out/purification.json").changed_share == body["changed_share"]


def test_a_manifest_of_another_set_is_refused(here: Here, learnt: Path, scanned: Path, tmp_path: Path) -> None:
    from unpoison.attacks.poison import plan_poisoning
    from unpoison.data.sources import open_images

    manifest = plan_poisoning(open_images("shapes:240"), "badnet", rate=0.1, target=0)
    replace(manifest, ids=tuple(f"x{name}" for name in manifest.ids)).save(tmp_path / "other.json")
    result = here("purify", "pad-ft", str(learnt), *DATA, "--scores", "scan", "--per-class", "6",
                  "--train-manifest", "other.json", "-o", "out")  # fmt: skip
    assert result.code == 2
    assert "names no sample of this set" in " ".join(result.err.split())


def test_a_model_that_does_not_know_the_labels_is_not_accepted(
    here: Here, victim: Path, scanned: Path, tmp_path: Path
) -> None:
    result = here("purify", "pad-ft", "victim", *DATA, "--scores", "scan", "--per-class", "6", "--bound", "100",
                  "--test", "shapes:60:1", "-o", "out")  # fmt: skip
    assert result.code == 3, result.err
    assert "labels look shuffled" in " ".join(result.out.split())
    assert "hardly better than chance" in " ".join(result.out.split())
    found = Purification.load(tmp_path / "out/purification.json")
    assert found.after is not None
    assert found.after.model == "out/model-not-accepted"
    assert (tmp_path / found.after.model).is_dir()


def test_a_scan_with_another_order_of_classes_is_refused(
    here: Here, learnt: Path, scanned: Path, tmp_path: Path
) -> None:
    names = load_classifier(learnt).class_names
    for kind, name in ((Split, "split.parquet"), (SampleScores, "scores.parquet")):
        found = kind.load(tmp_path / "scan" / name)
        labels = len(names) - 1 - found.labels
        replace(found, class_names=names[::-1], labels=labels).save(tmp_path / "scan" / name)
    for words in (("ft", "--split-from"), ("pad-ft", "--scores")):
        result = here("purify", words[0], str(learnt), *DATA, words[1], "scan", "-o", f"out-{words[0]}")
        assert result.code == 2
        assert "another list of classes" in " ".join(result.err.split())


def test_the_papers_rule_warns(process: Here, learnt: Path) -> None:
    result = process(
        "purify", "pad-ft", str(learnt), *DATA, "--paper", "--per-class", "6", "--bound", "100", "-o", "out"
    )
    assert result.code == 0, result.err
    assert "chosen by the model's own losses alone" in " ".join(result.out.split())


def test_a_classic_goes_on_after_a_kill(
    process: Here, kill_once: Here, elsewhere: Here, learnt: Path, scanned: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("steps = 60\ncheck_every = 5\nbatch_size = 16\nbound = 100.0\nheld_out = 0.2\n")
    words = ("purify", "ft", str(learnt), *DATA, "--split-from", str(scanned), "--config", str(settings), "-o")
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


def test_a_weights_file_is_scanned_with_its_own_normalisation(here: Here, victim: Path, tmp_path: Path) -> None:
    words = ("scan", "dataset", "shapes:240", "--method", "spectral-signatures", "--model",
             str(victim / "model.safetensors"))  # fmt: skip
    for folder, more in (("usual", ()), ("same", ("--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25")),
                         ("plain", ("--mean", "0", "0", "0", "--std", "1", "1", "1"))):  # fmt: skip
        result = here(*words, *more, "-o", folder)
        assert result.code == 3, result.err
    usual, same, plain = (
        SampleScores.load(tmp_path / folder / "scores.parquet").suspicion for folder in ("usual", "same", "plain")
    )
    assert np.array_equal(usual, same)
    assert not np.allclose(usual, plain)
    result = here("scan", "dataset", "shapes:240", "--method", "strip", "--mean", "0", "0", "0", "-o", "x")
    assert result.code == 2
    assert "--model" in result.err


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
