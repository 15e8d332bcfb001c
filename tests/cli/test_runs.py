"""Scans and purifications as their users run them: answers, exit codes, files, and what a kill leaves."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from unpoison.models.classifier import load_classifier, new_classifier, save_classifier
from unpoison.results import CLEAN, MIXED, SUSPECT, DatasetScan, Evaluation, Purification, SampleScores, Split

Here = Callable[..., Any]
SCAN = ("scan", "dataset", "shapes:300", "--scorer-epochs", "1", "-o", "scan")
FILES = {"run.json", "scores.parquet", "split.parquet", "scan.json", "samples.json", "report.html", "finished.json"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def wait_for(path: Path, running: Any, seconds: float = 200) -> None:
    """Until ``path`` exists; the run must still be going on then."""
    limit = time.monotonic() + seconds
    while not path.exists():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.005)
    assert running.poll() is None


def test_a_scan_as_json(process: Here, tmp_path: Path) -> None:
    result = process(*SCAN, "--json")
    body = json.loads(result.out)
    assert body["schema"] == "unpoison/dataset-scan"
    doubtful = body["estimate"]["odd_labels"] or body["clip_agreement"] < 200 / 12
    assert result.code == (1 if body["estimate"]["poisoned"] else 3 if doubtful else 0)
    assert "Traceback" not in result.err
    assert "\x1b" not in result.out + result.err
    assert "\r" not in result.err
    assert len(result.err.splitlines()) < 20
    assert names(tmp_path / "scan") == FILES | {"steps"}
    scan = DatasetScan.load(tmp_path / "scan" / "scan.json")
    assert scan.samples == body["samples"] == 300
    assert len(SampleScores.load(tmp_path / "scan" / "scores.parquet").ids) == 300


# enough early models that the signal always comes in their middle
LONG_SCAN = (*SCAN, "--scorers", "8")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_cut_short_goes_on(
    how: signal.Signals, process: Here, begin: Here, elsewhere: Here, tmp_path: Path
) -> None:
    running = begin(*LONG_SCAN)
    wait_for(tmp_path / "scan" / "steps" / "scorer-0.safetensors", running)
    running.send_signal(how)
    printed, errors = running.communicate(timeout=100)
    assert printed == ""
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert errors.splitlines()[-1] == "interrupted; the same command continues it"
        assert "Traceback" not in errors
    assert not (tmp_path / "scan" / "finished.json").exists()

    whole = elsewhere(*LONG_SCAN) / "scan"
    again = process(*LONG_SCAN, "--json")
    assert "scorer-0: continued" in again.err
    assert json.loads(again.out)["samples"] == 300
    for name in ("scores.parquet", "split.parquet"):
        assert pq.read_table(tmp_path / "scan" / name).equals(pq.read_table(whole / name), check_metadata=False)


def test_the_same_command_shows_the_result_again(here: Here, scanned: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in scanned.iterdir()}
    words = (*SCAN[:-1], str(scanned))
    first, second = here(*words, "--json"), here(*words)
    assert json.loads(first.out) == json.loads((scanned / "scan.json").read_text())
    assert "300 samples" in second.out
    assert "finished run" in second.err
    assert {path.name: path.stat().st_mtime_ns for path in scanned.iterdir()} == before


def test_other_inputs_are_refused_with_the_difference(here: Here, scanned: Path) -> None:
    result = here(*SCAN[:-1], str(scanned), "--seed", "1", "--json")
    error = json.loads(result.out)["error"]
    assert result.code == 2
    assert error["type"] == "RunFolderMismatchError"
    assert "seed: 0 there, 1 now" in error["message"]


def test_exit_zero(here: Here, poisoned_scan: Path) -> None:
    words = ("scan", "dataset", "shapes:300", "--scorer-epochs", "1", "-o", str(poisoned_scan))
    assert here(*words, "-q").code == 1
    assert here(*words, "-q", "--exit-zero").code == 0
    shown = here(*words, "-q")
    assert shown.err == ""
    assert "Poisoned toward 'star'" in shown.out
    assert "unpoison keep" in shown.out


def test_a_dry_run_writes_nothing(here: Here, tmp_path: Path) -> None:
    result = here("scan", "dataset", "shapes:120", "--dry-run", "--json", "--limit", "100")
    body = json.loads(result.out)
    assert result.code == 0
    assert body["dry_run"] is True
    assert body["folder"] == "runs/scan-shapes-120"
    assert [step["amount"] for step in body["steps"]] == [100, 100, 1500, 300]
    assert all(step["seconds"] > 0 for step in body["steps"])
    assert body["memory"] > 2**20
    assert set(body["files"]) < FILES
    assert names(tmp_path) == set()
    assert "about" in here("scan", "dataset", "shapes:120", "--dry-run").out


def test_purify_writes_a_model_of_the_same_format(here: Here, tmp_path: Path) -> None:
    save_classifier(new_classifier("small-resnet", CLASSES, seed=3), tmp_path / "victim")
    given = {path.name: path.read_bytes() for path in (tmp_path / "victim").iterdir()}
    here("attack", "badnet", "shapes:300", "--rate", "0.1", "-o", "poisoned")
    (tmp_path / "fast.toml").write_text("steps = 3\ncheck_every = 3\nbatch_size = 16\nregions = 'published'\n")
    (tmp_path / "fast.toml").write_text(
        (tmp_path / "fast.toml").read_text() + "[separation]\nscorers = 1\nscorer_epochs = 1\n"
    )
    words = ("purify", "cgd", "victim", "--data", "poisoned/data.parquet", "--config", "fast.toml", "-o", "out",
             "--test", "shapes:200:9", "--manifest", "poisoned/manifest.json")  # fmt: skip
    result = here(*words, "--json")
    body = json.loads(result.out)
    purification = Purification.load(tmp_path / "out" / "purification.json")
    assert result.code == (0 if purification.accepted else 3)
    assert body["schema"] == "unpoison/purification"
    model = "model" if purification.accepted else "model-not-accepted"
    assert names(tmp_path / "out") == (FILES - {"scan.json"}) | {"steps", "purification.json", "card.md", model}
    assert {path.name: path.read_bytes() for path in (tmp_path / "victim").iterdir()} == given
    assert names(tmp_path / "out" / model) == set(given)
    repaired = load_classifier(tmp_path / "out" / model)
    assert repaired.weights().keys() == load_classifier(tmp_path / "victim").weights().keys()
    assert purification.before is not None
    assert purification.after is not None
    assert purification.before.asr is not None
    assert purification.before.model == "victim"
    shown = here(*words).out
    assert "before" in shown
    assert "excess ASR" in shown

    evaluated = here(
        "evaluate", f"out/{model}", "--data", "shapes:200:9", "--manifest", "poisoned/manifest.json", "--json"
    )
    assert json.loads(evaluated.out)["c_acc"]["value"] == purification.after.c_acc.value


def test_a_repair_that_costs_too_much_is_not_accepted(here: Here, tmp_path: Path) -> None:
    save_classifier(new_classifier("small-resnet", CLASSES, seed=3), tmp_path / "victim")
    (tmp_path / "wild.toml").write_text(
        "steps = 20\ncheck_every = 20\nbatch_size = 32\nregions = 'published'\nbeta = 200.0\nlearning_rate = 0.3\n"
        "bound = 1e-9\nheld_out = 0.5\n[separation]\nscorers = 1\nscorer_epochs = 1\n"
    )
    result = here("purify", "cgd", "victim", "--data", "shapes:300", "--config", "wild.toml", "-o", "out", "--json")
    body = json.loads(result.out)
    if "error" in body:  # diverged: also an honest end
        assert result.code == 2
        assert body["error"]["type"] == "DivergedError"
        return
    assert result.code == (0 if body["accepted"] else 3)
    assert (tmp_path / "out" / ("model" if body["accepted"] else "model-not-accepted")).is_dir()


def test_evaluate_writes_only_when_asked(here: Here, tmp_path: Path) -> None:
    save_classifier(new_classifier("small-resnet", CLASSES, seed=3), tmp_path / "victim")
    result = here("evaluate", "victim", "--data", "shapes:200:9", "--json")
    body = json.loads(result.out)
    assert result.code == 0
    assert body["c_acc"]["n"] == 200
    assert body["asr"] is None
    assert names(tmp_path) == {"victim", "cache"}
    stored = here("evaluate", "victim", "--data", "shapes:200:9", "-o", "ev")
    assert "no trigger was tested" in stored.out
    assert names(tmp_path / "ev") == {"run.json", "steps", "evaluation.json", "report.html", "finished.json"}
    assert Evaluation.load(tmp_path / "ev" / "evaluation.json").c_acc.value == body["c_acc"]["value"]


def test_a_weights_file_needs_its_network_and_takes_its_normalization(here: Here, tmp_path: Path) -> None:
    made = new_classifier("small-resnet", CLASSES, seed=3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    save_classifier(made, tmp_path / "victim")
    weights = next(path.name for path in (tmp_path / "victim").iterdir() if path.suffix == ".safetensors")
    (tmp_path / "victim" / weights).rename(tmp_path / "w.safetensors")
    (tmp_path / "whole").mkdir()
    save_classifier(made, tmp_path / "whole")
    refused = here("evaluate", "w.safetensors", "--data", "shapes:200:9", "--json")
    assert "--arch" in json.loads(refused.out)["error"]["hint"]
    words = ("--data", "shapes:200:9", "--arch", "small-resnet", "--json")
    given = ("--mean", "0", "0", "0", "--std", "1", "1", "1")
    accuracy = {
        name: json.loads(here("evaluate", *call).out)["per_class"]
        for name, call in {
            "whole": ("whole", "--data", "shapes:200:9", "--json"),
            "same": ("w.safetensors", *words, *given),
        }.items()
    }
    assert accuracy["same"] == accuracy["whole"]


def test_attack_then_its_files_again(here: Here, tmp_path: Path) -> None:
    words = ("attack", "badnet", "shapes:200", "--rate", "0.1", "--target", "star", "-o", "p", "--json")
    first = here(*words)
    body = json.loads(first.out)
    assert (first.code, body["poisoned"], body["samples"], body["target_name"]) == (0, 20, 200, "star")
    data = (tmp_path / "p" / "data.parquet").read_bytes()
    assert here(*words).out == first.out
    (tmp_path / "p" / "data.parquet").unlink()  # what a kill between the two files leaves
    assert here(*words).out == first.out
    assert (tmp_path / "p" / "data.parquet").read_bytes() == data
    changed = tuple("0.2" if word == "0.1" else word for word in words)
    other = json.loads(here(*changed).out)["error"]
    assert other["type"] == "RunFolderMismatchError"
    assert "rate: 0.1 there, 0.2 now" in other["message"]
    assert names(tmp_path / "p") == {"data.parquet", "manifest.json"}


def test_manifest_only_and_dry_run(here: Here, tmp_path: Path) -> None:
    dry = json.loads(here("attack", "sig", "shapes:200", "--rate", "0.05", "--dry-run", "--json").out)
    assert dry["files"] == ["data.parquet", "manifest.json"]
    assert names(tmp_path) == set()
    here("attack", "sig", "shapes:200", "--rate", "0.05", "--manifest-only", "-o", "m", "--param", "delta=30")
    assert names(tmp_path / "m") == {"manifest.json"}
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["config"]["delta"] == 30


def test_keep_leaves_suspects_out_and_follows_decisions(here: Here, poisoned_scan: Path, tmp_path: Path) -> None:
    split = Split.load(poisoned_scan / "split.parquet")
    wanted = {split.ids[row] for row in np.flatnonzero(np.isin(split.region, (CLEAN, MIXED)))}
    suspects = [split.ids[row] for row in np.flatnonzero(split.region == SUSPECT)]
    body = json.loads(here("keep", str(poisoned_scan), "--json").out)
    table = pq.read_table(tmp_path / "clean.parquet")
    assert set(table["id"].to_pylist()) == wanted
    assert body["kept"] == len(wanted)
    assert body["dropped_suspect"] == len(suspects) == 30

    saved, dropped = suspects[0], next(iter(wanted))
    (tmp_path / "d.json").write_text(
        json.dumps({"schema": "unpoison/decisions", "schema_version": 1, "decisions": {saved: "keep", dropped: "drop"}})
    )
    (tmp_path / "d.csv").write_text(f"id,decision\n{saved},keep\n{dropped},drop\n")
    for file in ("d.json", "d.csv"):
        result = here("keep", str(poisoned_scan), "--decisions", file, "-o", f"{file}.parquet")
        assert result.code == 0
        assert set(pq.read_table(tmp_path / f"{file}.parquet")["id"].to_pylist()) == wanted - {dropped} | {saved}
    refused = here("keep", str(poisoned_scan))
    assert refused.code == 2
    assert "clean.parquet exists" in refused.err


def test_the_clean_copy_opens_as_a_source(here: Here, poisoned_scan: Path, tmp_path: Path) -> None:
    from unpoison.data.sources import open_images

    here("keep", str(poisoned_scan), "-o", "clean.parquet")
    copy, original = open_images(tmp_path / "clean.parquet"), open_images("shapes:300")
    assert copy.class_names == original.class_names
    place = {name: row for row, name in enumerate(original.ids)}
    rows = [place[name] for name in copy.ids[:20]]
    assert copy.raw(range(20)) == original.raw(rows)
    assert copy.labels[:20].tolist() == original.labels[rows].tolist()


def test_keep_refuses_a_source_that_changed(here: Here, poisoned_scan: Path) -> None:
    error = json.loads(here("keep", str(poisoned_scan), "--data", "shapes:300:7", "--json").out)["error"]
    assert error["type"] == "DataError"
    assert "300" not in error["hint"]


def test_report_of_two_runs(here: Here, poisoned_scan: Path, scanned: Path, tmp_path: Path) -> None:
    result = here("report", str(poisoned_scan), str(scanned), "-o", "both.html", "--json")
    assert json.loads(result.out)["file"] == "both.html"
    page = (tmp_path / "both.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "<script src" not in page


def test_doctor(here: Here) -> None:
    body = json.loads(here("doctor", "--json").out)
    checks = {check["what"]: check for check in body["checks"]}
    assert body["ok"] is True
    assert {check["status"] for check in checks.values()} <= {"ok", "warn"}
    assert "torch" in checks["dependencies"]["found"]
    assert "loads" in checks["bundled CLIP"]["found"]


def test_methods(process: Here) -> None:
    result = process("methods", "--json")
    body = json.loads(result.out)
    of_classifiers = ["cgd", "pad-ft", "ft", "ft-sam", "fine-pruning", "nad", "anp", "i-bau", "abl"]
    of_clips = ["par", "ubt", "abl-clip", "cbpt", "rvpt", "linear-probe", "clean-clip", "fine-tuning"]
    assert [entry["name"] for entry in body["defenses"]] == [*of_classifiers, *of_clips]
    shown = process("methods").out
    for paper in ("2507.05113", "2412.00727", "2303.03323"):
        assert f"https://arxiv.org/abs/{paper}" in shown


def test_demo(here: Here, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(
        "train = 400\ntest = 200\nepochs = 12\n[cgd]\nsteps = 4\ncheck_every = 4\nbatch_size = 32\nbound = 100.0\n"
        "[cgd.separation]\nscorers = 1\nscorer_epochs = 1\n"
    )
    result = here("demo", "--config", "small.toml", "-o", "d", "--json")
    body = json.loads(result.out)
    assert result.code == 0
    assert body["before"]["asr"]["n"] > 100
    assert {"poisoned", "victim", "model", "report.html", "card.md", "finished.json"} <= names(tmp_path / "d")
    shown = here("demo", "--config", "small.toml", "-o", "d")
    assert shown.code == 0
    assert "attack success (ASR)" in shown.out
    assert "before" in shown.out
    assert "unpoison evaluate" in shown.out


CLASSES = (
    "checkerboard", "crescent moon", "cross", "diagonal stripes", "disk", "dots", "frame", "horizontal stripes",
    "rings", "star", "triangle", "vertical stripes",
)  # fmt: skip
