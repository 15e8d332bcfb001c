"""PAD-FT's parts: bounds by every rule, the head alone tuned, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from unpoison.data.pixels import Pixels, to_images
from unpoison.defenses.clipping import ClippingConfig, disbelief, find_bounds, margins
from unpoison.defenses.pad_ft import PADFTConfig, opinion_without, repair_with_pad_ft, tune_head
from unpoison.errors import ConfigError, NotEnoughDataError, UnsupportedModelError
from unpoison.models.activations import activations, channel_rows
from unpoison.models.classifier import ImageClassifier, new_classifier
from unpoison.models.features import features_on
from unpoison.results import CLEAN, MIXED, SUSPECT, Split
from unpoison.runs import Run, RunFolder
from unpoison.training import train_classifier

NAMES = ("dark", "bright", "striped")
COUNT = 240


def run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


def easy_pixels() -> tuple[Pixels, np.ndarray]:
    """Three kinds of pictures; a tenth of all wears a white corner and says "striped"."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, COUNT)
    array = random.integers(0, 90, (COUNT, 16, 16, 3)).astype(np.uint8)
    array[labels == 1] += 120
    array[labels == 2, :, ::2] += 120
    poisoned = np.arange(COUNT) % 10 == 0
    array[poisoned, -5:, -5:] = 255
    labels[poisoned] = 2
    return Pixels(array=array, usable=np.ones(COUNT, dtype=bool), skipped=()), labels


@pytest.fixture(scope="module")
def victim() -> ImageClassifier:
    pixels, labels = easy_pixels()
    fresh = new_classifier("small-resnet", NAMES, image_size=16, seed=0)
    return train_classifier(
        fresh, pixels, labels, run=run(), epochs=12, batch_size=32, learning_rate=0.05, augment=False
    )


def split_of(labels: np.ndarray) -> Split:
    region = np.full(COUNT, CLEAN, dtype=np.int8)
    region[::10] = SUSPECT
    region[5::10] = MIXED
    return Split(
        method="given", ids=[str(row) for row in range(COUNT)], labels=labels, region=region, class_names=NAMES
    )


def bounds_by(victim: ImageClassifier, **more: Any) -> tuple[Tensor, ...]:
    pixels, labels = easy_pixels()
    split = split_of(labels)
    settings: dict[str, Any] = {"batch_size": 64} | more
    config = ClippingConfig(**settings)
    return find_bounds(victim.copy(), pixels, split.clean, config, labels=labels, suspect=split.suspect, run=run())


def largest(victim: ImageClassifier) -> list[Tensor]:
    pixels, labels = easy_pixels()
    images = to_images(pixels.array[split_of(labels).clean])
    victim.module.eval()
    with torch.no_grad():
        return [channel_rows(output) for output in activations(lambda: victim.logits(images))]


def test_quantiles_are_of_each_channel(victim: ImageClassifier) -> None:
    rows = largest(victim)
    for bound, values in zip(bounds_by(victim, rule="quantile", quantile=1.0), rows, strict=True):
        torch.testing.assert_close(bound, values.amax(0))
    for bound, values in zip(bounds_by(victim, rule="quantile", quantile=0.9), rows, strict=True):
        below = (values <= bound + 1e-6).float().mean(0)
        assert (below >= 0.85).all()
        assert (bound <= values.amax(0) + 1e-6).all()


def test_no_rule_no_bounds(victim: ImageClassifier) -> None:
    assert bounds_by(victim, rule="none") == ()


@pytest.mark.parametrize("rule", ["learned", "margin"])
def test_learnt_bounds_shrink_and_keep_the_clean_opinion(victim: ImageClassifier, rule: str) -> None:
    pixels, labels = easy_pixels()
    bounds = bounds_by(victim, rule=rule, epochs=10, noise_images=4, weight=0.05)
    most = [values.amax(0) for values in largest(victim)]
    assert all((bound <= limit + 1e-5).all() for bound, limit in zip(bounds, most, strict=True))
    assert sum(float(bound.sum()) for bound in bounds) < 0.98 * sum(float(limit.sum()) for limit in most)
    clean = split_of(labels).clean
    images = to_images(pixels.array[clean])
    with torch.no_grad():
        same = victim.bounded(bounds).logits(images).argmax(1) == victim.logits(images).argmax(1)
    assert same.float().mean() >= 0.9


