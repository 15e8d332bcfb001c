"""``scan_model`` on real model folders, the schema that its answer follows, and its report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from unpoison.api_models import NOT_COVERED, ModelScanConfig, scan_model
from unpoison.data.pairs import open_pairs
from unpoison.data.shapes import SHAPES_CLASSES
from unpoison.data.sources import open_images
from unpoison.detection.canaries import CanaryConfig
from unpoison.detection.class_search import ClassSearchConfig
from unpoison.detection.decree import DECREEConfig
from unpoison.detection.inversion import InversionConfig
from unpoison.detection.model_weights import WeightsConfig
from unpoison.detection.pickle_files import LEGACY
from unpoison.errors import (
    ConfigError,
    NotEnoughDataError,
    UnknownMethodError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    UsageError,
)
from unpoison.model_results import (
    AnomalyIndex,
    Canary,
    ClassTrigger,
    DataVerdict,
    FileFinding,
    FileVerdict,
    FindingKind,
    Measured,
    ModelScan,
    Power,
    ScannedFile,
    WeightsVerdict,
)
from unpoison.models.any_model import Opening
from unpoison.models.classifier import new_classifier, save_classifier
from unpoison.models.clip_transformers import load_clip
from unpoison.outputs_models import save_model_scan
from unpoison.planning_models import plan_model_scan
from unpoison.report.html import render_report
from unpoison.report.model_views import model_verdict, next_steps
from unpoison.report.runs import read_run
from unpoison.results import DatasetScan, Interval, PoisonEstimate
from unpoison.runs import Run
from unpoison.schemas import FOLDER, PUBLISHED, make_schema, read_schema
from unpoison.storage import to_json

QUICK = ModelScanConfig(
    weights=WeightsConfig(
        images=64,
        search=ClassSearchConfig(steps=2, turn=1, finalists=3, first_steps=1, inversion=InversionConfig(batch_size=4)),
        decree=DECREEConfig(steps=3, batch_size=4),
    ),
    canaries=CanaryConfig(triggers=("badnet",), rates=(0.1,), steps=1, batch_size=8),
)
EVIL = "<script>alert(1)</script>"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an untrained classifier of the shapes world."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    save_classifier(new_classifier("small-resnet", SHAPES_CLASSES), folder)
    return folder


def planted_scan() -> ModelScan:
    """A scan with something in every part."""
    interval = Interval(value=97.0, low=95.0, high=98.0, n=120)
    weights = WeightsVerdict(
        word="backdoored", reason="A patch.", method="class-wise inversion", score=5.0,
        index=AnomalyIndex(value=5.0, low=3.0, high=9.0, classes=3), reference_index=4.0, target=0, target_name=EVIL,
        form="patch", size=0.01, asr=interval, asr_floor=replace(interval, value=1.0), picture=PNG, images=480,
        classes=(ClassTrigger(name=EVIL, target=0, form="patch", size=0.01, success=97.0, index=5.0),),
        image_source="480 images", references=("clean",), covered=100.0, seconds=60.0,
    )  # fmt: skip
    canary = Canary(
        trigger="sig", rate=0.02, target=EVIL, asr=99.0, learnt=True, word="no evidence", found=False, named=False,
        score=1.0,
    )  # fmt: skip
    file = FileVerdict(
        word="accepted", reason="safetensors.", format="safetensors", sha256="0" * 64,
        files=(ScannedFile(name=EVIL, format="safetensors", bytes=10, sha256="0" * 64),),
    )  # fmt: skip
    return ModelScan(
        model="m", kind="classifier", file=file, data=DataVerdict(reason="No training data were given."),
        weights=weights, not_covered=NOT_COVERED, power=Power(reason="One canary.", canaries=(canary,)),
    )  # fmt: skip


def cleared(scan: ModelScan) -> ModelScan:
    return replace(scan, weights=replace(scan.weights, word="no evidence"))


def refused(scan: ModelScan, kind: FindingKind) -> ModelScan:
    finding = FileFinding(file="weights.bin", kind=kind, reason="It is so.")
    weights = WeightsVerdict(word="inconclusive", reason="Not looked at.")
    return replace(scan, file=replace(scan.file, word="refused", findings=(finding,)), weights=weights)


def damaged(scan: ModelScan) -> ModelScan:
    return refused(scan, "unusable")


def planted_data(word: str) -> DataVerdict:
    estimate = PoisonEstimate(
        poisoned=word == "poisoned", rate=0.05, rate_low=0.04, rate_high=0.06, target_labels=(0,), evidence={},
        reason=f"The corner is {word}.",
    )  # fmt: skip
    scan = DatasetScan(
        source="photos", method="cgd", samples=100, class_names=("a", "b"), estimate=estimate, flagged=5,
        flagged_per_class={"a": 5}, skipped=(), warnings=(), not_covered=(), seconds=1.0, seed=0, config={},
        ranks_only=word == "inconclusive",
    )  # fmt: skip
    return DataVerdict(reason=estimate.reason, scan=scan, asked=True)


def check(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> None:
    """The keywords that the published schemas use; an unknown one fails, so that nothing is passed over."""
    known = {"$ref", "$schema", "$defs", "title", "description", "type", "properties", "required", "const", "enum",
             "anyOf", "items", "additionalProperties", "default", "prefixItems", "minItems", "maxItems"}  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        check(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], value, root)
    if "anyOf" in schema:
        assert any(holds(part, value, root) for part in schema["anyOf"]), value
    if "const" in schema:
        assert value == schema["const"]
    if "enum" in schema:
        assert value in schema["enum"]
    kinds: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None),
                             "object": dict, "array": list}  # fmt: skip
    if "type" in schema:
        assert isinstance(value, kinds[schema["type"]]), (value, schema["type"])
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value)
        extra = schema.get("additionalProperties", True)
        for key, part in value.items():
            if key in schema.get("properties", {}):
                check(schema["properties"][key], part, root)
            elif isinstance(extra, dict):
                check(extra, part, root)
            else:
                assert extra is True, key
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for part in value:
            check(schema["items"], part, root)


def holds(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    try:
        check(schema, value, root)
    except AssertionError:
        return False
    return True


def valid(scan: ModelScan) -> bool:
    schema = read_schema("model-scan")
    check(schema, json.loads(to_json(scan)), schema)
    return True


def test_the_published_schema_is_the_results_own() -> None:
    for name, kind in PUBLISHED.items():
        assert msgspec.json.decode((FOLDER / f"{name}.json").read_bytes()) == msgspec.json.decode(
            msgspec.json.encode(make_schema(kind))
        ), "python -m unpoison.schemas writes it anew"
    with pytest.raises(UnknownMethodError):
        read_schema("nothing")


def test_a_scan_validates_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    scan = planted_scan()
    assert valid(scan)
    schema, body = read_schema("model-scan"), json.loads(to_json(scan))
    for wrong in ({"schema_version": 99}, {"model": 3}, {"surprise": 1}, {"weights": body["weights"] | {"word": "ok"}}):
        assert not holds(schema, body | wrong, schema), wrong
    assert not holds(schema, {key: value for key, value in body.items() if key != "file"}, schema)
    scan.save(tmp_path / "model-scan.json")
    assert ModelScan.load(tmp_path / "model-scan.json") == scan


@pytest.mark.parametrize(
    ("word", "weights", "kind", "code"),
    [
        ("accepted", "backdoored", None, 1), ("accepted", "suspicious", None, 1), ("accepted", "no evidence", None, 0),
        ("accepted", "inconclusive", None, 3), ("refused", "inconclusive", "code", 1),
        ("refused", "inconclusive", "unusable", 3), ("not recognized", "inconclusive", None, 3),
    ],
)  # fmt: skip
def test_exit_codes(word: Any, weights: Any, kind: Any, code: int) -> None:
    scan = planted_scan()
    findings = () if kind is None else (FileFinding(file="f", kind=kind, reason="r"),)
    file = replace(scan.file, word=word, findings=findings)
    assert replace(scan, file=file, weights=replace(scan.weights, word=weights)).exit_code == code


@pytest.mark.parametrize(
    ("data", "weights", "code"),
    [("poisoned", "no evidence", 1), ("inconclusive", "no evidence", 3), ("nothing found", "no evidence", 0),
     ("inconclusive", "backdoored", 1), ("poisoned", "inconclusive", 1), ("nothing found", "inconclusive", 3)],
)  # fmt: skip
def test_exit_codes_with_a_data_verdict(data: str, weights: Any, code: int) -> None:
    scan = planted_scan()
    scan = replace(scan, data=planted_data(data), weights=replace(scan.weights, word=weights))
    assert (scan.data.word, scan.exit_code) == (data, code)
    asked = replace(scan, data=DataVerdict(reason="No time was left.", asked=True))
    assert asked.exit_code == {"no evidence": 3, "inconclusive": 3, "backdoored": 1}[weights]


def test_a_classifier_with_data_references_and_power(classifier: Path, tmp_path: Path) -> None:
    images = open_images("shapes:80:3")
    run = Run(cache=tmp_path)
    outcome = scan_model(classifier, images=images, references=[classifier], power=True, config=QUICK, run=run)
    scan = outcome.scan
    assert valid(scan)
    assert (scan.kind, scan.file.word, scan.weights.images) == ("classifier", "accepted", 64)
    assert scan.weights.references == (str(classifier),)
    assert scan.power is not None
    assert len(scan.power.canaries) == 1
    assert "shapes:80:3" in scan.weights.image_source
    assert outcome.data is None
    assert "canary" in scan.not_covered[-1]


def test_a_clip_with_classes_and_as_an_encoder(small_folder: Path, tmp_path: Path) -> None:
    named = scan_model(small_folder, class_names=SHAPES_CLASSES[:4], config=QUICK, run=Run(cache=tmp_path)).scan
    assert (named.kind, named.weights.method) == ("CLIP", "class-wise inversion")
    assert {row.name for row in named.weights.classes} <= set(SHAPES_CLASSES[:4])
    assert any("made up" in warning for warning in named.warnings)
    assert named.weights.made_up
    assert named.weights.word in ("suspicious", "inconclusive")
    encoder = scan_model(small_folder, references=[small_folder], config=QUICK, run=Run(cache=tmp_path)).scan
    assert encoder.weights.method == "DECREE"
    assert encoder.weights.target is None
    assert valid(named)
    assert valid(encoder)


def test_the_data_verdict_is_a_scan_of_its_own(classifier: Path, small_folder: Path, tmp_path: Path) -> None:
    run, learnt = Run(cache=tmp_path / "cache"), open_images("shapes:60:3")
    found = scan_model(classifier, trained_on=learnt, data_method="activation-clustering", config=QUICK, run=run)
    assert found.data is not None
    assert found.scan.data.scan == found.data.scan
    assert valid(found.scan)
    (tmp_path / "out").mkdir()
    save_model_scan(found, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"data", "model-scan.json", "report.html"}
    assert (tmp_path / "out" / "data" / "split.parquet").exists()
    pairs = scan_model(small_folder, trained_on=open_pairs("shapes:60:3"), config=QUICK, run=run).scan
    assert pairs.data.scan is not None
    assert (pairs.data.scan.method, pairs.data.scan.captioned) == ("dao", True)
    other = scan_model(classifier, trained_on=open_pairs("shapes:60:3"), config=QUICK, run=run).scan
    assert other.data.scan is None
    with pytest.raises(UsageError, match="no detector"):  # at once, not after the search
        scan_model("nowhere", trained_on=learnt, data_method="nothing", config=QUICK, run=run)


def test_the_clip_of_the_data_verdict_is_the_one_given(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def scan(*_: Any, clip: Any, **__: Any) -> Any:
        given.append(clip)
        raise NotEnoughDataError("this is far enough", have=0, need=1, hint="")

    monkeypatch.setattr("unpoison.api_model_data.scan_dataset", scan)
    clip, learnt = load_clip(), open_images("shapes:60:3")
    for known in (clip, None):
        with pytest.raises(NotEnoughDataError, match="far enough"):
            scan_model(classifier, trained_on=learnt, clip=known, config=QUICK, run=Run(cache=tmp_path))
    assert given[0] is clip
    assert given[1].fingerprint == clip.fingerprint  # the bundled one


def test_a_plan_says_steps_time_and_memory(classifier: Path, small_folder: Path, tmp_path: Path) -> None:
    images, learnt = open_images("shapes:80:3"), open_images("shapes:60:4")
    plan = plan_model_scan(
        classifier, images=images, references=2, trained_on=learnt, data_method="strip", power=True, config=QUICK
    )
    said = [step.what for step in plan.steps]
    for place, begin in enumerate(("file verdict: accepted", "decode", "weights: search 12 classes", "the same for 2",
                                   "power: 1 canaries", "data: ")):  # fmt: skip
        assert said[place].startswith(begin), said
    assert all(step.seconds > 0 for step in plan.steps)
    assert plan.steps[3].seconds == pytest.approx(2 * plan.steps[2].seconds)
    assert plan.steps[2].amount == 3 * 12 * 1 + 3 * 2 * 2 + 3 * QUICK.weights.search.square_steps
    assert plan.memory > 2**20
    assert "data/" in plan.files
    encoder = plan_model_scan(small_folder, config=QUICK)
    assert encoder.steps[-1].what.startswith("weights: DECREE")
    (tmp_path / "weights.pth").write_bytes(b"")
    assert [step.what for step in plan_model_scan(tmp_path / "weights.pth").steps] == [
        f"file verdict: refused ({LEGACY})"
    ]
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert "cannot be opened" in plan_model_scan(tmp_path / "weights.safetensors").steps[-1].what


def test_what_is_refused_is_not_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {canary}",)

    torch.save({"state_dict": {"a": torch.ones(2)}, "hook": Runs()}, tmp_path / "weights.pth")
    path = tmp_path / "weights.pth"
    scan = scan_model(path, opening=Opening(arch="small-resnet"), config=QUICK).scan
    assert (scan.file.word, scan.weights.word, scan.kind, scan.exit_code) == ("refused", "inconclusive", "", 1)
    assert not canary.exists()
    save_classifier(new_classifier("small-resnet", SHAPES_CLASSES), tmp_path / "model")
    with pytest.raises(UnsafeCheckpointError, match="reference"):
        scan_model(tmp_path / "model", references=[path], config=QUICK)
    assert not canary.exists()


def test_weights_that_cannot_be_opened_are_inconclusive_with_the_reason(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    scan = scan_model(tmp_path / "weights.safetensors", opening=Opening(arch="small-resnet"), config=QUICK).scan
    assert (scan.file.word, scan.weights.word, scan.exit_code) == ("accepted", "inconclusive", 3)
    assert "could not be opened" in scan.weights.reason
    nameless = scan_model(tmp_path / "weights.safetensors", config=QUICK).scan
    assert (nameless.file.word, nameless.weights.word) == ("accepted", "inconclusive")
    assert "--arch" in nameless.weights.reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config.json": {"id2label": {"0": "a", "1": "b", "7": "c"}}}, "could not be opened"),
        ({"preprocessor_config.json": {"size": {"height": 40, "width": 40}}}, "a first pass failed"),
        ({"preprocessor_config.json": {"size": {"height": 100_000, "width": 100_000}}}, "100,000 pixels"),
        ({"preprocessor_config.json": {"image_std": [0.0, 0.0, 0.0]}}, "image_std"),
    ],
)
def test_odd_folders_cost_the_weights_verdict_only(
    changes: dict[str, dict[str, Any]], said: str, tmp_path: Path
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=24, patch_size=8,
        id2label=dict(enumerate("abc")),
    )  # fmt: skip
    folder = tmp_path / "model"
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 24, "width": 24}}))
    for name, change in changes.items():
        body = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(body | change))
    found = scan_model(folder, config=QUICK)
    assert (found.scan.file.word, found.scan.weights.word, found.scan.exit_code) == ("accepted", "inconclusive", 3)
    assert said in found.scan.weights.reason
    assert found.scan.not_covered == ()
    (tmp_path / "out").mkdir()
    save_model_scan(found, tmp_path / "out")
    assert (tmp_path / "out/model-scan.json").exists()


def test_a_reference_of_another_kind_and_a_budget_of_nothing(classifier: Path, small_folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="says nothing of"):
        scan_model(classifier, references=[small_folder], config=QUICK)
    with pytest.raises(ConfigError, match="budget"):
        scan_model(classifier, budget=0.0)


def test_the_report_keeps_the_verdicts_apart_and_escapes(tmp_path: Path) -> None:
    scan = planted_scan()
    scan.save(tmp_path / "model-scan.json")
    page = render_report([read_run(tmp_path)])
    assert EVIL not in page
    for shown in ("File verdict: accepted", "Data verdict: not looked at", "Weights verdict: backdoored",
                  "&lt;script&gt;alert(1)&lt;/script&gt;", "Not covered", NOT_COVERED[0], "5.0 (3.0 to 9.0",
                  "One canary.", "data:image/png;base64,"):  # fmt: skip
        assert shown in page, shown
    assert page.index("File verdict:") < page.index("Data verdict:") < page.index("Weights verdict:")


@pytest.mark.parametrize(
    ("change", "tone"),
    [
        (lambda scan: scan, "alert"),
        (lambda scan: replace(scan, weights=replace(scan.weights, word="no evidence")), "ok"),
        (lambda scan: refused(scan, "code"), "alert"),
        (lambda scan: damaged(scan), "caution"),
        (lambda scan: replace(scan, file=replace(scan.file, word="not recognized")), "caution"),
        (lambda scan: replace(cleared(scan), data=planted_data("poisoned")), "alert"),
        (lambda scan: replace(cleared(scan), data=planted_data("inconclusive")), "caution"),
        (lambda scan: replace(cleared(scan), data=planted_data("nothing found")), "ok"),
        (lambda scan: replace(cleared(scan), data=DataVerdict(reason="No time was left.", asked=True)), "caution"),
        (lambda scan: replace(damaged(scan), data=planted_data("poisoned")), "alert"),
    ],
)
def test_the_first_sentence(change: Callable[[ModelScan], ModelScan], tone: str) -> None:
    assert model_verdict(change(planted_scan())).tone == tone


def test_the_headline_says_what_the_exit_code_says(tmp_path: Path) -> None:
    scan = planted_scan()
    poisoned = model_verdict(replace(cleared(scan), data=planted_data("poisoned")))
    assert poisoned.sentence.startswith("The data that the model was trained on are poisoned. No evidence")
    assert poisoned.detail == "The corner is poisoned."
    both = model_verdict(replace(scan, data=planted_data("poisoned")))
    assert "behave as if backdoored" in both.sentence
    assert "trained on are poisoned" in both.sentence
    for change, steps in ((refused(scan, "code"), "Do not load"), (damaged(scan), "Fetch those anew")):
        change.save(tmp_path / "model-scan.json")
        page = render_report([read_run(tmp_path)])
        assert steps in page
        assert ("Do not load these files with any tool" in page) == change.file.dangerous
    replace(cleared(scan), data=planted_data("poisoned")).save(tmp_path / "model-scan.json")
    assert "unpoison keep" in render_report([read_run(tmp_path)])


def test_steps_clean_the_data_and_repair_the_weights() -> None:
    scan = replace(planted_scan(), data=planted_data("poisoned"))
    said = {"command": ["unpoison", "scan", "model", "w.pth", "--arch", "wrn-16-1", "--data", "photos"]}
    steps = next_steps(replace(scan, power=None, weights=replace(scan.weights, references=())), "scan", said)
    lines = [step.line for step in steps]
    assert lines[0].startswith("unpoison keep scan/data")
    assert any(line.startswith("unpoison purify pad-ft") for line in lines)
    assert "unpoison scan model w.pth --arch wrn-16-1 --data photos --power" in lines
    assert "unpoison scan model w.pth --arch wrn-16-1 --data photos --clean-reference MODEL" in lines
    made_up = next_steps(replace(scan, weights=replace(scan.weights, made_up=True)), "scan", {})
    assert "unpoison scan model m --data SOURCE" in [step.line for step in made_up]


def test_the_answer_says_its_cuts_and_how_often_it_is_wrong(tmp_path: Path) -> None:
    scan = planted_scan()
    weights = replace(scan.weights, suspicious_from=2.2, backdoored_from=3.0, asr_floor=None)
    for measured, said in (
        (None, "has not been measured yet"),
        (Measured(clean=20, false_alarms=1, backdoored=30, found=27, named=26), "of 20 clean models 1 were called"),
    ):
        replace(scan, weights=replace(weights, measured=measured)).save(tmp_path / "model-scan.json")
        page = render_report([read_run(tmp_path)])
        assert said in page
        assert "suspicious from 2.2, backdoored from 3.0" in page
        assert "the images have no labels of their own" in page
