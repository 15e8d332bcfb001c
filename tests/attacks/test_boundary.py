"""Poison near the CLIP's decision boundary: nearer than a random choice, on record, and of this set alone."""

from pathlib import Path

import numpy as np
import pytest

from unpoison.attacks.boundary import near_the_boundary, target_probability
from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.attacks.selection import Selection
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError, LabelRangeError, NotEnoughDataError
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run

SOURCE = open_images("shapes:200:5")
TARGET = 3


@pytest.fixture(scope="module")
def near() -> Selection:
    return near_the_boundary(SOURCE, load_clip("tiny"), TARGET, run=Run())


def rows_of(poisoning: Poisoning) -> np.ndarray:
    place = {name: row for row, name in enumerate(SOURCE.ids)}
    return np.array([place[name] for name in poisoning.ids])


def test_the_probability_is_the_softmax_with_clips_scale() -> None:
    cosines = np.array([[0.1, 0.2, 0.0], [0.3, 0.3, 0.3], [np.nan] * 3], dtype=np.float32)
    expected = [np.exp(2.0) / (np.exp(1.0) + np.exp(2.0) + 1), 1 / 3]
    found = target_probability(cosines, 10.0, 1)
    assert found[:2] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(found[2])


def test_the_chosen_are_nearer_to_the_target_than_random_ones(near: Selection) -> None:
    chosen = rows_of(plan_poisoning(SOURCE, "badnet", rate=0.1, target=TARGET, selection=near))
    drawn = rows_of(plan_poisoning(SOURCE, "badnet", rate=0.1, target=TARGET))
    assert (SOURCE.labels[chosen] != TARGET).all()
    others = np.flatnonzero(SOURCE.labels != TARGET)
    assert set(chosen) == set(others[np.argsort(-near.values[others], kind="stable")[:20]])
    assert near.values[chosen].mean() > 3 * near.values[drawn].mean()
    assert near.values[SOURCE.labels == TARGET].mean() > near.values[others].mean()


def test_the_manifest_says_so_and_is_applied_as_any_other(near: Selection, tmp_path: Path) -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.1, target=TARGET, selection=near)
    assert (plan.selection, plan.selected_by) == ("boundary", load_clip("tiny").fingerprint)
    plan.save(tmp_path / "manifest.json")
    assert Poisoning.load(tmp_path / "manifest.json") == plan
    assert (apply_poisoning(SOURCE, plan).labels[rows_of(plan)] == TARGET).all()
    assert plan_poisoning(SOURCE, "badnet", rate=0.1, target=TARGET).selection == "random"


def test_other_modes_and_taken_samples(near: Selection) -> None:
    first = plan_poisoning(SOURCE, "badnet", rate=0.05, target=TARGET, selection=near)
    second = plan_poisoning(SOURCE, "badnet", rate=0.05, target=TARGET, selection=near, taken=first.ids)
    assert not set(first.ids) & set(second.ids)
    assert near.values[rows_of(first)].min() >= near.values[rows_of(second)].max()
    clean = plan_poisoning(SOURCE, "sig", rate=0.02, target=TARGET, selection=near)
    assert (SOURCE.labels[rows_of(clean)] == TARGET).all()


def test_samples_without_a_value_are_never_chosen() -> None:
    values = np.full(len(SOURCE), np.nan)
    values[::10] = 0.5
    few = Selection(how="boundary", model="m", values=values)
    with pytest.raises(NotEnoughDataError, match=r"have 1[0-9], need at least 100"):
        plan_poisoning(SOURCE, "badnet", rate=0.5, target=TARGET, selection=few)
    plan = plan_poisoning(SOURCE, "badnet", rate=0.01, target=TARGET, selection=few)
    assert (rows_of(plan) % 10 == 0).all()


def test_refusals(near: Selection) -> None:
    with pytest.raises(ConfigError, match="200 values, the set 100"):
        plan_poisoning(SOURCE.select(range(100)), "badnet", rate=0.1, selection=near)
    with pytest.raises(ConfigError, match="chooses its samples itself"):
        plan_poisoning(SOURCE, "clean-image", rate=0.1, selection=near)
    with pytest.raises(LabelRangeError, match="target 99"):
        near_the_boundary(SOURCE, load_clip("tiny"), 99, run=Run())
