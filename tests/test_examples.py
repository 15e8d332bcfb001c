"""The example scripts, run as a reader would run them, on a tiny set."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from unpoison import load_classifier, new_classifier, open_images, save_classifier
from unpoison.data.pixels import load_pixels
from unpoison.results import DatasetScan, Purification
from unpoison.runs import Run, Silent
from unpoison.training import train_classifier

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SOURCE = "shapes:60"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_scan_folder(run, tmp_path: Path) -> None:
    answer = run("scan_folder.py", SOURCE, str(tmp_path / "scan"))
    scan = DatasetScan.load(tmp_path / "scan" / "scan.json")
    assert scan.estimate.reason in answer
    assert "<html" in (tmp_path / "scan" / "report.html").read_text(encoding="utf-8")[:200]


def test_repair_classifier(run, tmp_path: Path) -> None:
    source, names = open_images(SOURCE), open_images(SOURCE).class_names
    pixels = load_pixels(source, 32, cache=None, progress=Silent())
    fresh = new_classifier("small-resnet", names)
    victim = train_classifier(fresh, pixels, source.labels, run=Run(), epochs=8, batch_size=16, augment=False)
    save_classifier(victim, tmp_path / "victim")
    run("repair_classifier.py", str(tmp_path / "victim"), SOURCE, str(tmp_path / "repaired"))
    assert Purification.load(tmp_path / "repaired" / "purification.json").accepted
    assert load_classifier(tmp_path / "repaired").class_names == names


def test_clean_copy(run, tmp_path: Path) -> None:
    answer = run("clean_copy.py", SOURCE, str(tmp_path / "clean.parquet"))
    kept = len(open_images(tmp_path / "clean.parquet"))
    assert answer.startswith(f"{kept} of 60 samples")


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f'"{script.name}"' in tested
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 30
