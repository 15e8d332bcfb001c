"""What the benchmark of ``scan model`` keeps of a scan, and the figures, thresholds and tables that it makes."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unpoison.detection.anomaly import AnomalyConfig, judge_reach
from unpoison.detection.measured import RECORD, measured_for, say_measured
from unpoison.detection.model_weights import INVERSION
from unpoison.model_results import ClassTrigger, DataVerdict, FileVerdict, ModelScan, Reach, WeightsVerdict

ROOT = Path(__file__).resolve().parents[2]


def row(score: float, word: str, target: str | None, named: str | None) -> dict[str, Any]:
    return {"score": score, "word": word, "target": target, "named": named}


INPUTS = {"search": "s", "seed": 0, "images": "i"}


def test_the_figures(benchmark: ModuleType) -> None:
    figures = sys.modules["scan_model_figures"].figures
    rows = [
        row(9.0, "backdoored", "a", "a"), row(5.0, "suspicious", "a", "b"), row(1.0, "no evidence", "a", "a"),
        row(2.0, "no evidence", None, "a"), row(4.0, "suspicious", None, "a"),
    ]  # fmt: skip
    found = figures(rows)
    assert found["auroc"] == pytest.approx(4 / 6)
    assert found["detection_rate"] == pytest.approx(200 / 3)
    assert found["false_alarm_rate"] == 50
    assert found["target_named_rate"] == 50
    assert figures([])["auroc"] is None
    assert found["intervals"]["detection_rate"] == pytest.approx([20.8, 93.9], abs=0.1)
    assert figures([])["intervals"]["false_alarm_rate"] is None


def options(folder: Path, **more: Any) -> Namespace:
    return Namespace(
        zoo=folder / "zoo", results=folder / "results", summary=folder / "results/scan_model.json", shared=folder,
        roc=folder / "roc.svg", page=folder / "page.md", measured=folder / "measured.json", threads=1,
        **more,
    )  # fmt: skip


@pytest.fixture
def scanned(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were looked at, in turn; a look finds nothing and takes no time."""
    looked: list[str] = []
    file = FileVerdict(word="accepted", reason="", format="safetensors", sha256="0")
    weights = WeightsVerdict(word="no evidence", reason="")

    def look(cell: Any, references: list[Path], *_: Any, **__: Any) -> ModelScan:
        looked.append(cell.name)
        data = DataVerdict(reason="")
        return ModelScan(model="m", kind="classifier", file=file, data=data, weights=weights, seconds=7.0)

    monkeypatch.setattr(benchmark, "look", look)
    for name in ("model", "first", "second"):
        save_file({"a": torch.full((2,), float(len(name)))}, tmp_path / f"{name}.safetensors")
    (tmp_path / "results").mkdir()
    return looked


