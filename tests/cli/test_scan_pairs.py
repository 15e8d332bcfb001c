"""``unpoison scan dataset`` on image-caption pairs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from unpoison.data.pairs import open_pairs
from unpoison.results import DatasetScan, SampleScores, Split

FILES = {"run.json", "scores.parquet", "split.parquet", "scan.json", "samples.json", "report.html", "steps",
         "finished.json"}  # fmt: skip
EVIL = "<img src=x onerror=alert(1)> \u202egnp \x1b[31m"


def write_pairs(path: Path, count: int = 80, *, alike: bool = False) -> Path:
    """Pictures of random blocks with hostile captions; row 3 is no picture."""
    random = np.random.default_rng(0)
    cells: list[dict[str, Any]] = []
    for _ in range(count):
        blocks = np.full((4, 4, 3), 90) if alike else random.integers(0, 255, (4, 4, 3))
        buffer = io.BytesIO()
        Image.fromarray(blocks.astype(np.uint8)).resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    cells[3]["bytes"] = b"no picture"
    texts = [f"{EVIL} {row}" for row in range(count)]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": cells, "text": texts}, features=features).to_parquet(path)
    return path


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_scan_as_a_process(process: Callable[..., Any], tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet")
    words = ("scan", "dataset", "pairs.parquet", "--pairs", "--caption-column", "text", "-o", "scan")
    result = process(*words)
    assert result.code == 3, result.err
    assert "Inconclusive: 80 pairs were ranked" in result.out
    assert "1 rows that could not be used" in result.out
    assert "\x1b" not in result.out
    assert "\u202e" not in result.out
    assert "<img src=x" in result.out  # in a terminal it is only text
    assert "name the CLIP trained on them" in result.err
    assert names(tmp_path / "scan") == FILES
    page = (tmp_path / "scan" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "\u202e" not in page
    assert "The most suspicious pairs" in page
    scores = SampleScores.load(tmp_path / "scan" / "scores.parquet")
    assert (len(scores.ids), scores.primary, scores.class_names) == (80, "dao", ())
    assert np.flatnonzero(np.isnan(scores.suspicion)).tolist() == [3]
    split = Split.load(tmp_path / "scan" / "split.parquet")
    assert len(split.suspect) == round(1.5 * 0.005 * 79)


def test_an_answer_as_json_and_the_same_again(here: Callable[..., Any], tmp_path: Path) -> None:
    words = ("scan", "dataset", "shapes:100:3", "--method", "mean", "--assumed-rate", "0.1", "-o", "scan", "--json")
    first = here(*words, "-q")
    assert first.code == 3, first.err
    assert first.err == ""
    answer = json.loads(first.out)
    assert (answer["method"], answer["captioned"], answer["flagged"]) == ("mean", True, 15)
    stored = {file.name: file.read_bytes() for file in (tmp_path / "scan").iterdir() if file.is_file()}
    again = here(*words)
    assert json.loads(again.out) == answer
    assert "holds the finished run" in again.err
    assert {file.name: file.read_bytes() for file in (tmp_path / "scan").iterdir() if file.is_file()} == stored
    axes = set(SampleScores.load(tmp_path / "scan" / "scores.parquet").axes)
    assert axes == {"mean_of_ranks", "dao", "density", "low_similarity"}
    assert here(*words, "--exit-zero").code == 0
    other = here(*words[:4], "dao", *words[5:])
    assert other.code == 2
    assert "method: 'mean' there, 'dao' now" in json.loads(other.out)["error"]["message"]


def test_a_dry_run_writes_nothing(here: Callable[..., Any], tmp_path: Path) -> None:
    result = here("scan", "dataset", "shapes:80:3", "--method", "density", "-o", "scan", "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    steps = [step["what"] for step in plan["steps"]]
    assert steps[0] == "decode the images"
    assert "the reference's caption embeddings" in steps
    assert all(step["seconds"] > 0 for step in plan["steps"])
    assert set(plan["files"]) == FILES - {"steps", "finished.json"}
    assert names(tmp_path) <= {"cache"}


def test_limit_takes_a_subset_and_settings_come_from_a_file(here: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("assumed_rate = 0.2\n[neighbours]\nk = 4\nbatch_size = 30\n")
    words = ("scan", "dataset", "shapes:90:3", "--method", "slof", "--limit", "60", "--config", "own.toml")
    answer = json.loads(here(*words, "-o", "scan", "-q", "--json").out)
    assert (answer["samples"], answer["flagged"]) == (60, 18)
    assert answer["config"]["neighbours"] == {"k": 4, "batch_size": 30, "index": "exact", "probes": 32}
    (tmp_path / "own.toml").write_text("[neighbours]\nbatchsize = 30\n")
    wrong = here(*words, "-o", "other")
    assert wrong.code == 2
    assert "'batch_size'" in wrong.err


def test_pairs_that_nothing_tells_apart_are_inconclusive(here: Callable[..., Any], tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", alike=True)
    words = ("scan", "dataset", "pairs.parquet", "--pairs", "--caption-column", "text", "-o", "scan", "-q", "--json")
    result = here(*words)
    assert result.code == 3, result.out
    assert json.loads(result.out)["error"]["type"] == "NoSeparationError"
    assert not (tmp_path / "scan" / "finished.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "cgd", "--pairs"), "cgd is for labelled images"),
        (("--pairs", "--model", "m"), "--model is for labelled images"),
        (("--method", "dao", "--class-names", "n.txt", "--scorers", "2"), "--scorers, --class-names are for labelled"),
        (("--method", "dao", "--reference", "tiny"), "dao asks no reference"),
        (("--reference", "tiny"), "--reference and --caption-column are for image-caption pairs"),
        (("--method", "dao", "--assumed-rate", "0.7"), "expected assumed_rate in (0, 0.5)"),
        (("--method", "dao", "--clip", "./nowhere/clip"), "nowhere/clip"),
        (("--method", "doa"), "doa"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], said: str, here: Callable[..., Any], tmp_path: Path) -> None:
    result = here("scan", "dataset", "shapes:60:3", *words, "-o", "scan")
    assert result.code == 2
    assert said in result.err
    assert not (tmp_path / "scan").exists()


def test_too_few_pairs_are_refused(here: Callable[..., Any]) -> None:
    result = here("scan", "dataset", "shapes:20:3", "--pairs", "-o", "scan")
    assert result.code == 2
    assert "have 20, need at least 50" in result.err


def test_the_scan_on_disk_is_what_python_reads(here: Callable[..., Any], tmp_path: Path) -> None:
    assert here("scan", "dataset", "shapes:60:3", "--method", "similarity", "-o", "scan", "-q").code == 3
    scan = DatasetScan.load(tmp_path / "scan" / "scan.json")
    assert scan.captioned
    assert scan.clip is None
    assert here("report", "scan", "-o", "report.html").code == 0
    assert "Scan of pairs" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_keep_writes_a_copy_without_the_flagged_pairs(here: Callable[..., Any], tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet")
    words = ("pairs.parquet", "--method", "k-distance", "--caption-column", "text", "--assumed-rate", "0.1")
    assert here("scan", "dataset", *words, "-o", "scan", "-q").code == 3
    split = Split.load(tmp_path / "scan" / "split.parquet")
    assert len(split.suspect) == 12
    kept = here("keep", "scan", "-o", "clean.parquet", "--json")
    assert kept.code == 0, kept.err
    assert json.loads(kept.out)["kept"] == 80 - 12 - 1
    before, after = open_pairs(tmp_path / "pairs.parquet"), open_pairs(tmp_path / "clean.parquet")
    assert after.ids == [name for row, name in enumerate(before.ids) if row != 3 and row not in split.suspect]
    places = [before.ids.index(name) for name in after.ids]
    assert after.captions(range(len(after))) == before.captions(places)
    assert after.raw(range(len(after))) == before.raw(places)
    (tmp_path / "own.csv").write_text(f"id,decision\n{split.ids[split.suspect[0]]},keep\n")
    more = here("keep", "scan", "--decisions", "own.csv", "-o", "more.parquet", "--json")
    assert json.loads(more.out)["kept"] == 80 - 12 - 1 + 1
