"""The whole way on planted poison: a backdoored model, found out and repaired; and the clean control."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from unpoison.api import PurifyOutcome, ScanOutcome, purify_with_cgd, scan_dataset
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.data.pixels import load_pixels
from unpoison.data.shapes import make_shapes
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.cgd import CGDConfig
from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS, SeparationConfig
from unpoison.errors import ConfigError, NotEnoughDataError, ResultError
from unpoison.evaluation.classifier import evaluate_classifier
from unpoison.models.checkpoints import hash_weights
from unpoison.models.classifier import new_classifier
from unpoison.models.image_classifier import ImageClassifier
from unpoison.results import Evaluation
from unpoison.runs import Run, RunFolder
from unpoison.training import train_classifier
from unpoison.types import Embeddings, Images

TRAIN, TARGET = 1000, 4
CONFIG = CGDConfig(
    separation=SeparationConfig(scorers=1, scorer_epochs=5, scorer_batch_size=64, scorer_learning_rate=1e-3),
    steps=100,
    check_every=50,
    batch_size=64,
)


class Oracle:
    """A CLIP that knows the pictures by their upper rows, where no patch is put, and errs on ``wrong`` of them."""

    image_size, logit_scale, fingerprint = 32, 100.0, "oracle"

    def __init__(self, seeds: Sequence[int], class_names: tuple[str, ...], *, wrong: float = 0.1) -> None:
        self.module = nn.Linear(1, 1)
        self.class_names = class_names
        self.opinions: dict[bytes, np.ndarray] = {}
        for seed in seeds:
            world, random = make_shapes(TRAIN, seed=seed), np.random.default_rng(seed)
            for picture, label in zip(world.images, world.labels, strict=True):
                opinion = random.normal(0, 0.25, len(class_names))
                opinion[random.integers(len(class_names)) if random.random() < wrong else label] += 1
                self.opinions[self.key(picture)] = opinion / np.linalg.norm(opinion)

    @staticmethod
    def key(picture: np.ndarray) -> bytes:
        return hashlib.blake2b(np.ascontiguousarray(picture[:12]).tobytes(), digest_size=16).digest()

    def preprocess(self, images: Sequence[object]) -> Images:
        arrays = [np.asarray(image) for image in images if isinstance(image, Image.Image)]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255

    def encode_images(self, images: Images) -> Embeddings:
        pictures = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return torch.from_numpy(np.stack([self.opinions[self.key(picture)] for picture in pictures])).float()

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        rows = [[float(f" {name}." in text) for name in self.class_names] for text in texts]
        return nn.functional.normalize(torch.tensor(rows), dim=1)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        return [False] * len(texts)


@dataclass(frozen=True)
class Case:
    poisoned: LabelledImages
    truth: np.ndarray
    scan: ScanOutcome
    outcome: PurifyOutcome
    before: Evaluation
    after: Evaluation
    victim: ImageClassifier


def make_run(folder: RunFolder | None = None) -> Run:
    return Run(accelerator=Accelerator(cpu=True), seed=0, folder=folder)


@pytest.fixture(scope="module")
def clean() -> LabelledImages:
    return open_images(f"shapes:{TRAIN}:0")


@pytest.fixture(scope="module")
def oracle(clean: LabelledImages) -> Oracle:
    return Oracle([0], clean.class_names)


@pytest.fixture(scope="module")
def case(clean: LabelledImages, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Case:
    poisoning = plan_poisoning(clean, "badnet", rate=0.1, target=TARGET, share=0.4)
    poisoned = apply_poisoning(clean, poisoning)
    pixels = load_pixels(poisoned, 32, cache=None, progress=make_run().progress)
    fresh = new_classifier("small-resnet", clean.class_names, seed=0)
    victim = train_classifier(fresh, pixels, poisoned.labels, run=make_run(), epochs=8, batch_size=64)
    folder = RunFolder.open(tmp_path_factory.mktemp("planted"), {})
    scan = scan_dataset(poisoned, clip=oracle, config=CONFIG, run=make_run(folder))
    # in the same folder, so that the early models are trained once
    outcome = purify_with_cgd(victim, poisoned, clip=oracle, config=CONFIG, run=make_run(folder))
    test = open_images("shapes:400:1")
    before, after = (
        evaluate_classifier(model, test, poisoning=poisoning, run=make_run()) for model in (victim, outcome.classifier)
    )
    truth = np.isin(poisoned.ids, poisoning.ids)
    return Case(poisoned, truth, scan, outcome, before, after, victim)


def test_the_victim_is_backdoored(case: Case) -> None:
    assert case.before.asr_excess is not None
    assert case.before.asr_excess >= 80
    assert case.before.c_acc.value >= 60


def test_the_poison_is_found(case: Case) -> None:
    split = case.outcome.split
    assert split.estimate is not None
    assert split.estimate.poisoned
    assert split.estimate.target_labels == (TARGET,)
    assert split.estimate.rate == pytest.approx(0.1, abs=0.03)
    flagged = np.zeros(TRAIN, dtype=bool)
    flagged[split.suspect] = True
    assert (flagged & case.truth).sum() / case.truth.sum() >= 0.9
    assert (flagged & case.truth).sum() / flagged.sum() >= 0.9
    assert case.truth[split.clean].mean() <= 0.01
    for axis in (CLIP_AXIS, EARLY_AXIS, "joint_rank"):
        assert roc_auc_score(case.truth, case.outcome.scores.axes[axis]) >= 0.85, axis


def test_the_backdoor_is_gone_and_the_rest_is_kept(case: Case) -> None:
    purification = case.outcome.purification
    assert purification.accepted
    assert "Held-out" in purification.reason
    assert purification.history[-1]["suspect_agreement"] < purification.history[0]["suspect_agreement"] - 50
    assert case.after.asr_excess is not None
    assert case.after.asr_excess <= 10
    assert case.after.c_acc.value >= case.before.c_acc.value - 3


def test_permuted_labels_are_not_accepted(case: Case, oracle: Oracle) -> None:
    permuted = case.poisoned.with_labels((case.poisoned.labels + 1) % len(case.poisoned.class_names))
    scores = replace(case.scan.scores, labels=permuted.labels, details={"clip_agreement": 9.0})
    found = purify_with_cgd(
        case.victim, permuted, clip=oracle, scores=scores, config=replace(CONFIG, steps=50), run=make_run()
    ).purification
    assert found.steps > 0
    assert not found.accepted
    assert "hardly better than chance" in found.reason
    assert "labels look shuffled" in found.warnings[0]
    assert "CLIP agrees with 9.0 percent" in found.warnings[1]
    assert case.outcome.purification.warnings == ()


def test_what_does_not_belong_to_the_set_is_refused(case: Case, oracle: Oracle) -> None:
    scores, names = case.scan.scores, case.poisoned.class_names
    for wrong, words in (
        (replace(scores, class_names=names[::-1]), "another list of classes"),
        (replace(scores, labels=np.roll(scores.labels, 1)), "of other labels"),
        (replace(scores, ids=scores.ids[::-1]), "another set"),
        (replace(scores, axes={"x": scores.suspicion}, primary="x"), "not CGD's"),
    ):
        with pytest.raises(ResultError, match=words):
            purify_with_cgd(case.victim, case.poisoned, clip=oracle, scores=wrong, config=CONFIG, run=make_run())


def test_a_class_without_clean_samples_is_refused(case: Case, oracle: Oracle) -> None:
    scores = case.scan.scores
    axes = {name: np.where(scores.labels == 3, np.nan, values) for name, values in scores.axes.items()}
    with pytest.raises(NotEnoughDataError, match=case.poisoned.class_names[3]):
        purify_with_cgd(
            case.victim, case.poisoned, clip=oracle, scores=replace(scores, axes=axes), config=CONFIG, run=make_run()
        )


def test_batches_of_one_are_refused_where_they_cannot_be_normalised(case: Case, oracle: Oracle) -> None:
    config = replace(CONFIG, batch_size=1)
    with pytest.raises(ConfigError, match="BatchNorm"):
        purify_with_cgd(case.victim, case.poisoned, clip=oracle, scores=case.scan.scores, config=config, run=make_run())


def test_a_repair_that_unlearns_nothing_is_refused(case: Case, oracle: Oracle) -> None:
    config = replace(CONFIG, beta=0.0, alpha=0.0, insist=0.0)
    found = purify_with_cgd(
        case.victim, case.poisoned, clip=oracle, scores=case.scan.scores, config=config, run=make_run()
    ).purification
    assert found.history[-1]["suspect_agreement"] > 20
    assert not found.accepted
    assert "of the suspects their label" in found.reason


def test_the_report_shows_the_most_suspicious_first(case: Case) -> None:
    samples = case.outcome.samples
    assert len({sample["id"] for sample in samples}) == len(samples)
    suspects = [sample for sample in samples if sample["region"] == "suspect"]
    assert len(suspects) == 48
    assert {sample["label"] for sample in suspects} == {case.poisoned.class_names[TARGET]}
    assert [sample["region"] for sample in samples[48:]] == ["clean"] * 12
    ranks = [min(sample[CLIP_AXIS], sample[EARLY_AXIS]) for sample in suspects]
    assert ranks == sorted(ranks, reverse=True)


def test_scan_and_purification_find_the_same(case: Case) -> None:
    assert (case.scan.split.region == case.outcome.split.region).all()
    assert case.scan.scan.estimate == case.outcome.purification.estimate
    assert case.scan.scan.flagged_per_class[case.poisoned.class_names[TARGET]] == case.scan.scan.flagged


def test_a_clean_set_and_its_model_are_left_alone(case: Case, clean: LabelledImages, oracle: Oracle) -> None:
    model = case.victim  # it knows these labels as well
    outcome = purify_with_cgd(model, clean, clip=oracle, config=CONFIG, run=make_run())
    assert outcome.split.estimate is not None
    assert not outcome.split.estimate.poisoned
    assert (outcome.split.region == 0).all()
    assert outcome.purification.accepted
    assert outcome.purification.steps == 0
    assert "No evidence" in outcome.purification.reason
    assert outcome.classifier is not model
    assert hash_weights(outcome.classifier.weights()) == hash_weights(model.weights())
