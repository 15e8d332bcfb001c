"""The public names, and what the verbs refuse and warn of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

import unpoison
from unpoison.api import ScanOutcome, describe_samples, purify_with_cgd, scan_dataset
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.cgd import CGDConfig
from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS, JOINT_AXIS, SeparationConfig
from unpoison.errors import DataError, NotEnoughDataError
from unpoison.evidence import MIN_SAMPLES
from unpoison.models.classifier import new_classifier
from unpoison.models.clip_transformers import load_clip
from unpoison.results import CLEAN, SKIPPED, SUSPECT, DatasetScan, SampleScores, Split, clip_too_weak
from unpoison.runs import Run
from unpoison.types import ImageTextModel

CONFIG = CGDConfig(separation=SeparationConfig(scorers=1, scorer_epochs=1))


@pytest.fixture(scope="module")
def source() -> LabelledImages:
    return open_images("shapes:150:2")


@pytest.fixture(scope="module")
def clip() -> ImageTextModel:
    return load_clip("tiny")


Scan = Callable[[LabelledImages], ScanOutcome]


@pytest.fixture(scope="module")
def scan(clip: ImageTextModel) -> Scan:
    return lambda source: scan_dataset(source, clip=clip, config=CONFIG, run=make_run())


@pytest.fixture(scope="module")
def outcome(source: LabelledImages, scan: Scan) -> ScanOutcome:
    return scan(source)


def make_run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


@pytest.mark.parametrize("name", unpoison.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(unpoison, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(unpoison)


def test_the_public_names_are_those_of_the_table() -> None:
    assert sorted(unpoison._HOMES) == unpoison.__all__ == sorted(unpoison.__all__)
    with pytest.raises(AttributeError, match="'unpoison' has no attribute 'scan_datasets'"):
        _ = unpoison.scan_datasets  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, unpoison; dir(unpoison); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'accelerate') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_scan_says_what_it_looked_at(source: LabelledImages, outcome: ScanOutcome, clip: ImageTextModel) -> None:
    found = outcome.scan
    assert (found.samples, found.source, found.method) == (150, "shapes:150:2", "cgd")
    assert found.class_names == source.class_names
    assert found.clip == found.inputs["clip"] == clip.fingerprint
    assert found.chance_agreement == pytest.approx(100 / len(source.class_names))
    assert found.flagged == len(outcome.split.suspect) == sum(found.flagged_per_class.values())
    assert list(found.flagged_per_class) == list(source.class_names)
    assert found.not_covered
    assert found.seconds > 0
    assert outcome.scores.ids == outcome.split.ids == source.ids
    for axis in (CLIP_AXIS, EARLY_AXIS, JOINT_AXIS):
        values = outcome.scores.axes[axis]
        assert ((values > 0) & (values <= 1)).all()


def test_a_scan_is_reproducible(source: LabelledImages, outcome: ScanOutcome, scan: Scan) -> None:
    first, again = outcome, scan(source)
    for axis, values in first.scores.axes.items():
        np.testing.assert_array_equal(again.scores.axes[axis], values)
    assert again.samples == first.samples
    assert replace(again.scan, seconds=0.0) == replace(first.scan, seconds=0.0)


def test_too_few_samples(source: LabelledImages, scan: Scan) -> None:
    with pytest.raises(NotEnoughDataError, match=f"have {MIN_SAMPLES - 1}, need at least {MIN_SAMPLES}"):
        scan(source.select(range(MIN_SAMPLES - 1)))


@pytest.mark.parametrize("names", ["another order", "other names", "fewer"])
def test_the_models_classes_must_be_the_datas(names: str, source: LabelledImages, clip: ImageTextModel) -> None:
    given = source.class_names
    classes = {"another order": given[::-1], "other names": tuple("abcdefghij"), "fewer": given[:-1]}[names]
    model = new_classifier("small-resnet", classes)
    with pytest.raises(DataError, match="the model's classes") as caught:
        purify_with_cgd(model, source, clip=clip, config=CONFIG, run=make_run())
    assert str(list(classes)) in caught.value.message
    assert str(list(given)) in caught.value.message
    assert "order" in caught.value.hint


def test_a_clip_that_does_not_know_the_classes_is_named(
    source: LabelledImages, outcome: ScanOutcome, scan: Scan
) -> None:
    strange = tuple(f"qx{index}zv" for index in range(len(source.class_names)))
    lost = scan(replace(source, class_names=strange, labels=source.labels[::-1].copy()))
    assert any("hardly knows" in text and "--clip" in text for text in lost.scan.warnings), lost.scan
    assert not any("hardly knows" in text for text in outcome.scan.warnings)


def test_what_counts_as_too_weak() -> None:
    assert clip_too_weak(18.9, 10.0)
    assert not clip_too_weak(20.0, 10.0)
    assert clip_too_weak(1.9, 1.0)
    # two classes: chance is half, and no CLIP can have twice that
    assert not clip_too_weak(90.0, 50.0)
    assert clip_too_weak(54.0, 50.0)


def test_rare_classes_and_long_names_are_named(source: LabelledImages, scan: Scan) -> None:
    labels = source.labels % 3
    labels[:7] = 3
    long = "a very " + 60 * "very " + "long name"
    names = (long, *source.class_names[1:])
    warnings = scan(replace(source, labels=labels, class_names=names)).scan.warnings
    rare = next(text for text in warnings if "fewer than 20" in text)
    assert source.class_names[3] in rare
    assert not any(name in rare for name in names[:3])
    assert any("cut these class names off" in text and long in text for text in warnings)


def hand_made(source: LabelledImages, regions: list[int], ranks: list[float]) -> tuple[SampleScores, Split]:
    values = np.array(ranks)
    scores = SampleScores(
        method="cgd", ids=source.ids, labels=source.labels, class_names=source.class_names,
        axes={CLIP_AXIS: values, EARLY_AXIS: values, JOINT_AXIS: values}, primary=JOINT_AXIS,
    )  # fmt: skip
    split = Split(
        method="cgd", ids=source.ids, labels=source.labels, region=np.array(regions, dtype=np.int8),
        class_names=source.class_names,
    )  # fmt: skip
    return scores, split


def test_the_described_samples(source: LabelledImages) -> None:
    few = source.select(range(6))
    choices = np.where(np.arange(6) == 5, -1, few.labels)
    ranks = [0.2, 0.9, 0.4, 1.0, 0.6, np.nan]
    flagged, split = hand_made(few, [CLEAN, SUSPECT, CLEAN, SUSPECT, CLEAN, SKIPPED], ranks)
    samples = describe_samples(few, flagged, split, choices, suspects=5, clean=2)
    assert [sample["id"] for sample in samples] == [few.ids[row] for row in (3, 1, 0, 2)]
    assert samples[0]["region"] == "suspect"
    assert samples[0]["label"] == samples[0]["clip_label"] == few.class_names[few.labels[3]]
    # without a suspect the highest ranks are shown, and nobody twice
    scores, nobody = hand_made(few, [CLEAN] * 5 + [SKIPPED], ranks)
    samples = describe_samples(few, scores, nobody, choices, suspects=4, clean=4)
    assert [sample["id"] for sample in samples] == [few.ids[row] for row in (3, 1, 4, 2, 0)]


def test_a_scan_survives_the_disk(outcome: ScanOutcome, tmp_path: Path) -> None:
    outcome.scan.save(tmp_path / "scan.json")
    assert DatasetScan.load(tmp_path / "scan.json") == outcome.scan
