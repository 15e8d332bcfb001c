"""PAD-FT on planted poison and on a clean set: the whole way from a training set to a repaired model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from unpoison.api_repairs import purify_with_classic, purify_with_pad_ft
from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.ft import FTConfig
from unpoison.defenses.pad_ft import PADFTConfig
from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS
from unpoison.detection.ranks import rank_normalise
from unpoison.errors import DataError, NotEnoughDataError, ResultError
from unpoison.evaluation.classifier import evaluate_classifier
from unpoison.evidence import judge_agreement
from unpoison.models.classifier import ImageClassifier, new_classifier
from unpoison.models.clip_transformers import load_clip
from unpoison.models.zero_shot import ZeroShot
from unpoison.results import CLEAN, SUSPECT, Evaluation, SampleScores, Split
from unpoison.runs import Run
from unpoison.training import train_classifier

TARGET = 4
QUICK = PADFTConfig(epochs=2)


def make_run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


@pytest.fixture(scope="module")
def poisoning() -> Poisoning:
    return plan_poisoning(open_images("shapes:1000:0"), "badnet", rate=0.1, target=TARGET, share=0.4)


@pytest.fixture(scope="module")
def poisoned(poisoning: Poisoning) -> LabelledImages:
    return apply_poisoning(open_images("shapes:1000:0"), poisoning)


@pytest.fixture(scope="module")
def victim(poisoned: LabelledImages) -> ImageClassifier:
    pixels = load_pixels(poisoned, 32, cache=None, progress=make_run().progress)
    fresh = new_classifier("small-resnet", poisoned.class_names, seed=0)
    return train_classifier(fresh, pixels, poisoned.labels, run=make_run(), epochs=8, batch_size=64)


def scores_of(source: LabelledImages, poisoning: Poisoning | None) -> SampleScores:
    """Ranks as CGD's would be where CLIP knows the classes: poison is high on both, the rest anywhere on each."""
    random = np.random.default_rng(0)
    bad = np.isin(source.ids, [] if poisoning is None else poisoning.ids)
    axes = {
        axis: rank_normalise(np.where(bad, 0.9 + 0.1 * random.random(len(source)), random.random(len(source))))
        for axis in (CLIP_AXIS, EARLY_AXIS)
    }
    return SampleScores(
        method="cgd", ids=list(source.ids), labels=source.labels, class_names=source.class_names,
        axes=axes | {"joint_rank": np.minimum(*axes.values())}, primary="joint_rank",
    )  # fmt: skip


def measure(model: ImageClassifier, poisoning: Poisoning) -> Evaluation:
    return evaluate_classifier(model, open_images("shapes:400:1"), poisoning=poisoning, run=make_run())


def test_the_backdoor_goes_and_the_body_stays(
    victim: ImageClassifier, poisoned: LabelledImages, poisoning: Poisoning
) -> None:
    config = PADFTConfig(per_class=60)
    outcome = purify_with_pad_ft(victim, poisoned, scores=scores_of(poisoned, poisoning), config=config, run=make_run())
    before, after = measure(victim, poisoning), measure(outcome.classifier, poisoning)  # pyright: ignore[reportArgumentType]
    assert before.asr_excess is not None
    assert after.asr_excess is not None
    assert before.asr_excess >= 80
    assert after.asr_excess <= 10
    assert after.c_acc.value >= before.c_acc.value - 5
    truth = np.isin(poisoned.ids, poisoning.ids)
    assert truth[outcome.split.clean].mean() <= 0.005
    assert truth[outcome.split.suspect].mean() >= 0.9
    assert outcome.purification.accepted, outcome.purification.reason
    assert outcome.purification.changed_share < 0.01
    assert outcome.purification.warnings == ()
    assert outcome.purification.used == {}


