"""The classic detectors: planted poison ranks first, clean labels are not called poisoned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from unpoison.api_detectors import NETWORK_DETECTORS, DetectorConfig, highest, scan_with_detector
from unpoison.api_pairs import PAIR_DETECTORS
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.catalog import DETECTORS
from unpoison.data.pixels import Pixels, load_pixels
from unpoison.data.sources import open_images
from unpoison.detection.activation_clustering import (
    ActivationClusteringConfig,
    activation_clustering,
    silhouette_rows,
)
from unpoison.detection.ibd_psc import IBDPSCConfig, ibd_psc, scale_last
from unpoison.detection.spectral_signatures import spectral_signatures
from unpoison.detection.strip import STRIPConfig, entropy, strip
from unpoison.errors import DataError, NotEnoughDataError, UnsupportedModelError
from unpoison.models.classifier import ImageClassifier, new_classifier
from unpoison.results import SUSPECT, DatasetScan
from unpoison.runs import Run, Silent
from unpoison.training import train_classifier


def run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


def planted(rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [600, 20] of three labels; a share of label 1 lies elsewhere."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 200)
    features = random.normal(0, 1, (600, 20)) + 4 * np.eye(20)[labels]
    truth = (labels == 1) & (random.random(600) < rate)
    features[truth] += 8 * np.eye(20)[7]
    return features.astype(np.float32), labels, truth


def test_clusters_give_the_poison_away() -> None:
    features, labels, truth = planted(0.2)
    scores, verdicts = activation_clustering(features, labels, ActivationClusteringConfig())
    assert roc_auc_score(truth, scores) > 0.98
    assert [entry.label for entry in verdicts if entry.suspicious] == [1]
    assert next(entry.share for entry in verdicts if entry.label == 1) == pytest.approx(truth.sum() / 200, abs=0.02)
    again, _ = activation_clustering(features, labels, ActivationClusteringConfig())
    assert np.array_equal(scores, again)


def test_clean_labels_are_not_called_poisoned() -> None:
    features, labels, _ = planted(0.0)
    _, verdicts = activation_clustering(features, labels, ActivationClusteringConfig())
    assert [entry.label for entry in verdicts] == [0, 1, 2]
    assert not any(entry.suspicious for entry in verdicts)


def test_a_cluster_too_small_for_the_draw_is_seen() -> None:
    random = np.random.default_rng(0)
    features = random.normal(0, 0.1, (3000, 6)).astype(np.float32)
    missed = np.random.RandomState(0).permutation(3000)[1000:][:3]  # none of them in the first thousand
    features[missed] += 50
    scores, (verdict,) = activation_clustering(features, np.zeros(3000, dtype=np.int64), ActivationClusteringConfig())
    assert set(np.argsort(-scores)[:3]) == set(missed)
    assert verdict.share == pytest.approx(0.001)
    assert verdict.silhouette > 0.9


def test_the_silhouette_is_that_of_an_even_draw() -> None:
    from sklearn.metrics import silhouette_score

    random = np.random.default_rng(1)
    points, parts = random.normal(0, 1, (2500, 3)), (np.arange(2500) % 4 == 0).astype(np.int64)
    rows = silhouette_rows(parts, 7)
    assert silhouette_score(points[rows], parts[rows]) == silhouette_score(
        points, parts, sample_size=1000, random_state=7
    )


def test_degenerate_labels_score_nothing() -> None:
    features, labels = np.zeros((9, 4), dtype=np.float32), np.array([0] * 6 + [1] * 3)
    scores, verdicts = activation_clustering(features, labels, ActivationClusteringConfig())
    assert not scores.any()
    assert verdicts == []
    assert not spectral_signatures(features, labels).any()


def test_signatures_are_projections_on_the_top_singular_vector() -> None:
    features, labels, truth = planted(0.2)
    scores = spectral_signatures(features, labels)
    for label in range(3):
        rows = np.flatnonzero(labels == label)
        centered = features[rows].astype(np.float64) - features[rows].mean(0, dtype=np.float64)
        top = np.linalg.svd(centered, full_matrices=False)[2][0]
        np.testing.assert_allclose(np.abs(scores[rows]), np.abs(centered @ top), rtol=1e-6, atol=1e-9)
        assert (scores[rows] ** 3).sum() >= 0  # the longer tail is the suspicious side
    assert roc_auc_score(truth[labels == 1], scores[labels == 1]) > 0.98
    assert roc_auc_score(truth, scores) > 0.9  # the label that the poison spreads comes first


@dataclass
class Passes(Silent):
    """Counts forward passes for features."""

    count: int

    def track(
        self, items: Iterable[Any], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[Any]:
        self.count += what == "features"
        return super().track(items, total=total, what=what, weight=weight, unit=unit)


def test_features_are_computed_once_for_all_detectors(trained: Any, tmp_path: Path) -> None:
    source, model, _ = trained
    passes = Passes(0)
    working = Run(seed=0, progress=passes, cache=tmp_path)
    first = scan_with_detector(source, "spectral-signatures", classifier=model, run=working)
    assert passes.count == 1
    again = scan_with_detector(source, "spectral-signatures", classifier=model, run=working)
    scan_with_detector(source, "activation-clustering", classifier=model, run=working)
    assert passes.count == 1
    np.testing.assert_array_equal(first.scores.suspicion, again.scores.suspicion)
    (file,) = (tmp_path / "features").iterdir()
    file.write_bytes(file.read_bytes()[:100])  # damaged: computed again
    repaired = scan_with_detector(source, "spectral-signatures", classifier=model, run=working)
    assert passes.count == 2
    np.testing.assert_array_equal(first.scores.suspicion, repaired.scores.suspicion)
    other = model.copy()
    with torch.no_grad():
        next(other.module.parameters()).mul_(1.01)
    scan_with_detector(source, "spectral-signatures", classifier=other, run=working)
    assert passes.count == 3


class Corner(nn.Module):
    """Says 0 wherever the corner is white, else what the brightness says, unsure of it."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(2, count)
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.bias.zero_()
            self.fc.weight[0, 0] = 30
            self.fc.weight[1:, 1] = torch.tensor([3.0, -3.0, 1.0])

    def forward(self, images: Tensor) -> Tensor:
        seen = self.norm(images)
        corner = (images[:, :, -2:, -2:].mean(dim=(1, 2, 3)) > 0.99).float()
        return self.fc(torch.stack([corner, seen.mean(dim=(1, 2, 3))], dim=1))