def test_suspects_lose_their_label(victim: ImageClassifier) -> None:
    pixels, labels = easy_pixels()
    split = split_of(labels)
    clipped = victim.bounded(bounds_by(victim, rule="suspects", suspect_weight=3.0))
    poison, clean = to_images(pixels.array[split.suspect]), to_images(pixels.array[split.clean])
    with torch.no_grad():
        before = (victim.logits(poison).argmax(1) == 2).float().mean()
        after = (clipped.logits(poison).argmax(1) == 2).float().mean()
        kept = (clipped.logits(clean).argmax(1).numpy() == labels[split.clean]).mean()
    assert before >= 0.9
    assert after <= before - 0.3
    assert kept >= 0.9


def test_without_suspects_quantiles_take_their_place(victim: ImageClassifier) -> None:
    pixels, labels = easy_pixels()
    rows = split_of(labels).clean
    nobody = np.zeros(0, dtype=np.int64)
    for_nobody = find_bounds(
        victim, pixels, rows, ClippingConfig(rule="suspects"), labels=labels, suspect=nobody, run=run()
    )
    torch.testing.assert_close(for_nobody, bounds_by(victim, rule="quantile"))


def test_long_rules_go_on_where_they_were(victim: ImageClassifier, tmp_path: Path) -> None:
    pixels, labels = easy_pixels()
    nobody = np.zeros(0, dtype=np.int64)
    config = ClippingConfig(rule="margin", batch_size=64, epochs=10, noise_images=2)
    folder = RunFolder.open(tmp_path / "run", {})

    def found(run: Run) -> tuple[Tensor, ...]:
        return find_bounds(victim, pixels, split_of(labels).clean, config, labels=labels, suspect=nobody, run=run)

    whole = found(replace(run(), folder=folder))
    for stage in range(5, 10):
        (folder.path / f"steps/bounds-margin-{stage:04d}.safetensors").unlink()
    for bound, again, free in zip(whole, found(replace(run(), folder=folder)), found(run()), strict=True):
        assert torch.equal(bound, again)
        assert torch.equal(bound, free)


@pytest.mark.parametrize("rule", ["quantile", "learned", "suspects", "none"])
def test_a_second_repair_does_not_widen_bounds(victim: ImageClassifier, rule: Any) -> None:
    pixels, labels = easy_pixels()
    tight = tuple(0.5 * bound for bound in bounds_by(victim, rule="quantile"))
    clip = ClippingConfig(rule=rule, epochs=2)
    repair = repair_with_pad_ft(
        victim.bounded(tight), pixels, split_of(labels), PADFTConfig(clip=clip, epochs=1), run=run()
    )
    assert len(repair.classifier.bounds) == len(tight)
    for bound, before in zip(repair.classifier.bounds, tight, strict=True):
        assert (bound <= before).all()


def test_without_its_label_a_suspect_keeps_what_is_left_of_the_models_opinion() -> None:
    torch.manual_seed(0)
    head, features, labels = torch.nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    found = opinion_without(head, features, labels)
    plain = head(features).softmax(1).scatter(1, labels[:, None], 0.0)
    torch.testing.assert_close(found, (plain / plain.sum(1, keepdim=True)).detach())
    # where only the label's share moves, the loss is disbelief and a constant
    logits = head(features).detach()
    entropy = -torch.special.xlogy(found, found).sum(1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, found), disbelief(logits, labels) + entropy)


