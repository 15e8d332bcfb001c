"""Results to disk and back, and what is said of files that are damaged, foreign or of another version."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unpoison.errors import ResultError, SchemaVersionError
from unpoison.results import (
    CLEAN,
    MIXED,
    SCHEMA_VERSION,
    SKIPPED,
    SUSPECT,
    ClipEvaluation,
    DatasetScan,
    Drift,
    Evaluation,
    Interval,
    PoisonEstimate,
    Purification,
    Rebound,
    Recall,
    SampleScores,
    SkippedRow,
    Split,
    from_json,
    to_json,
    write_atomically,
)

CLASSES = ("cat", "<b>dog</b>", "電車")
IDS = ["a/1.png", "b,2", 'c"\n3', "電車/4"]
ESTIMATE = PoisonEstimate(
    poisoned=True,
    rate=0.05,
    rate_low=0.04,
    rate_high=0.06,
    target_labels=(2,),
    evidence={"p.cat": 0.0, "corner.電車": 31.0},
    reason="Evidence: label '電車'.",
)
RATE = Interval(value=93.5, low=92.25, high=94.75, n=1000)
EVALUATION = Evaluation(
    model="model",
    data="shapes:10",
    c_acc=RATE,
    asr=RATE,
    asr_floor=RATE,
    asr_excess=1.5,
    ra=RATE,
    attack="badnet",
    target="cat",
    per_class={"cat": 100.0},
    skipped=(SkippedRow(id="x", reason="truncated"),),
    seconds=1.25,
)
PURIFICATION = Purification(
    method="cgd",
    config={"tau": 3.0, "separation": {"scorers": 3}},
    accepted=False,
    reason="Held-out accuracy fell.",
    protects="the classifier's weights",
    held_out_before=90.0,
    held_out_after=80.0,
    bound=5.0,
    steps=400,
    changed_share=1.0,
    seconds=12.5,
    seed=7,
    suspect_count=12,
    clean_count=1000,
    estimate=ESTIMATE,
    history=[{"step": 0.0, "held_out_accuracy": 90.0}],
    inputs={"model": "abc"},
    before=EVALUATION,
    after=replace(EVALUATION, asr=None),
    not_covered=("Other backdoors.",),
)
SCAN = DatasetScan(
    source="shapes:10",
    method="cgd",
    samples=4,
    class_names=CLASSES,
    estimate=ESTIMATE,
    flagged=1,
    flagged_per_class={"cat": 1},
    skipped=(SkippedRow(id="x", reason="a 0x0 image"),),
    clip="abc",
    clip_agreement=66.5,
    chance_agreement=33.25,
    warnings=("weak",),
    not_covered=("weights",),
    seconds=3.5,
    seed=0,
    config={"regions": "estimated"},
    inputs={"clip": "abc"},
)
RECALL = Recall(at_1=RATE, at_5=RATE, at_10=RATE)
CLIP_EVALUATION = ClipEvaluation(
    model="<b>clip</b>",
    data="shapes:10",
    templates=7,
    c_acc=RATE,
    asr=RATE,
    asr_floor=RATE,
    asr_excess=12.5,
    ra=RATE,
    attack="badnet",
    target="電車",
    per_class={"電車": 50.0},
    truncated_classes=("a very long name",),
    retrieval_data="pairs.parquet",
    image_to_text=RECALL,
    text_to_image=RECALL,
    retrieval_asr=RATE,
    retrieval_asr_floor=RATE,
    target_captions=3,
    cut_captions=0,
    drift=Drift(image_raw=-0.5, image_aligned=0.5, text_raw=0.25, text_aligned=0.75, images=9, texts=8, width=4),
    skipped=(SkippedRow(id="x", reason="the caption is empty"),),
    notes=("Retrieval ASR is not measured.",),
    seconds=2.5,
)
REBOUND = Rebound(pairs="x", before=CLIP_EVALUATION, after=replace(CLIP_EVALUATION, asr_excess=20.0), seconds=1.5)
RESULTS = [EVALUATION, PURIFICATION, SCAN, CLIP_EVALUATION, REBOUND]


def scores(**changes: Any) -> SampleScores:
    values = {
        "method": "cgd",
        "ids": IDS,
        "labels": np.array([0, 1, 2, 2]),
        "class_names": CLASSES,
        "axes": {"joint_rank": np.array([0.25, 1.0, 0.5, np.nan]), "clip_loss": np.array([0.1, 1e-300, 7.0, np.nan])},
        "primary": "joint_rank",
        "skipped": (SkippedRow(id=IDS[3], reason="does not decode"),),
        "details": {"clip_agreement": 66.5},
    }
    return SampleScores(**(values | changes))


def split(**changes: Any) -> Split:
    values = {
        "method": "cgd",
        "ids": IDS,
        "labels": np.array([0, 1, 2, 2]),
        "region": np.array([CLEAN, SUSPECT, MIXED, SKIPPED], dtype=np.int8),
        "class_names": CLASSES,
        "estimate": ESTIMATE,
    }
    return Split(**(values | changes))


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_json_results_survive_the_disk(result: Any, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result.save(path)
    assert type(result).load(path) == result
    body = msgspec.json.decode(path.read_bytes())
    assert list(body)[:2] == ["schema", "schema_version"]
    assert body["schema_version"] == SCHEMA_VERSION
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_numpy_numbers_are_written_as_numbers() -> None:
    odd = replace(EVALUATION, seconds=np.float64(2.5))
    assert from_json(to_json(odd), Evaluation) == replace(EVALUATION, seconds=2.5)
    listed = replace(PURIFICATION, config={"rows": np.arange(3), "tau": np.float32(0.5), "seed": np.int64(3)})
    assert from_json(to_json(listed), Purification).config == {"rows": [0, 1, 2], "tau": 0.5, "seed": 3}
    with pytest.raises(TypeError, match="cannot write a object"):
        to_json(replace(PURIFICATION, config={"rows": object()}))


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    scores().save(tmp_path / "scores.parquet")
    loaded = SampleScores.load(tmp_path / "scores.parquet")
    expected = scores()
    assert (loaded.ids, loaded.labels.tolist()) == (IDS, [0, 1, 2, 2])
    assert set(loaded.axes) == set(expected.axes)
    for name, values in expected.axes.items():
        np.testing.assert_array_equal(loaded.axes[name], values)
    for name in ("method", "class_names", "primary", "skipped", "details"):
        assert getattr(loaded, name) == getattr(expected, name)
    np.testing.assert_array_equal(loaded.suspicion, expected.axes["joint_rank"])


@pytest.mark.parametrize("estimate", [ESTIMATE, None])
def test_splits_survive_the_disk(estimate: PoisonEstimate | None, tmp_path: Path) -> None:
    split(estimate=estimate).save(tmp_path / "split.parquet")
    loaded = Split.load(tmp_path / "split.parquet")
    assert loaded.region.dtype == np.int8
    assert (loaded.clean.tolist(), loaded.suspect.tolist(), loaded.mixed.tolist()) == ([0], [1], [2])
    assert loaded.estimate == estimate
    assert (loaded.ids, loaded.class_names, loaded.labels.tolist()) == (IDS, CLASSES, [0, 1, 2, 2])


def test_an_empty_set_survives_the_disk(tmp_path: Path) -> None:
    nobody = {"ids": [], "labels": np.zeros(0, dtype=np.int64)}
    split(**nobody, region=np.zeros(0, dtype=np.int8)).save(tmp_path / "split.parquet")
    assert Split.load(tmp_path / "split.parquet").ids == []
    scores(**nobody, axes={"joint_rank": np.zeros(0)}).save(tmp_path / "scores.parquet")
    assert SampleScores.load(tmp_path / "scores.parquet").suspicion.shape == (0,)


def unchecked(made: Any, **changes: Any) -> None:
    """What the constructor does without the shape checks of the test run, which come first."""
    twin = object.__new__(type(made))
    for name, value in (vars(made) | changes).items():
        object.__setattr__(twin, name, value)
    twin.__post_init__()


def test_lengths_must_agree() -> None:
    unchecked(scores())
    with pytest.raises(ResultError, match=r"axis 'joint_rank' to have shape \(4,\), got \(3,\)"):
        unchecked(scores(), axes={"joint_rank": np.zeros(3)})
    with pytest.raises(ResultError, match=r"labels to have shape \(4,\), got \(5,\)"):
        unchecked(scores(), labels=np.zeros(5, dtype=np.int64))
    with pytest.raises(ResultError, match="'nothing' is none of"):
        scores(primary="nothing")
    with pytest.raises(ResultError, match=r"region to have shape \(4,\), got \(2,\)"):
        unchecked(split(), region=np.zeros(2, dtype=np.int8))
    with pytest.raises(ResultError, match=r"labels to have shape \(4,\), got \(3,\)"):
        unchecked(split(), labels=np.zeros(3, dtype=np.int64))


def test_another_kind_or_version_is_refused() -> None:
    data = msgspec.json.decode(to_json(EVALUATION))
    with pytest.raises(ResultError, match="expected unpoison/purification, found unpoison/evaluation"):
        from_json(msgspec.json.encode(data), Purification)
    for version in (SCHEMA_VERSION + 1, 0, None, "1"):
        with pytest.raises(SchemaVersionError, match=f"schema version {version}"):
            from_json(msgspec.json.encode(data | {"schema_version": version}), Evaluation)
    with pytest.raises(ResultError, match="found None"):
        from_json(b"{}", Evaluation)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b'{"schema": "\xff"}', b"null"])
def test_damaged_json_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "scan.json"
    path.write_bytes(data)
    with pytest.raises(ResultError, match=r"scan\.json") as caught:
        DatasetScan.load(path)
    assert caught.value.hint


def test_json_of_the_wrong_types_is_refused() -> None:
    data = msgspec.json.decode(to_json(EVALUATION))
    for change in ({"c_acc": "high"}, {"per_class": [1]}, {"model": None}):
        with pytest.raises(ResultError, match=next(iter(change))):
            from_json(msgspec.json.encode(data | change), Evaluation)
    del data["c_acc"]
    with pytest.raises(ResultError, match="c_acc"):
        from_json(msgspec.json.encode(data), Evaluation)


def test_absent_files_are_result_errors(tmp_path: Path) -> None:
    for load in (DatasetScan.load, Evaluation.load, SampleScores.load, Split.load):
        with pytest.raises(ResultError, match="gone"):
            load(tmp_path / "gone")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
        return
    if how == "not parquet":
        path.write_bytes(b"PAR1" + bytes(100))
        return
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    if how == "no header":
        del metadata[b"header"]
    elif how == "header not JSON":
        metadata[b"header"] = b"{\xff"
    elif how == "header of another type":
        metadata[b"header"] = b"[]"
    elif how == "header lacks a key":
        metadata[b"header"] = b"{}"
    elif how == "no label":
        table = table.drop_columns(["label"])
    elif how == "no metadata":
        metadata = {}
    pq.write_table(table.replace_schema_metadata(metadata), path)


DAMAGE = (
    "cut short", "not parquet", "no header", "header not JSON", "header of another type", "header lacks a key",
    "no label", "no metadata",
)  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_tables_are_refused(how: str, tmp_path: Path) -> None:
    for result in (scores(), split()):
        path = tmp_path / f"{type(result).__name__}.parquet"
        result.save(path)
        damage(path, how)
        with pytest.raises(ResultError, match=path.name):
            type(result).load(path)


def test_a_region_of_no_known_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.parquet"
    split().save(path)
    table = pq.read_table(path)
    names = pa.array(["clean", "guilty", "mixed", "skipped"])
    table = table.set_column(table.column_names.index("region"), "region", names)
    pq.write_table(table, path)
    with pytest.raises(ResultError, match="guilty"):
        Split.load(path)


def test_tables_of_another_kind_or_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    split().save(path)
    with pytest.raises(ResultError, match="expected unpoison/sample-scores, found unpoison/split"):
        SampleScores.load(path)
    for version in (b"2", b"two"):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata(dict(table.schema.metadata) | {b"schema_version": version}), path)
        with pytest.raises(SchemaVersionError, match=f"schema version {version.decode()}"):
            Split.load(path)


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_atomically(folder, b"never")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.json", "folder"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "file.json", b"never")


def test_a_failed_save_leaves_the_earlier_result(tmp_path: Path) -> None:
    path = tmp_path / "purification.json"
    PURIFICATION.save(path)
    with pytest.raises(TypeError):
        replace(PURIFICATION, config={"what": object()}).save(path)
    assert Purification.load(path) == PURIFICATION
    assert [entry.name for entry in tmp_path.iterdir()] == ["purification.json"]


def test_numbers_that_json_does_not_know_are_not_read_back_as_something_else() -> None:
    """JSON has no NaN: it becomes null, and a float field then refuses it instead of inventing a number."""
    data = to_json(replace(EVALUATION, seconds=math.nan))
    with pytest.raises(ResultError, match="seconds"):
        from_json(data, Evaluation)


def test_the_rise_of_a_rebound() -> None:
    assert REBOUND.asr_rise == 7.5
    assert replace(REBOUND, before=replace(CLIP_EVALUATION, asr_excess=None)).asr_rise is None
