"""Training loops: a run that was cut short and continued gives the weights of one that was not, bit by bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from unpoison.data.pixels import Pixels
from unpoison.data.shapes import SHAPES_CLASSES, make_shapes
from unpoison.defenses.cgd import CGDConfig, Repair, repair_with_cgd
from unpoison.detection.cgd import (
    SeparationConfig,
    apply_classifier,
    early_model_logits,
    train_early_model,
    training_rows,
)
from unpoison.errors import DivergedError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.image_classifier import ImageClassifier
from unpoison.results import CLEAN, MIXED, SKIPPED, SUSPECT, Split
from unpoison.runs import Run, RunFolder
from unpoison.training import restore, state_of, train_classifier

CLASSES = SHAPES_CLASSES


def make_network() -> nn.Module:
    """Small, with all that makes resuming hard: batch statistics, dropout, a frozen layer."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, len(CLASSES)),
    )  # fmt: skip
    net[3].requires_grad_(False)
    return net


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageClassifier(module=make_network(), class_names=CLASSES, build=make_network)


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    usable = np.ones(240, dtype=bool)
    usable[[3, 77]] = False
    return Pixels(array=make_shapes(240).images, usable=usable, skipped=())


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return make_shapes(240).labels


@pytest.fixture(scope="module")
def split(labels: np.ndarray) -> Split:
    region = np.full(240, CLEAN, dtype=np.int8)
    region[:40], region[40:60], region[[3, 77]] = SUSPECT, MIXED, SKIPPED
    return Split(method="cgd", ids=[str(row) for row in range(240)], labels=labels, region=region, class_names=CLASSES)


SEPARATION = SeparationConfig(scorers=3, scorer_epochs=2, scorer_batch_size=64, scorer_learning_rate=1e-2)
REPAIR = CGDConfig(separation=SEPARATION, steps=11, check_every=3, batch_size=32, held_out=0.1)


def make_run(folder: Path | None = None, seed: int = 0) -> Run:
    opened = None if folder is None else RunFolder.open(folder, {"seed": seed})
    return Run(accelerator=Accelerator(cpu=True), seed=seed, folder=opened)


def train(classifier: ImageClassifier, pixels: Pixels, labels: np.ndarray, run: Run) -> str:
    trained = train_classifier(classifier, pixels, labels, run=run, epochs=4, batch_size=64)
    return hash_weights(trained.weights())


def score(classifier: ImageClassifier, pixels: Pixels, labels: np.ndarray, run: Run) -> bytes:
    return early_model_logits(classifier, pixels, labels, SEPARATION, run=run).tobytes()


def repaired(classifier: ImageClassifier, pixels: Pixels, split: Split, run: Run) -> Repair:
    cosines = np.random.default_rng(0).uniform(0.1, 0.3, (240, len(CLASSES))).astype(np.float32)
    return repair_with_cgd(classifier, pixels, split, cosines, REPAIR, run=run)


def check_resume(once: Callable[[Run], object], steps: list[str], folder: Path) -> None:
    """The whole run, then one that finds only the first k of its steps done, for every k."""
    whole = once(make_run(folder / "whole"))
    assert sorted(path.stem for path in (folder / "whole" / "steps").iterdir()) == steps
    for done in range(len(steps)):
        part = folder / f"first-{done}"
        RunFolder.open(part, {"seed": 0})
        for name in steps[:done]:
            shutil.copy(folder / "whole" / "steps" / f"{name}.safetensors", part / "steps")
        torch.rand(done)  # the global random state of the second process is another one
        assert once(make_run(part)) == whole, f"{done} of {len(steps)} steps done"
    assert once(make_run()) == whole
    assert once(make_run(seed=1)) != whole


def test_training_resumes_bit_by_bit(
    classifier: ImageClassifier, pixels: Pixels, labels: np.ndarray, tmp_path: Path
) -> None:
    before = hash_weights(classifier.weights())
    steps = [f"train-{epoch:03d}" for epoch in range(4)]
    check_resume(lambda run: train(classifier, pixels, labels, run), steps, tmp_path)
    assert hash_weights(classifier.weights()) == before


def test_early_models_resume_bit_by_bit(
    classifier: ImageClassifier, pixels: Pixels, labels: np.ndarray, tmp_path: Path
) -> None:
    steps = [f"scorer-{index}" for index in range(3)]
    check_resume(lambda run: score(classifier, pixels, labels, run), steps, tmp_path)


def test_the_repair_resumes_bit_by_bit(
    classifier: ImageClassifier, pixels: Pixels, split: Split, tmp_path: Path
) -> None:
    def once(run: Run) -> tuple[str, list[dict[str, float]]]:
        repair = repaired(classifier, pixels, split, run)
        return hash_weights(repair.classifier.weights()), repair.history

    before = hash_weights(classifier.weights())
    check_resume(once, [f"repair-{start:05d}" for start in (0, 3, 6, 9)], tmp_path)
    assert hash_weights(classifier.weights()) == before


