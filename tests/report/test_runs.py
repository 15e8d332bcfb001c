"""Run folders are read as they are, and without trust in the example images."""

import base64
import io
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from unpoison.errors import ResultError, SchemaVersionError
from unpoison.report.runs import MAX_SAMPLES, THUMBNAIL_SIZE, read_run


def sample(**changes: object) -> dict[str, object]:
    sink = io.BytesIO()
    Image.new("RGB", (200, 100), "red").save(sink, format="PNG")
    return {
        "id": "a:0",
        "label": "cat",
        "clip_label": "dog",
        "region": "suspect",
        "thumbnail": base64.b64encode(sink.getvalue()).decode(),
        "clip_rank": 0.9,
        "early_rank": None,
    } | changes


def test_a_scan_folder(tmp_path: Path, planted: ModuleType) -> None:
    run = read_run(planted.write_scan(tmp_path / "scan"))
    assert run.name == "scan"
    assert run.scan is not None
    assert run.scan.estimate.poisoned
    assert run.purification is None
    assert run.scores is not None
    assert run.split is not None
    assert len(run.samples) == 60
    assert run.inputs["seed"] == 0
    assert run.notes == ()
    assert run.finished_at is not None


def test_a_lone_evaluation_file(tmp_path: Path, planted: ModuleType) -> None:
    planted.evaluation(before=True).save(tmp_path / "test.json")
    assert read_run(tmp_path / "test.json").evaluations["test"].c_acc.value == 74.5


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "other/thing"}', "\x00"])
def test_a_file_that_is_no_result(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ResultError) as caught:
        read_run(tmp_path / "x.json")
    assert "x.json" in caught.value.message
    assert caught.value.hint


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no such run folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(ResultError, match=r"expected scan\.json") as caught:
        read_run(tmp_path)
    assert "continues" in caught.value.hint


def test_another_version_is_refused(tmp_path: Path, planted: ModuleType) -> None:
    folder = planted.write_scan(tmp_path / "scan")
    body = json.loads((folder / "scan.json").read_text())
    (folder / "scan.json").write_text(json.dumps(body | {"schema_version": 99}))
    with pytest.raises(SchemaVersionError):
        read_run(folder)


def test_thumbnails_are_drawn_anew(tmp_path: Path, planted: ModuleType) -> None:
    folder = planted.write_scan(tmp_path / "scan", samples=False)
    clean = base64.b64decode(str(sample()["thumbnail"]))
    laden = base64.b64encode(clean + b"<script>alert(1)</script>").decode()
    (folder / "samples.json").write_text(json.dumps([sample(thumbnail=laden)]))
    (read,) = read_run(folder).samples
    assert b"script" not in read.thumbnail
    with Image.open(io.BytesIO(read.thumbnail)) as image:
        assert image.format == "PNG"
        assert max(image.size) == THUMBNAIL_SIZE


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (sample(thumbnail="not base64!"), "base64"),
        (sample(thumbnail=base64.b64encode(b"<svg onload='alert(1)'/>").decode()), "no picture"),
        (sample(thumbnail="A" * 300_000), "too large"),
        (sample(region="<b>"), "unknown region"),
        (sample(clip_rank="high"), "clip_rank"),
        ({"label": "cat"}, "id"),
        ("text", "object"),
    ],
)
def test_a_bad_sample_is_left_out_and_told(tmp_path: Path, planted: ModuleType, row: object, reason: str) -> None:
    folder = planted.write_scan(tmp_path / "scan", samples=False)
    (folder / "samples.json").write_text(json.dumps([row, sample()]))
    run = read_run(folder)
    assert [entry.id for entry in run.samples] == ["a:0"]
    assert len(run.notes) == 1
    assert reason in run.notes[0]


@pytest.mark.parametrize("content", ["{", "{}", "7"])
def test_a_bad_samples_file_is_no_error(tmp_path: Path, planted: ModuleType, content: str) -> None:
    folder = planted.write_scan(tmp_path / "scan", samples=False)
    (folder / "samples.json").write_text(content)
    run = read_run(folder)
    assert run.samples == ()
    assert "not shown" in run.notes[0]


def test_many_samples_are_cut(tmp_path: Path, planted: ModuleType) -> None:
    folder = planted.write_scan(tmp_path / "scan", samples=False)
    (folder / "samples.json").write_text(json.dumps([sample(id=f"a:{at}") for at in range(MAX_SAMPLES + 5)]))
    assert len(read_run(folder).samples) == MAX_SAMPLES
