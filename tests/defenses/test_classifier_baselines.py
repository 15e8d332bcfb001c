"""The parts of the clean-data defenses against references in NumPy, and the rules that choose levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from unpoison.data.pixels import Pixels
from unpoison.defenses.baselines.abl import ABLConfig, isolate, local_gradient_ascent
from unpoison.defenses.baselines.anp import ANPConfig, learn_masks, neuron_layers, repair_with_anp
from unpoison.defenses.baselines.fine_pruning import FinePruningConfig, cut_features, repair_with_fine_pruning
from unpoison.defenses.baselines.ft import FTConfig, repair_with_ft
from unpoison.defenses.baselines.ft_sam import worst_change
from unpoison.defenses.baselines.i_bau import IBAUConfig, hypergradient, perturbed_loss, worst_perturbation
from unpoison.defenses.baselines.nad import NADConfig, attention_distance, attention_map, chosen_layers
from unpoison.defenses.repair import CleanData, Repair, acceptable, at_largest_rate, last_acceptable
from unpoison.errors import ConfigError, DivergedError, UnsupportedModelError
from unpoison.models.batch_norm import batch_norms, frozen_statistics
from unpoison.models.classifier import ImageClassifier, new_classifier
from unpoison.results import CLEAN, SUSPECT, Split
from unpoison.runs import Run
from unpoison.types import Classifier

NAMES = ("a", "b", "c")


def run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


def data(count: int = 30) -> CleanData:
    random = np.random.default_rng(0)
    pixels = Pixels(
        array=random.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8),
        usable=np.ones(count, dtype=bool),
        skipped=(),
    )
    labels = np.arange(count) % 3
    region = np.where(np.arange(count) < 3, SUSPECT, CLEAN).astype(np.int8)
    split = Split(method="x", ids=[str(row) for row in range(count)], labels=labels, region=region, class_names=NAMES)
    return CleanData.open(pixels, split, 0.2, run())


def split_of(clean: CleanData) -> Split:
    """Every sample clean."""
    return Split(
        method="x", ids=[str(row) for row in range(len(clean.labels))], labels=clean.labels,
        region=np.full(len(clean.labels), CLEAN, dtype=np.int8), class_names=NAMES,
    )  # fmt: skip


class Tiny(nn.Module):
    """Small enough for brute force, smooth enough for differences."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(3 * 4 * 4, 5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.gelu(self.first(images.flatten(1))))


def tiny() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(module=Tiny().double(), class_names=NAMES, image_size=4)


# ---- FT-SAM


def test_the_worst_change_of_weights() -> None:
    random = np.random.default_rng(0)
    weights, gradients = random.normal(size=(2, 6)), random.normal(size=(2, 6))
    found = worst_change([torch.from_numpy(row) for row in weights], [torch.from_numpy(row) for row in gradients], 2.0)
    norm = np.sqrt(((np.abs(weights) * gradients) ** 2).sum())
    np.testing.assert_allclose(np.stack([value.numpy() for value in found]), 2 * weights**2 * gradients / norm)
    # as far as the constraint allows: || eps / |w| || = rho
    assert np.sqrt(((2 * weights**2 * gradients / norm / np.abs(weights)) ** 2).sum()) == pytest.approx(2)
    assert not worst_change([torch.ones(2)], [None], 2.0)[0].any()


def test_statistics_stay_where_they_are() -> None:
    model = new_classifier("small-resnet", NAMES, image_size=16)
    model.module.train()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    with frozen_statistics(model.module):
        model.logits(torch.rand(4, 3, 16, 16))
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    model.logits(torch.rand(4, 3, 16, 16))
    assert not torch.equal(model.module.state_dict()["norm.running_mean"], before["norm.running_mean"])


# ---- NAD