def test_the_papers_rule_trusts_poison_and_says_so(
    victim: ImageClassifier, poisoned: LabelledImages, poisoning: Poisoning
) -> None:
    outcome = purify_with_pad_ft(victim, poisoned, config=PADFTConfig.as_published(), run=make_run())
    truth = np.isin(poisoned.ids, poisoning.ids)
    in_target = outcome.split.clean[outcome.split.labels[outcome.split.clean] == TARGET]
    assert truth[in_target].mean() > 0.05
    assert "chosen by the model's own losses alone" in " ".join(outcome.purification.warnings)
    assert len(outcome.split.suspect) == 0
    assert outcome.purification.used == {}


def test_scores_that_name_no_suspects_are_said_to(
    victim: ImageClassifier, poisoned: LabelledImages, poisoning: Poisoning
) -> None:
    ranks = scores_of(poisoned, poisoning)
    other = replace(ranks, method="spectral-signatures", axes={"s": ranks.suspicion}, primary="s")
    found = purify_with_pad_ft(victim, poisoned, scores=other, config=QUICK, run=make_run()).purification
    assert found.used == {"clip.rule": "quantile", "unlearn": "0"}
    assert "spectral-signatures name no suspects" in " ".join(found.warnings)
    weak = replace(ranks, details={"clip_agreement": 11.0})
    told = purify_with_pad_ft(victim, poisoned, scores=weak, config=QUICK, run=make_run()).purification.warnings
    assert "CLIP agrees with 11.0 percent" in " ".join(told)


def test_what_is_of_another_order_of_classes_is_refused(
    victim: ImageClassifier, poisoned: LabelledImages, poisoning: Poisoning
) -> None:
    """As where a scan of a folder takes its classes in the order of their names, and a model in its own."""
    ranks = scores_of(poisoned, poisoning)
    names = poisoned.class_names[::-1]
    given: dict[str, Any] = {"class_names": names, "labels": len(names) - 1 - poisoned.labels}
    region = np.full(len(poisoned), CLEAN, dtype=np.int8)
    split = Split(method="x", ids=list(poisoned.ids), region=region, **given)
    with pytest.raises(ResultError, match="another list of classes"):
        purify_with_classic("ft", victim, poisoned, split=split, run=make_run())
    with pytest.raises(ResultError, match="another list of classes"):
        purify_with_pad_ft(victim, poisoned, scores=replace(ranks, **given), run=make_run())
    changed = np.roll(poisoned.labels, 1)
    with pytest.raises(ResultError, match="of other labels"):
        purify_with_classic(
            "ft", victim, poisoned, split=replace(split, class_names=poisoned.class_names, labels=changed),
            run=make_run(),
        )  # fmt: skip
    with pytest.raises(ResultError, match="of other labels"):
        purify_with_pad_ft(victim, poisoned, scores=replace(ranks, labels=changed), run=make_run())


def test_permuted_labels_are_not_accepted(victim: ImageClassifier, poisoned: LabelledImages) -> None:
    permuted = poisoned.with_labels((poisoned.labels + 1) % len(poisoned.class_names))
    region = np.full(len(poisoned), CLEAN, dtype=np.int8)
    split = Split(
        method="x", ids=list(permuted.ids), labels=permuted.labels, region=region, class_names=permuted.class_names
    )
    tuned = purify_with_classic(
        "ft", victim, permuted, split=split, config=FTConfig(steps=20, batch_size=64), run=make_run()
    )
    repaired = purify_with_pad_ft(victim, permuted, scores=scores_of(permuted, None), config=QUICK, run=make_run())
    for found in (tuned.purification, repaired.purification):
        assert found.held_out_after is not None
        assert found.held_out_before is not None
        assert found.held_out_after >= found.held_out_before - found.bound  # what was held out is as wrong
        assert not found.accepted
        assert "hardly better than chance" in found.reason
        assert "labels look shuffled" in " ".join(found.warnings)