def test_a_scan_is_repeated_where_anything_of_its_search_is_another(
    benchmark: ModuleType, scanned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scan(*references: str, mode: str = "images") -> int:
        model = tmp_path / "model.safetensors"
        cell = benchmark.Cell(name="m", model=model, kind="classifier", family="clean", half="held-out", world="shapes")
        before = len(scanned)
        benchmark.scan(cell, [tmp_path / f"{name}.safetensors" for name in references], options(tmp_path), mode)
        return len(scanned) - before

    assert [scan(), scan(), scan("first"), scan("first"), scan("second"), scan("first")] == [1, 0, 1, 0, 1, 0]
    stored = json.loads((tmp_path / "results/m.json").read_bytes())
    assert len(stored["inputs"]["references"]) == 1
    assert (stored["seconds"], stored["processor_seconds"] >= 0) == (7.0, True)  # also of one that was kept
    assert [scan("first", mode="made-up"), scan("first", mode="made-up"), scan("first")] == [1, 0, 0]
    assert json.loads((tmp_path / "results/m.made-up.json").read_bytes())["mode"] == "made-up"
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert [scan("first"), scan("first")] == [1, 0]
    now = benchmark.ModelScanConfig()

    def settings(**more: Any) -> None:
        changed = replace(now, weights=replace(now.weights, **more))
        monkeypatch.setattr(benchmark, "ModelScanConfig", lambda: changed)

    settings(anomaly=AnomalyConfig(suspicious=1.0))  # a threshold is judged by, not searched by
    assert scan("first") == 0
    settings(images=128)
    assert [scan("first"), scan("first")] == [1, 0]
    monkeypatch.setattr(benchmark, "search_inputs", lambda config: {"code": "another"})
    assert [scan("first"), scan("first")] == [1, 0]


def test_rows_give_the_words_that_users_get(benchmark: ModuleType) -> None:
    """Of any thresholds, with references and without: what is calibrated is what is said."""
    random = np.random.default_rng(0)
    for _ in range(20):
        classes = [
            ClassTrigger(name=str(place), target=place, form=form, size=float(random.uniform(0.01, 0.1)),
                         success=float(random.uniform(0, 100)), index=0.0)
            for form in ("square", "patch", "additive") for place in range(6)
        ]  # fmt: skip
        clean = tuple(Reach(form=entry.form, size=float(random.uniform(0.01, 0.1)), success=90.0) for entry in classes)
        config = AnomalyConfig(
            suspicious=float(random.uniform(0, 2)), backdoored=float(random.uniform(2, 4)),
            success=float(random.uniform(50, 100)),
        )  # fmt: skip
        found = [Reach(form=entry.form, size=entry.size, success=entry.success) for entry in classes]
        direct = judge_reach(found, clean, config)
        said = WeightsVerdict(
            word=direct.word, reason="", classes=tuple(random.permutation(np.array(classes, dtype=object))),
            reference_classes=clean, covered=100.0,
        )  # fmt: skip
        file, cell = (
            FileVerdict(word="accepted", reason="", format="", sha256=""),
            benchmark.Cell(name="m", model="m", kind="classifier", family="clean", half="held-out"),
        )
        scan = ModelScan(model="m", kind="classifier", file=file, data=DataVerdict(reason=""), weights=said)
        again = benchmark.judged(benchmark.row_of(cell, "images", {}, scan), config)
        assert (again["word"], again["score"]) == (direct.word, direct.score)
        assert direct.candidate is not None
        assert again["named"] == classes[direct.candidate].name


def test_mixed_inputs_are_refused(benchmark: ModuleType) -> None:
    one = {"name": "a", "mode": "images", "references": 2, "inputs": INPUTS}
    benchmark.check_alike([one, one | {"inputs": INPUTS | {"images": "of the other world"}}])
    for other in ({"inputs": INPUTS | {"search": "t"}}, {"inputs": INPUTS | {"seed": 1}}, {"references": 0}):
        with pytest.raises(ValueError, match="mixed"):
            benchmark.check_alike([one, one | other])
    with pytest.raises(ValueError, match="another version"):
        benchmark.check_alike([one, {"name": "b", "references": 0}])


def test_time_is_told_by_the_clock(
    benchmark: ModuleType, scanned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "zoo", lambda _: [
        benchmark.Cell(name=name, model="m", kind="clip", family=name, half="held-out", target=target)
        for name, target in (("clean", None), ("planted", "horse"), ("other", "horse"))
    ])  # fmt: skip
    benchmark.measure_time(options(tmp_path))
    torch.set_num_threads(threads)
    body = json.loads((tmp_path / "results/scan_model_time.json").read_bytes())
    assert list(body["models"]) == scanned == ["published-victim", "published-clean", "tiny-clip", "planted"]
    assert all(set(row) == {"seconds", "processor_seconds"} for row in body["models"].values())
    assert body["threads"] == 1


def calibration_row(index: float, target: str | None, *, success: float = 90.0, half: str = "calibration") -> Any:
    """Ten classes; the log size of one lies under the others' by so many deviations of 0.25."""
    sizes = [0.1 * float(np.exp(-0.25 * index)), *[0.1] * 9]
    classes = [[f"c{place}", "patch", size, success] for place, size in enumerate(sizes)]
    return {
        "name": f"{index}", "half": half, "mode": "images", "target": target, "classes": classes,
        "reference_classes": [], "references": 0, "covered": 100.0, "made_up": False, "inputs": INPUTS,
        "waves": [],
    }  # fmt: skip


def test_thresholds_come_from_the_calibration_half_alone(benchmark: ModuleType) -> None:
    now = AnomalyConfig()
    rows = [calibration_row(index, None) for index in (0.5, 1.0, 1.5)]
    rows += [calibration_row(index, "a") for index in (2.5, 4.0, 6.0)]
    chosen = benchmark.choose_thresholds(rows, now)
    assert chosen["chosen"] == pytest.approx(asdict(replace(now, backdoored=2.0, suspicious=2.0)))
    assert chosen["auroc"]["chosen"] == 1.0
    assert (chosen["at_chosen"]["detection_rate"], chosen["at_chosen"]["false_alarm_rate"]) == (100.0, 0.0)
    assert "5 %" in chosen["rule"]
    with pytest.raises(ValueError, match="calibration half"):
        benchmark.choose_thresholds([*rows, calibration_row(9.0, None, half="held-out")], now)
    assert benchmark.choose_thresholds(rows[:3], now)["chosen"] is None


def test_a_wave_decides_where_it_is_further_out_than_the_small_changes(benchmark: ModuleType) -> None:
    now = AnomalyConfig()
    wave = {"name": "c4", "target": 4, "lead": 4.0, "fit": 1.1, "size": 0.1, "success": 97.0}
    row = calibration_row(1.0, "c4") | {"waves": [wave]}
    found = benchmark.judged(row, now)
    assert (found["word"], found["named"], found["index"]) == ("backdoored", "c4", None)
    assert found["score"] == pytest.approx(1.1 * now.backdoored)
    clear = calibration_row(9.0, "c0") | {"waves": [wave]}
    assert benchmark.judged(clear, now)["named"] == "c0"


def test_settings_that_tell_them_apart_are_chosen(benchmark: ModuleType) -> None:
    rows = [calibration_row(5.0, None, success=65.0), calibration_row(4.5, "a"), calibration_row(5.0, "a")]
    assert benchmark.choose_thresholds(rows, AnomalyConfig(success=60.0))["chosen"]["success"] > 65.0


def test_one_clean_model_of_twenty_may_be_suspicious(benchmark: ModuleType) -> None:
    rows = [calibration_row(index / 10, None) for index in range(1, 20)] + [calibration_row(3.0, None)]
    found = benchmark.choose_thresholds([*rows, calibration_row(5.0, "a")], AnomalyConfig())["chosen"]
    assert 1.9 < found["suspicious"] < 3.0 < found["backdoored"] < 5.0


def test_calibrate_does_not_read_the_other_half(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    other = calibration_row(9.0, None, half="held-out") | {"inputs": {}}
    for place, row in enumerate([calibration_row(1.0, None), calibration_row(4.0, "a"), other]):
        (tmp_path / f"results/{place}.json").write_text(json.dumps(row))
    found = options(tmp_path)
    found.summary = tmp_path / "scan_model.json"
    benchmark.calibrate(found)
    kept = json.loads((tmp_path / "scan_model_thresholds.json").read_bytes())
    assert (kept["clean"], kept["backdoored"], kept["package"]["backdoored"]) == (1, 1, AnomalyConfig().backdoored)


def test_the_table_and_the_roc_are_written_together(
    benchmark: ModuleType, zoo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = options(tmp_path)
    found.summary = tmp_path / "scan_model.json"
    found.results.mkdir()
    page = (ROOT / "docs/scan_model.md").read_text(encoding="utf-8")
    assert page.count("<!-- zoo: written") == page.count("<!-- end of zoo -->") == 1
    assert "scan_model_roc.svg" not in page or (ROOT / "docs/scan_model_roc.svg").exists()
    found.page.write_text(page)
    benchmark.table(found)
    assert found.page.read_text() == page  # nothing was scanned
    assert not found.roc.exists()
    held_out = [entry for entry in zoo.plan_zoo() if entry.half == "held-out"]
    body: dict[str, Any] = {}
    for mode in ("images", "made-up"):
        for entry in held_out[:-1]:
            bad = entry.family != zoo.CLEAN
            hit = bad and entry.family != "wanet"
            body = row(5.0 if hit else 1.0, "backdoored" if hit else "no evidence", "a" if bad else None, "a") | {
                "name": entry.name, "family": entry.family, "half": entry.half, "kind": entry.kind, "references": 2,
                "mode": mode, "inputs": INPUTS | {"images": mode}, "classes": [],
            }  # fmt: skip
            (found.results / f"{entry.name}.{mode}.json").write_text(json.dumps(body))
            (found.results / "of-no-plan.json").write_text(
                json.dumps(body | {"name": "of-no-plan", "word": "backdoored"})
            )
    refused = found.zoo / "weak"
    refused.mkdir(parents=True)
    (refused / "zoo.json").write_text(json.dumps(asdict(held_out[-1]) | {"accepted": False}))
    benchmark.table(found)
    written = found.page.read_text()
    badnet = sum(entry.family == "badnet" for entry in held_out[:-1])
    assert f"| badnet | {badnet} | 100 (" in written
    assert "Weak on: wanet (" in written
    assert f"{len(held_out)} models planned, 1 refused as too weak ({held_out[-1].family} 1)" in written
    assert f"- Calibration: {len(zoo.plan_zoo()) - len(held_out)} models planned, 0 refused as too weak, 0 scanned" in (
        written
    )
    assert "**Only 0 of" in written
    assert "| 2 references | " in written
    assert "| made-up | " in written
    assert f"![ROC of the held-out half]({found.roc.name})" in written
    assert found.roc.exists()
    assert "has not been made" not in written
    summary = json.loads(found.summary.read_bytes())
    assert summary["held-out"]["clean"] == sum(entry.family == zoo.CLEAN for entry in held_out[:-1])
    assert summary["held-out"]["intervals"]["false_alarm_rate"][0] == 0
    assert summary["seconds_10_classes"] is None
    record = json.loads(found.measured.read_bytes())
    assert {(entry["kind"], entry["made_up"]) for entry in record} >= {("classifier", False), ("CLIP", True)}
    settings = benchmark.ModelScanConfig().weights
    told = measured_for("classifier", INVERSION, settings, made_up=False, references=True, record=found.measured)
    assert told is not None
    assert told.weak == ("wanet",)
    assert "0 were called suspicious" in say_measured(told)
    other = replace(settings, anomaly=AnomalyConfig(suspicious=1.0))
    assert measured_for("classifier", INVERSION, other, made_up=False, references=True, record=found.measured) is None
    (tmp_path / "scan_model_time.json").write_text(
        json.dumps({"models": {"a": {"seconds": 70.0, "processor_seconds": 120.0}}})
    )
    benchmark.table(found)
    assert json.loads(found.summary.read_bytes())["seconds_10_classes"] == 70.0
    (found.results / "mixed.json").write_text(json.dumps(body | {"inputs": INPUTS | {"search": "another"}}))
    with pytest.raises(SystemExit, match="mixed"):
        benchmark.table(found)


def test_the_families_that_were_missed_are_said_to_users() -> None:
    """The record that ships, where there is one, holds the weak families of the kept figures."""
    summary = json.loads((ROOT / "benchmarks/results/scan_model.json").read_bytes())
    told = {
        family for entry in (json.loads(RECORD.read_bytes()) if RECORD.exists() else []) for family in entry["weak"]
    }
    assert set(summary["weak_families"]) <= told