def cornered() -> tuple[ImageClassifier, Pixels, np.ndarray]:
    random = np.random.default_rng(0)
    array = random.integers(0, 200, (60, 8, 8, 3)).astype(np.uint8)
    truth = np.arange(60) % 6 == 0
    array[truth, -2:, -2:] = 255
    model = ImageClassifier(
        module=Corner().eval(),
        class_names=("a", "b", "c", "d"),
        image_size=8,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    return model, Pixels(array=array, usable=np.ones(60, dtype=bool), skipped=()), truth


def test_triggered_images_keep_their_label_under_others() -> None:
    model, pixels, truth = cornered()
    scores = strip(model, pixels, np.arange(60), STRIPConfig(overlays=8), run=run())
    assert roc_auc_score(truth, scores) == 1.0
    assert (scores <= 1e-6).all()
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    p = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    assert float(entropy(logits)) == pytest.approx(float(-(p * np.log(p)).sum()))


def test_scaling_the_last_layers_only() -> None:
    model = new_classifier("small-resnet", ("a", "b"), image_size=16)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    scaled = scale_last(model, 2, 1.5).module.state_dict()
    changed = [key for key in before if not torch.equal(before[key], scaled[key])]
    assert changed == ["blocks.2.bn2.weight", "norm.weight"]  # biases are zero as drawn
    torch.testing.assert_close(scaled["norm.weight"], 1.5 * before["norm.weight"])
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())