def test_a_class_without_trusted_samples_is_refused(
    victim: ImageClassifier, poisoned: LabelledImages, poisoning: Poisoning
) -> None:
    ranks = scores_of(poisoned, poisoning)
    axes = {name: np.where(poisoned.labels == 3, np.nan, values) for name, values in ranks.axes.items()}
    with pytest.raises(NotEnoughDataError, match=poisoned.class_names[3]):
        purify_with_pad_ft(victim, poisoned, scores=replace(ranks, axes=axes), run=make_run())


@pytest.mark.parametrize("method", ["ft", "abl"])
def test_odd_labels_are_suspects_where_they_are_unlearnt(
    method: str, victim: ImageClassifier, poisoned: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def split_by(scores: SampleScores, *, odd: str) -> Split:
        asked.append(odd)
        raise StopIteration

    monkeypatch.setattr("unpoison.api_repairs.zero_shot_logits", lambda *_, **__: ZeroShot(cosines=np.zeros((1, 1))))
    monkeypatch.setattr("unpoison.api_repairs.score_with_cgd", lambda *_, **__: scores_of(poisoned, None))
    monkeypatch.setattr("unpoison.api_repairs.split_by_evidence", split_by)
    with pytest.raises(StopIteration):
        purify_with_classic(method, victim, poisoned, clip=load_clip("tiny"), run=make_run())
    assert asked == ["unlearn" if method == "abl" else "leave-out"]


def test_a_clean_model_keeps_its_accuracy() -> None:
    clean = open_images("shapes:1000:0")
    pixels = load_pixels(clean, 32, cache=None, progress=make_run().progress)
    fresh = new_classifier("small-resnet", clean.class_names, seed=0)
    model = train_classifier(fresh, pixels, clean.labels, run=make_run(), epochs=8, batch_size=64)
    outcome = purify_with_pad_ft(model, clean, scores=scores_of(clean, None), config=PADFTConfig(), run=make_run())
    assert outcome.purification.estimate is not None
    assert not outcome.purification.estimate.poisoned
    test = open_images("shapes:400:1")
    before, after = (evaluate_classifier(one, test, run=make_run()).c_acc.value for one in (model, outcome.classifier))
    assert after >= before - 2


def test_a_classic_takes_any_split(victim: ImageClassifier, poisoned: LabelledImages, poisoning: Poisoning) -> None:
    region = np.where(np.isin(poisoned.ids, poisoning.ids), SUSPECT, CLEAN).astype(np.int8)
    split = Split(
        method="x", ids=list(poisoned.ids), labels=poisoned.labels, region=region, class_names=poisoned.class_names
    )
    config = FTConfig(steps=60, batch_size=64)
    outcome = purify_with_classic("ft", victim, poisoned, split=split, config=config, run=make_run())
    assert outcome.purification.method == "ft"
    assert outcome.purification.suspect_count == 100
    idle = purify_with_classic(
        "ft", victim, poisoned, split=split, config=FTConfig(steps=1, learning_rate=1e-9, batch_size=64), run=make_run()
    ).purification
    assert "percent of the 100 suspects their label" in " ".join(idle.warnings)
    with pytest.raises(ResultError, match="another set"):
        purify_with_classic("ft", victim, poisoned, split=replace(split, ids=split.ids[::-1]), run=make_run())
    with pytest.raises(DataError, match="needs a split"):
        purify_with_classic("ft", victim, poisoned, run=make_run())
    nobody = replace(split, region=np.where(split.labels == 3, SUSPECT, region).astype(np.int8))
    with pytest.raises(NotEnoughDataError, match=poisoned.class_names[3]):
        purify_with_classic("ft", victim, poisoned, split=nobody, run=make_run())


def test_another_training_set_is_noticed(victim: ImageClassifier, poisoned: LabelledImages) -> None:
    assert judge_agreement(90.0, 10, "set") == ()
    assert "hardly is the set" in judge_agreement(45.0, 10, "set")[0]
    assert "shuffled" in judge_agreement(12.0, 10, "set")[0]