def test_attention_maps() -> None:
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = (maps.numpy() ** 2).sum(1).reshape(2, 16)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(attention_map(maps), expected, rtol=1e-5)
    tokens = torch.randn(2, 5, 7)
    assert attention_map(tokens).shape == (2, 5)
    assert float(attention_distance(maps, maps)) == 0
    other = maps.roll(1, dims=3)
    assert float(attention_distance(maps, other)) == pytest.approx(
        float(((attention_map(maps) - attention_map(other)) ** 2).mean())
    )


def test_a_layer_of_each_map_size() -> None:
    shapes = [(2, 4, 8, 8), (2, 4, 8, 8), (2, 8, 4, 4), (2, 8, 4, 4), (2, 16)]
    assert chosen_layers([torch.zeros(shape) for shape in shapes]) == [1, 3]
    assert chosen_layers([torch.zeros(2, 5, 8)] * 6) == [2, 3, 5]
    with pytest.raises(UnsupportedModelError):
        chosen_layers([torch.zeros(2, 8)])


# ---- I-BAU


def test_the_hypergradient_is_that_of_the_minimax_problem() -> None:
    """Against differences: solve the inner problem to its end at w and at w + h v, and compare the losses there."""
    model = tiny()
    images, labels = torch.rand(6, 3, 4, 4).double(), torch.arange(6) % 3
    config = IBAUConfig(eta=0.5, decay=1.0, fixed_point_steps=200, radius=100.0)
    weights = list(model.module.parameters())

    def inner(start: Tensor) -> Tensor:
        delta = start.clone()
        for _ in range(400):
            delta.requires_grad_()
            value = perturbed_loss(model, images, labels, delta) - config.decay / 2 * delta.square().sum()
            (gradient,) = torch.autograd.grad(value, [delta])
            delta = (delta + config.eta * gradient).detach()
        return delta

    start = torch.zeros(1, 3, 4, 4).double()
    best = inner(start)
    _, gradients = hypergradient(model, images, labels, best, weights, config)
    direction = [torch.randn_like(weight) for weight in weights]
    step, values = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, way in zip(weights, direction, strict=True):
                weight.add_(sign * step * way)
        values.append(float(perturbed_loss(model, images, labels, inner(start)).detach()))
        with torch.no_grad():
            for weight, way in zip(weights, direction, strict=True):
                weight.sub_(sign * step * way)
    numeric = (values[0] - values[1]) / (2 * step)
    exact = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, direction, strict=True))
    assert exact == pytest.approx(numeric, rel=2e-3)
    direct = torch.autograd.grad(perturbed_loss(model, images, labels, best), weights)
    plain = sum(float((gradient * way).sum()) for gradient, way in zip(direct, direction, strict=True))
    assert abs(plain - numeric) > 2 * abs(exact - numeric)  # the implicit part matters here


def test_the_perturbation_climbs_and_stays_in_its_ball() -> None:
    model = tiny()
    images, labels = torch.rand(6, 3, 4, 4).double(), torch.arange(6) % 3
    delta = worst_perturbation(model, images, labels, IBAUConfig(radius=0.7, ascent_rate=0.2))
    assert float(delta.norm()) <= 0.7 + 1e-6
    assert perturbed_loss(model, images, labels, delta) > perturbed_loss(model, images, labels, torch.zeros_like(delta))


# ---- ANP


def test_masks_are_of_neurons_and_in_range() -> None:
    model = new_classifier("small-resnet", NAMES, image_size=16)
    masks = learn_masks(model, data(), ANPConfig(steps=4, batch_size=8), run())
    layers = batch_norms(model.module)
    assert len(masks["mask"]) == len(masks["mean"]) == sum(len(layer.weight) for _, layer in layers)
    assert all(((values >= 0) & (values <= 1)).all() for values in masks.values())
    assert (masks["mask"] < 1).any()
    assert not any(hasattr(layer, "parametrizations") for _, layer in layers)


def test_networks_without_batch_norm_have_neurons_too() -> None:
    names = [name for name, _ in neuron_layers(ImageClassifier(module=Tiny(), class_names=NAMES, image_size=4))]
    assert names == ["first"]  # not the head


