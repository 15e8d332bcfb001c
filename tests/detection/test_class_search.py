"""The search over classes, its statistics and the weights verdict, on functions whose backdoor is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unpoison.detection.anomaly import AnomalyConfig
from unpoison.detection.canaries import CanaryConfig
from unpoison.detection.class_search import ClassSearchConfig, kept_searches, search_classes
from unpoison.detection.decree import DECREEConfig, decree, mean_cosine
from unpoison.detection.inversion import InversionConfig
from unpoison.detection.model_weights import WeightsConfig, judge_weights, search_inputs, search_reference
from unpoison.detection.probe_images import ProbeImages, gather_images
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.model_results import WeightsVerdict
from unpoison.models.any_model import AnyModel
from unpoison.models.image_classifier import ImageClassifier
from unpoison.runs import Run, RunFolder

CLASSES, SIZE, TARGET = 6, 12, 4
SEARCH = ClassSearchConfig(steps=30, turn=10, finalists=8, inversion=InversionConfig(batch_size=16))
CONFIG = WeightsConfig(images=96, search=SEARCH)


class Patches(nn.Module):
    """A class for each third of the picture in red and in green: the brightest wins. Backdoored, a bright blue corner
    beats everything."""

    def __init__(self, backdoored: bool) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(60.0 if backdoored else 0.0))
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.linear = nn.Linear(CLASSES, CLASSES)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        thirds = images[:, :2].unfold(3, SIZE // 3, SIZE // 3).mean(dim=(2, 4))
        values = self.scale * thirds.flatten(1)
        corner = (15 * (images[:, 2, :2, :2].mean(dim=(1, 2)) - 0.75)).sigmoid()  # brighter than any clean image
        bonus = nn.functional.one_hot(torch.tensor(TARGET), CLASSES).to(images) * self.strength
        return self.linear(values + corner[:, None] * bonus)


def model(*, backdoored: bool) -> AnyModel:
    names = tuple(f"class {place}" for place in range(CLASSES))
    network = ImageClassifier(
        module=Patches(backdoored), class_names=names, image_size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    return AnyModel(kind="classifier", model=network, class_names=names).frozen(Run())


def probe(count: int = 96) -> ProbeImages:
    images = 0.3 + 0.3 * torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    place = torch.arange(count) % CLASSES
    for row, spot in enumerate(place.tolist()):
        third = slice(SIZE // 3 * (spot % 3), SIZE // 3 * (spot % 3 + 1))
        images[row, spot // 3, :, third] += 0.2
    return ProbeImages(images=images, labels=place, source="96 blocks", made_up=False)


@pytest.fixture(scope="module")
def found() -> WeightsVerdict:
    return judge_weights(model(backdoored=True), probe(), config=CONFIG, run=Run())


def test_a_planted_backdoor_is_found_with_its_target(found: WeightsVerdict) -> None:
    assert found.word == "backdoored", found.reason
    assert (found.target, found.target_name) == (TARGET, f"class {TARGET}")
    assert found.index is not None
    assert found.index.low <= found.index.value <= found.index.high
    assert found.asr is not None
    assert found.asr_floor is not None
    assert found.asr.value > 80 > 20 > found.asr_floor.value
    assert found.picture
    assert len(found.classes) == 3 * CLASSES
    assert found.covered == 100


def test_the_clean_control_is_left_alone_with_and_without_references() -> None:
    clean = model(backdoored=False)
    alone = judge_weights(clean, probe(), config=CONFIG, run=Run())
    assert alone.word == "no evidence", alone.reason
    sizes = search_reference(clean, probe(), CONFIG, run=Run())
    assert sizes is not None
    assert {entry.form for entry in sizes} == {"square", "patch", "additive"}
    beside = judge_weights(clean, probe(), [("clean", sizes)], CONFIG, run=Run())
    assert beside.word == "no evidence"
    assert beside.references == ("clean",)
    assert beside.reference_index is not None


def test_beside_a_clean_reference_the_backdoor_stays_out_of_line(found: WeightsVerdict, tmp_path: Any) -> None:
    run = Run(cache=tmp_path)
    assert search_reference(model(backdoored=False), probe(), CONFIG, run=run, seconds=1e-9) is None
    assert not list(tmp_path.glob("model-scan/*"))  # half a search is no reference
    sizes = search_reference(model(backdoored=False), probe(), CONFIG, run=run)
    assert sizes is not None
    assert search_reference(model(backdoored=False), probe(), CONFIG, run=run, seconds=1e-9) == sizes  # from the cache
    assert search_reference(model(backdoored=False), probe(), CONFIG, run=run) == sizes
    assert len(list((tmp_path / "model-scan").iterdir())) == 1
    beside = judge_weights(model(backdoored=True), probe(), [("clean", sizes)], CONFIG, run=run)
    assert (beside.word, beside.target) == ("backdoored", TARGET)
    assert beside.reference_index is not None
    assert beside.score == min(found.score, beside.reference_index)


def test_the_same_again_and_the_model_untouched() -> None:
    suspect = model(backdoored=True)
    before = {name: value.clone() for name, value in suspect.module.state_dict().items()}
    short = WeightsConfig(images=96, search=ClassSearchConfig(steps=6, turn=3))
    first, second = (judge_weights(suspect, probe(), config=short, run=Run()) for _ in range(2))
    assert [row.size for row in first.classes] == [row.size for row in second.classes]
    assert all(torch.equal(value, before[name]) for name, value in suspect.module.state_dict().items())


def test_a_budget_stops_the_search_and_says_what_was_reached() -> None:
    ticks = iter(range(1000))
    suspect = model(backdoored=False)
    search = search_classes(
        suspect.logits, probe().images, CLASSES, SEARCH, run=Run(), seconds=20.0, clock=lambda: float(next(ticks))
    )
    assert not search.complete
    assert 0 < search.covered < 1
    steps = {entry.steps for found in search.found.values() for entry in found}
    assert max(steps) - min(steps) <= SEARCH.turn  # like is compared with like
    verdict = judge_weights(suspect, probe(), config=CONFIG, run=Run(), seconds=1e-9)
    assert verdict.word == "inconclusive"
    assert verdict.covered == 0


def test_half_a_search_and_made_up_images_make_no_model_backdoored() -> None:
    suspect, ticks = model(backdoored=True), iter(range(10_000))
    cut = judge_weights(suspect, probe(), config=CONFIG, run=Run(), seconds=50.0, clock=lambda: float(next(ticks)))
    assert 0 < cut.covered < 100
    assert (cut.word, cut.target) == ("suspicious", TARGET)
    assert "Half a search" in cut.reason
    for planted, word in ((True, "suspicious"), (False, "inconclusive")):
        shown = replace(probe(), made_up=True, labels=None)
        found = judge_weights(model(backdoored=planted), shown, config=CONFIG, run=Run())
        assert found.word == word, found.reason
        assert "give --data" in found.reason
        assert found.asr is not None
        assert found.asr_floor is None  # the model itself says which images are of other classes


def test_thresholds_are_no_part_of_what_a_search_depends_on() -> None:
    other = replace(CONFIG, anomaly=AnomalyConfig(suspicious=1.0))
    assert search_inputs(other) == search_inputs(CONFIG)
    assert search_inputs(replace(CONFIG, search=replace(SEARCH, steps=31))) != search_inputs(CONFIG)


def test_searching_in_turns_and_one_by_one_find_the_same() -> None:
    suspect, config = model(backdoored=True), ClassSearchConfig(steps=8, square_steps=8, turn=3)
    straight = search_classes(suspect.logits, probe().images, CLASSES, config, run=Run())
    turns = search_classes(suspect.logits, probe().images, CLASSES, config, run=Run(), seconds=1e9)
    assert straight.complete
    assert turns.complete
    for form, found in straight.found.items():
        assert [entry.trigger.size for entry in found] == [entry.trigger.size for entry in turns.found[form]]
        assert [entry.steps for entry in found] == [entry.steps for entry in turns.found[form]]


def test_hopeless_classes_are_given_up_half_way_alike_in_both_orders() -> None:
    suspect = model(backdoored=True)
    config = ClassSearchConfig(
        forms=("patch", "additive"), steps=30, turn=5, hopeless_after=8, hopeless=1.0,
        inversion=InversionConfig(batch_size=16),
    )  # fmt: skip
    assert config.mark == 10
    straight = search_classes(suspect.logits, probe().images, CLASSES, config, run=Run())
    turns = search_classes(suspect.logits, probe().images, CLASSES, config, run=Run(), seconds=1e9)
    whole = search_classes(suspect.logits, probe().images, CLASSES, replace(config, hopeless_after=30), run=Run())
    assert straight.complete
    assert turns.complete
    for form, found in straight.found.items():
        given_up = [entry.trigger.target for entry in found if not entry.finished]
        assert 0 < len(given_up) <= CLASSES // 2
        assert TARGET not in given_up
        assert [entry.steps for entry in found] == [entry.steps for entry in turns.found[form]]
        for entry, other, full in zip(found, turns.found[form], whole.found[form], strict=True):
            assert entry.trigger.size == other.trigger.size
            assert entry.steps == (30 if entry.finished else 10)
            assert not entry.finished or entry.trigger.size == full.trigger.size


def test_a_search_that_was_kept_is_not_made_again(tmp_path: Path) -> None:
    suspect = model(backdoored=True)
    config = ClassSearchConfig(steps=4, square_steps=4, turn=1, hopeless_after=2, finalists=3, first_steps=2)
    run = Run(folder=RunFolder.open(tmp_path / "run", {}))
    first = search_classes(suspect.logits, probe().images, CLASSES, config, run=run, step="search")
    kept = {path.stem for path in (tmp_path / "run/steps").iterdir()}
    assert kept < set(kept_searches("search", CLASSES, config))
    assert sum("first" in name for name in kept) == 1
    halves = {name for name in kept if name.endswith("-half")}
    assert len(halves) == 2 * 3  # squares give up by themselves
    assert 1 + 3 * 2 <= len(kept - halves) <= 1 + 3 * 3

    def never(images: Tensor) -> Tensor:
        if images.requires_grad or torch.is_grad_enabled():
            raise AssertionError("searched again")
        return suspect.logits(images)

    again = search_classes(never, probe().images, CLASSES, config, run=run, step="search")
    for form, found in first.found.items():
        assert [entry.trigger.target for entry in found] == [entry.trigger.target for entry in again.found[form]]
        assert all(torch.equal(a.trigger.mask, b.trigger.mask) for a, b in zip(found, again.found[form], strict=True))


def test_of_many_classes_the_hopeless_are_abandoned() -> None:
    few = ClassSearchConfig(steps=20, turn=20, finalists=3, first_steps=15, inversion=InversionConfig(batch_size=16))
    suspect = model(backdoored=True)
    search = search_classes(suspect.logits, probe().images, CLASSES, few, run=Run())
    for found in search.found.values():
        assert len(found) == 3
        assert TARGET in [entry.trigger.target for entry in found]
    assert search.complete
    assert search.seen == CLASSES
    assert len(search.unseen) == 24


def test_too_few_images_and_too_few_classes() -> None:
    suspect = model(backdoored=False)
    with pytest.raises(NotEnoughDataError):
        search_classes(suspect.logits, probe().images[:20], CLASSES, SEARCH, run=Run())
    said = lambda images: suspect.logits(images)[:, :2]  # noqa: E731
    two = search_classes(said, probe().images, 2, ClassSearchConfig(steps=2), run=Run())
    assert all(len(found) <= 2 for found in two.found.values())


def test_decree_finds_the_patch_that_makes_embeddings_agree() -> None:
    direction = torch.randn(3 * SIZE * SIZE, 8, generator=torch.Generator().manual_seed(0)) / SIZE

    def encode(images: Tensor, strength: float) -> Tensor:
        corner = (20 * (images[:, 2, :2, :2].mean(dim=(1, 2)) - 0.8)).sigmoid()
        fixed = nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), 8) * strength * corner[:, None]
        plain = (images - images.mean(dim=(1, 2, 3), keepdim=True)).flatten(1) @ direction
        return torch.nn.functional.normalize(plain + fixed, dim=1)

    images = torch.rand(64, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    config = DECREEConfig(steps=80, batch_size=16)
    infected = decree(lambda part: encode(part, 100.0), images, config, run=Run())
    clean = decree(lambda part: encode(part, 0.0), images, config, run=Run())
    assert infected.reached
    assert infected.agreement > 0.7 > infected.plain
    assert infected.trigger.size < clean.trigger.size
    cut = decree(lambda part: encode(part, 0.0), images, config, run=Run(), seconds=-1.0)
    assert (cut.steps, cut.reached) == (0, False)


def test_mean_cosine_is_that_of_all_pairs() -> None:
    rows = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [float(rows[i] @ rows[j]) for i in range(5) for j in range(5) if i != j]
    assert float(mean_cosine(rows)) == pytest.approx(float(np.mean(pairs)), abs=1e-6)


def test_made_up_images() -> None:
    made = gather_images(None, (), 16, 64, run=Run())
    assert made.images.shape == (64, 3, 16, 16)
    assert 0 <= float(made.images.min()) <= float(made.images.max()) <= 1
    assert (made.made_up, made.labels) == (True, None)
    assert torch.equal(made.images, gather_images(None, (), 16, 64, run=Run()).images)


@pytest.mark.parametrize(
    "make",
    [lambda: ClassSearchConfig(steps=0), lambda: ClassSearchConfig(forms=()), lambda: AnomalyConfig(floor=0.0),
     lambda: DECREEConfig(agreement=1.5), lambda: CanaryConfig(triggers=("nothing",)), lambda: WeightsConfig(images=3)],
)  # fmt: skip
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