def test_early_logits_are_a_mean_over_usable_rows(
    classifier: ImageClassifier, pixels: Pixels, labels: np.ndarray
) -> None:
    found = early_model_logits(classifier, pixels, labels, SEPARATION, run=make_run())
    assert np.isnan(found[[3, 77]]).all()
    assert np.isfinite(np.delete(found, [3, 77], axis=0)).all()
    one = SeparationConfig(scorers=1, scorer_epochs=2, scorer_batch_size=64, scorer_learning_rate=1e-2)
    alone = early_model_logits(classifier, pixels, labels, one, run=make_run())
    assert not np.allclose(np.nan_to_num(alone), np.nan_to_num(found))


def test_early_models_of_a_sample_judge_every_row(
    classifier: ImageClassifier, pixels: Pixels, labels: np.ndarray
) -> None:
    config = replace(SEPARATION, scorers=1, scorer_samples=100)
    run = make_run()
    drawn = training_rows(240, config, run)
    assert len(np.unique(drawn)) == 100
    assert (np.diff(drawn) > 0).all()
    found = early_model_logits(classifier, pixels, labels, config, run=run)
    assert np.flatnonzero(np.isnan(found[:, 0])).tolist() == [3, 77]
    sample = Pixels(array=pixels.array[drawn], usable=pixels.usable[drawn], skipped=())
    rows = np.flatnonzero(sample.usable)
    alone = train_early_model(classifier, sample, labels[drawn], rows, config, 0, run=run)
    usable = np.flatnonzero(pixels.usable)
    np.testing.assert_array_equal(found[usable], apply_classifier(alone, pixels, usable, run=run))
    whole = early_model_logits(classifier, pixels, labels, replace(config, scorer_samples=None), run=run)
    assert not np.allclose(whole[usable], found[usable])
    more = early_model_logits(classifier, pixels, labels, replace(config, scorer_samples=5_000), run=run)
    np.testing.assert_array_equal(more, whole)


def test_the_history_of_a_repair(classifier: ImageClassifier, pixels: Pixels, split: Split) -> None:
    repair = repaired(classifier, pixels, split, make_run())
    assert [look["step"] for look in repair.history] == [0, 3, 6, 9, 11]
    assert repair.steps == 11
    guesses = apply_classifier(classifier.copy(), pixels, split.suspect, run=make_run()).argmax(1)
    agreement = 100 * float((guesses == split.labels[split.suspect]).mean())
    assert repair.history[0]["suspect_agreement"] == pytest.approx(agreement)
    assert not repair.classifier.module.training


def test_a_repair_goes_on_while_the_suspects_are_believed(
    classifier: ImageClassifier, pixels: Pixels, split: Split, tmp_path: Path
) -> None:
    cosines = np.random.default_rng(0).uniform(0.1, 0.3, (240, len(CLASSES))).astype(np.float32)
    config = replace(REPAIR, believed=0.0)
    once = lambda run: repair_with_cgd(classifier, pixels, split, cosines, config, run=run)  # noqa: E731
    whole, before = once(make_run(tmp_path / "whole")), repaired(classifier, pixels, split, make_run())
    assert [look["step"] for look in whole.history] == [0, 3, 6, 9, 11, 14, 17, 20, 22]
    assert whole.history[:5] == before.history
    part = tmp_path / "part"
    (part / "steps").mkdir(parents=True)
    for name in ("repair-00000", "repair-00011", "repair-00014"):
        shutil.copy(tmp_path / "whole" / "steps" / f"{name}.safetensors", part / "steps")
    shutil.copy(tmp_path / "whole" / "run.json", part)
    again = once(make_run(part))
    assert hash_weights(again.classifier.weights()) == hash_weights(whole.classifier.weights())
    assert again.history == whole.history


def test_states_are_whole_and_share_no_memory() -> None:
    net = make_network()
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, momentum=0.9)

    def step() -> None:
        net(torch.ones(4, 3, 32, 32)).square().mean().backward()
        optimiser.step()

    step()
    kept = state_of(net, optimiser)
    state = {name: value.clone() for name, value in kept.items()}
    step()
    assert all(torch.equal(kept[name], value) for name, value in state.items())
    restore(net, optimiser, state)
    found: dict[str, Tensor] = state_of(net, optimiser)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_training_learns_and_says_when_it_diverges(
    classifier: ImageClassifier, pixels: Pixels, labels: np.ndarray
) -> None:
    with pytest.raises(DivergedError, match="Training diverged at step"):
        train_classifier(classifier, pixels, labels, run=make_run(), epochs=4, learning_rate=1e12, batch_size=64)
    rows = np.flatnonzero(pixels.usable)

    def accuracy(model: ImageClassifier, truth: np.ndarray) -> float:
        return float((apply_classifier(model.copy(), pixels, rows, run=make_run()).argmax(1) == truth[rows]).mean())

    bright = (pixels.array.mean(axis=(1, 2, 3)) > 127).astype(np.int64)
    trained = train_classifier(classifier, pixels, bright, run=make_run(), epochs=10, batch_size=32, augment=False)
    assert accuracy(trained, bright) > 0.9
    assert accuracy(classifier, bright) < 0.7


@pytest.mark.parametrize(("samples", "size"), [(50_000, 256), (10_000, 256), (2_500, 32), (300, 16), (9, 9), (1, 1)])
def test_small_sets_get_smaller_batches_so_that_triggers_are_learnt(samples: int, size: int) -> None:
    assert SeparationConfig().batch_size(samples) == size
    assert SeparationConfig(scorer_batch_size=64).batch_size(samples) == min(64, samples)