def test_consistency_needs_batch_norm_and_lies_in_range() -> None:
    model, pixels, _ = cornered()
    scores = ibd_psc(model, pixels, np.arange(60), IBDPSCConfig(samples=20), run=run())
    assert ((scores >= 0) & (scores <= 1)).all()
    plain = ImageClassifier(module=nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), class_names=("a", "b"), image_size=8)
    with pytest.raises(UnsupportedModelError, match="BatchNorm"):
        ibd_psc(plain, pixels, np.arange(60), IBDPSCConfig(), run=run())


@pytest.fixture(scope="module")
def trained() -> Any:
    clean = open_images("shapes:1200:0")
    poisoning = plan_poisoning(clean, "badnet", rate=0.05, target=4, share=0.4)
    source = apply_poisoning(clean, poisoning)
    fresh = new_classifier("small-resnet", source.class_names, seed=0)
    pixels = load_pixels(source, 32, cache=None, progress=run().progress)
    model = train_classifier(fresh, pixels, source.labels, run=run(), epochs=10, batch_size=64)
    return source, model, np.isin(source.ids, poisoning.ids)


@pytest.mark.parametrize("method", NETWORK_DETECTORS)
def test_a_scan_scores_planted_poison(method: str, trained: Any, tmp_path: Any) -> None:
    source, model, truth = trained
    outcome = scan_with_detector(source, method, classifier=model, run=run())
    found = outcome.scores.suspicion
    assert np.isfinite(found).all()
    if method == "activation-clustering":
        assert roc_auc_score(truth, found) > 0.85
    elif method == "ibd-psc":
        assert roc_auc_score(truth, found) > 0.7
    elif method == "spectral-signatures":  # it compares samples of one label
        of_target = source.labels == 4
        assert roc_auc_score(truth[of_target], found[of_target]) > 0.7
    assert outcome.scan.flagged == (outcome.split.region == SUSPECT).sum()
    assert outcome.scan.inconclusive
    assert not outcome.scan.estimate.poisoned
    assert sum(outcome.scan.flagged_per_class.values()) == outcome.scan.flagged
    outcome.scan.save(tmp_path / "scan.json")
    assert DatasetScan.load(tmp_path / "scan.json") == outcome.scan
    assert {sample["id"] for sample in outcome.samples} <= set(source.ids)


def test_a_network_is_trained_where_none_is_given(trained: Any) -> None:
    source, _, _ = trained
    outcome = scan_with_detector(source, "spectral-signatures", config=DetectorConfig(epochs=1), run=run())
    assert outcome.scan.flagged == round(1.5 * 0.05 * len(source))
    assert outcome.scan.inputs == {"network": "small-resnet"}


@pytest.mark.parametrize("method", ["activation-clustering", "spectral-signatures"])
def test_features_need_a_linear_last_layer(method: str, trained: Any) -> None:
    source, _, _ = trained
    network = nn.Sequential(nn.Conv2d(3, len(source.class_names), 32), nn.Flatten())
    model = ImageClassifier(module=network, class_names=source.class_names)
    with pytest.raises(UnsupportedModelError, match=r"nn\.Linear"):
        scan_with_detector(source, method, classifier=model, run=run())


def test_a_network_of_other_classes_is_refused(trained: Any) -> None:
    source, _, _ = trained
    with pytest.raises(DataError, match="classes"):
        scan_with_detector(source, "strip", classifier=new_classifier("small-resnet", ("a", "b")), run=run())
    with pytest.raises(NotEnoughDataError):
        scan_with_detector(open_images("shapes:20"), "strip", run=run())


def test_the_catalog_lists_them() -> None:
    of_models = {entry.name for entry in DETECTORS if entry.function == "unpoison.api_models:scan_model"}
    assert of_models == {"neural-cleanse", "decree"}
    assert {entry.name for entry in DETECTORS} - of_models == {"cgd", *NETWORK_DETECTORS, *PAIR_DETECTORS}
    assert highest(np.array([3.0, 1.0, 2.0, 0.0]), 0.34).tolist() == [True, False, True, False]