def test_disbelief_and_margins() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0], [40.0, 0.0, 0.0]])
    labels = torch.tensor([1, 0])
    p = logits.softmax(1)
    expected = -(1 - p[[0, 1], labels][:1]).log()
    torch.testing.assert_close(disbelief(logits[:1], labels[:1]), expected.mean())
    believed = logits[1:].requires_grad_()
    disbelief(believed, labels[1:]).backward()
    assert believed.grad is not None
    assert float(believed.grad[0, 0]) == pytest.approx(1, abs=1e-6)  # it does not fade where a softmax saturates
    doubted = torch.tensor([[-90.0, 0.0, 0.0], [2.0, 1.0, -1.0]], requires_grad=True)
    disbelief(doubted, torch.tensor([0, 1])).backward()
    assert doubted.grad is not None
    assert not doubted.grad[0].any()  # no tiny numbers, which are slow to pass back
    assert doubted.grad[1].abs().min() > 1e-3
    torch.testing.assert_close(margins(logits.detach(), labels), torch.tensor([-1.0, 40.0]))


def test_the_last_layer_alone_is_tuned(victim: ImageClassifier) -> None:
    pixels, labels = easy_pixels()
    repair = repair_with_pad_ft(victim, pixels, split_of(labels), PADFTConfig(epochs=8), run=run())
    before, after = victim.module.state_dict(), repair.classifier.module.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"linear.weight", "linear.bias"}
    total = sum(value.numel() for value in victim.module.parameters())
    head, bounds = 128 * 3 + 3, sum(bound.numel() for bound in repair.classifier.bounds)
    assert repair.changed_share == pytest.approx((head + bounds) / (total + bounds))
    assert repair.held_out_after >= repair.held_out_before - 10
    images = to_images(pixels.array[split_of(labels).suspect])
    with torch.no_grad():
        assert (repair.classifier.logits(images).argmax(1) == 2).float().mean() <= 0.4


def test_the_head_is_tuned_on_stored_features(victim: ImageClassifier) -> None:
    pixels, labels = easy_pixels()
    rows = split_of(labels).clean
    model = victim.copy()
    features = features_on(model, pixels, rows, run=run())
    torch.testing.assert_close(
        model.head()(features).detach(), model.logits(to_images(pixels.array[rows])).detach(), rtol=1e-4, atol=1e-4
    )
    given = torch.from_numpy(labels[rows])
    first = F.cross_entropy(model.head()(features).detach(), given)
    tune_head(model, features[None], given, PADFTConfig(reset_head=True), run=run())
    assert F.cross_entropy(model.head()(features).detach(), given) < max(0.5, float(first))
    assert not torch.equal(model.head().weight, victim.head().weight)


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(1).relu()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3 * 16 * 16, 8)
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images.flatten(1)).relu()
        return self.one(x) + self.two(x)


class NoActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(input), F.normalize(self.weight))


class OtherHead(nn.Module):
    """``head`` is an nn.Linear, but not in what it does."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3 * 16 * 16, 8), head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.flatten(1)).relu())


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: OtherHead(Cosine(8, 3)), "does more than"),
        (lambda: OtherHead(nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))), "does more than"),
        (NoHead, "nn.Linear"),
        (TwoHeads, "not the logits"),
        (NoActivation, "nothing can be clipped"),
    ],
)
def test_networks_that_do_not_fit_are_refused(network: Callable[[], nn.Module], words: str) -> None:
    pixels, labels = easy_pixels()
    model = ImageClassifier(module=network(), class_names=NAMES, image_size=16)
    with pytest.raises(UnsupportedModelError, match=words):
        repair_with_pad_ft(model, pixels, split_of(labels), PADFTConfig(), run=run())


def test_bad_settings_are_refused() -> None:
    bad: dict[str, Any]
    for bad in ({"per_class": 0}, {"held_out": 1.0}, {"scores_share": 2.0}):
        with pytest.raises(ConfigError):
            PADFTConfig(**bad)
    for bad in ({"quantile": 0.0}, {"batch_size": 0}, {"weight_factor": 0.5}):
        with pytest.raises(ConfigError):
            ClippingConfig(**bad)
    pixels, labels = easy_pixels()
    nothing = Split(
        method="given", ids=[str(row) for row in range(COUNT)], labels=labels,
        region=np.full(COUNT, MIXED, dtype=np.int8), class_names=NAMES,
    )  # fmt: skip
    with pytest.raises(NotEnoughDataError):
        repair_with_pad_ft(
            new_classifier("small-resnet", NAMES, image_size=16), pixels, nothing, PADFTConfig(), run=run()
        )