def test_of_equal_masks_the_one_that_fell_first_is_pruned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_classifier("small-resnet", NAMES, image_size=16)
    count = sum(len(layer.weight) for _, layer in batch_norms(model.module))
    found = {"mask": torch.ones(count), "mean": torch.ones(count)}
    found["mask"][:3] = 0
    found["mean"][:3] = torch.tensor([0.9, 0.1, 0.5])
    monkeypatch.setattr("unpoison.defenses.baselines.anp.learn_masks", lambda *_: found)
    clean = data()
    split = split_of(clean)
    config = ANPConfig(prune_fall=100.0, largest_share=1.1 / count, levels=2, held_out=0.2)
    repair = repair_with_anp(model, clean.pixels, split, config, run=run())
    gone = torch.cat([layer.weight == 0 for _, layer in batch_norms(repair.classifier.module)])
    assert gone.nonzero().flatten().tolist() == [1]


class NoHead(nn.Module):
    """A convolution gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(1)


@pytest.mark.parametrize(
    ("repair", "config"), [(repair_with_fine_pruning, FinePruningConfig()), (repair_with_anp, ANPConfig(steps=1))]
)
def test_pruning_needs_a_linear_last_layer(repair: Callable[..., Repair], config: Any) -> None:
    clean = data()
    model = ImageClassifier(module=NoHead(), class_names=NAMES, image_size=16)
    with pytest.raises(UnsupportedModelError, match=r"nn\.Linear"):
        repair(model, clean.pixels, split_of(clean), replace(config, held_out=0.2), run=run())


# ---- fine-tuning


def test_the_largest_rate_that_a_network_bears_is_kept() -> None:
    tried = []

    def attempt(config: FTConfig) -> Repair:
        tried.append(config.learning_rate)
        if config.learning_rate == 0.1:
            raise DivergedError("ft", step=1, loss=float("inf"))
        reached = {0.03: 69.0, 0.02: 69.0, 0.01: 71.0}[config.learning_rate]
        looks = [{"step": 0.0, "held_out_accuracy": 80.0}, {"step": 1.0, "held_out_accuracy": reached}]
        return Repair(classifier=tiny(), history=looks, steps=1)

    assert at_largest_rate(FTConfig(), attempt).held_out_after == 71.0
    assert tried == [0.1, 0.03, 0.01]  # the first diverged, the second cost 11 points of 10
    with pytest.raises(DivergedError):
        at_largest_rate(FTConfig(smaller_rates=()), attempt)
    with pytest.raises(ConfigError, match="must be positive"):
        FTConfig(smaller_rates=(0.01, 0.0))
    tried.clear()
    assert at_largest_rate(FTConfig(learning_rate=0.02), attempt).held_out_after == 71.0
    assert tried == [0.02, 0.01]  # 0.03 is not smaller


def test_batches_of_one_are_refused_where_they_cannot_be_normalised() -> None:
    clean, one = data(), FTConfig(batch_size=1, steps=1, held_out=0.2)
    model = new_classifier("small-resnet", NAMES, image_size=16)
    with pytest.raises(ConfigError, match="BatchNorm"):
        repair_with_ft(model, clean.pixels, split_of(clean), one, run=run())
    plain = ImageClassifier(module=nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), class_names=NAMES, image_size=16)
    repair_with_ft(plain, clean.pixels, split_of(clean), one, run=run())


def test_the_teacher_holds_out_what_the_student_does() -> None:
    assert NADConfig().teacher.held_out == FTConfig().held_out == NADConfig().held_out
    assert NADConfig(held_out=0.3).teacher.held_out == 0.3


def test_pruning_changes_the_neurons_alone() -> None:
    clean, model = data(), new_classifier("small-resnet", NAMES, image_size=16)
    config = ANPConfig(steps=1, prune_fall=100.0, levels=2, held_out=0.2)
    repair = repair_with_anp(model, clean.pixels, split_of(clean), config, run=run())
    before, after = model.module.state_dict(), repair.classifier.module.state_dict()
    neurons = {f"{name}.weight" for name, _ in batch_norms(model.module)}
    assert {key for key in before if not torch.equal(before[key], after[key])} <= neurons
    total = sum(value.numel() for value in model.module.parameters())
    assert repair.changed_share == sum(before[key].numel() for key in neurons) / total


# ---- ABL


def test_losses_are_held_at_gamma() -> None:
    losses = torch.tensor([0.2, 0.9], requires_grad=True)
    value = local_gradient_ascent(losses, 0.5)
    assert float(value.detach()) == pytest.approx((-0.2 + 0.9) / 2)
    value.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [-0.5, 0.5]


def test_the_smallest_losses_are_isolated() -> None:
    model, clean = new_classifier("small-resnet", NAMES, image_size=16), data()
    split = Split(
        method="x", ids=[str(row) for row in range(30)], labels=clean.labels,
        region=np.where(np.arange(30) < 3, SUSPECT, CLEAN).astype(np.int8), class_names=NAMES,
    )  # fmt: skip
    own = isolate(model, clean.pixels, split, clean.rows, ABLConfig(isolation="own", isolated=0.2), run())
    with torch.no_grad(), torch.random.fork_rng():
        model.module.eval()
        images = torch.from_numpy(clean.pixels.array[clean.rows]).permute(0, 3, 1, 2) / 255
        loss = F.cross_entropy(model.logits(images), torch.from_numpy(clean.labels[clean.rows]), reduction="none")
    count = round(0.2 * len(clean.rows))
    assert set(own) == set(clean.rows[loss.argsort()[:count].numpy()])
    assert isolate(model, clean.pixels, split, clean.rows, ABLConfig(), run()).tolist() == [0, 1, 2]
    nothing = replace(split, region=np.full(30, CLEAN, dtype=np.int8))
    assert set(isolate(model, clean.pixels, nothing, clean.rows, ABLConfig(isolated=0.2), run())) == set(own)


# ---- what is kept


def test_chance_is_allowed_for() -> None:
    assert acceptable(98.9, 100.0, 1000, 1.0)
    assert not acceptable(97.5, 100.0, 1000, 1.0)
    assert acceptable(80.0, 90.0, 20, 1.0)  # few samples say little


class Steps(CleanData):
    """Accuracy by level, as a table."""

    def look(self, classifier: Classifier, step: int, run: Run) -> dict[str, float]:
        return {"step": float(step), "held_out_accuracy": classifier.accuracy, "suspect_agreement": 0.0}  # pyright: ignore[reportAttributeAccessIssue]


def test_the_last_acceptable_level_is_kept() -> None:
    table, asked = {0.0: 90.0, 0.1: 91.0, 0.2: 88.0, 0.3: 80.0, 0.4: 95.0}, []
    clean = data()
    steps = Steps(
        pixels=clean.pixels, labels=clean.labels, rows=clean.rows, held_out=clean.held_out, suspect=clean.suspect
    )

    def at(level: float) -> ImageClassifier:
        asked.append(level)
        model = new_classifier("small-resnet", NAMES, image_size=16)
        model.accuracy = table[level]  # pyright: ignore[reportAttributeAccessIssue]
        return model

    found, level, looks = last_acceptable(table, at, steps, 4.0, run=run())
    assert level == 0.2
    assert found is not None
    assert found.accuracy == 88.0  # pyright: ignore[reportAttributeAccessIssue]
    assert asked == [0.0, 0.1, 0.2, 0.3]  # it ends at the first that costs more
    assert [look["level"] for look in looks] == asked


def test_cut_features_no_longer_count() -> None:
    model = new_classifier("small-resnet", NAMES, image_size=16)
    cut_features(model, torch.tensor([0, 5]))
    assert not model.head().weight[:, [0, 5]].any()
    assert model.head().weight[:, 1].any()
