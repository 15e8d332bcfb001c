"""The search for a target on models whose shortcuts are known: none, one, two; few classes and many."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unpoison.detection import trigger_search
from unpoison.detection.inversion import FEWEST_IMAGES, InversionConfig, InvertedTrigger
from unpoison.detection.trigger_search import (
    TriggerSearchConfig,
    fewest_images,
    find_suspects,
    judge_triggers,
    kept_steps,
    load_search,
    search_triggers,
    store_search,
)
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.runs import Run, RunFolder

SIZE = 8
NAMES = tuple("abcdefgh")


def images(count: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def model(classes: int, *planted: int) -> Any:
    """Logits from a random weighting of all pixels; planted classes also look at the brightness of one corner each."""
    weights = torch.randn(classes, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(7)) / 6

    def logits(batch: Tensor) -> Tensor:
        answers = (batch - 0.5).flatten(1) @ weights.T
        corners = (batch[:, :, :2, :2], batch[:, :, -2:, -2:])
        columns = list(answers.unbind(1))
        for target, corner in zip(planted, corners, strict=False):
            shortcut = torch.nn.functional.softplus(10 * (corner.mean(dim=(1, 2, 3)) - 0.6))
            columns[target] = columns[target] + 4 * shortcut
        return torch.stack(columns, dim=1)

    return logits


QUICK = TriggerSearchConfig(success=50.0, inversion=InversionConfig(steps=80))


@pytest.mark.parametrize("planted", [(), (3,), (5, 2)])
def test_suspects_are_the_planted_classes(planted: tuple[int, ...]) -> None:
    found = search_triggers(model(8, *planted), images(200), NAMES, QUICK, run=Run())
    assert set(found.suspects) == set(planted)
    assert len(found.triggers) == len(found.index) == 8
    if planted:
        assert repr(NAMES[found.suspects[0]]) in found.reason
        trigger = found.trigger_of(found.suspects[0])
        said = model(8, *planted)(trigger.apply(images(50))).argmax(1)
        assert float((said == trigger.target).float().mean()) > 0.5
    else:
        assert found.reason.startswith("Nothing of 8")


def test_many_classes_are_narrowed_down_and_the_planted_one_stays() -> None:
    config = TriggerSearchConfig(
        success=50.0, finalists=6, first_steps=25, inversion=InversionConfig(steps=80, batch_size=16)
    )
    names = [f"class {number}" for number in range(24)]
    found = search_triggers(model(24, 17), images(120), names, config, run=Run())
    assert len(found.triggers) == 6
    assert 17 in [trigger.target for trigger in found.triggers]
    assert found.suspects == (17,)


def test_only_the_targets_asked_for_are_searched_and_to_the_same_end() -> None:
    config = TriggerSearchConfig(finalists=6, first_steps=5, inversion=InversionConfig(steps=12, batch_size=16))
    names = [f"class {number}" for number in range(24)]
    whole = search_triggers(model(24, 17), images(120), names, config, run=Run())
    wanted = [trigger.target for trigger in whole.triggers]
    part = search_triggers(model(24, 17), images(120), names, config, targets=wanted, run=Run())
    for one, other in zip(part.triggers, whole.triggers, strict=True):
        assert (one.target, one.size) == (other.target, other.size)
        assert torch.equal(one.pattern, other.pattern)


def test_memory_does_not_grow_with_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: weakref.WeakSet[trigger_search._Search] = weakref.WeakSet()
    most = 0
    advance = trigger_search._Search.advance_to

    def watched(self: trigger_search._Search, steps: int) -> None:
        nonlocal most
        opened.add(self)
        most = max(most, len(opened))
        advance(self, steps)

    monkeypatch.setattr(trigger_search._Search, "advance_to", watched)
    config = TriggerSearchConfig(finalists=4, first_steps=1, inversion=InversionConfig(steps=2, batch_size=8))
    search_triggers(model(100), images(60), [f"class {number}" for number in range(100)], config, run=Run())
    assert most <= 4 + 16


def test_a_class_that_the_model_takes_nearly_all_images_for_is_left_out_and_named() -> None:
    plain = model(8)

    def lopsided(batch: Tensor) -> Tensor:
        raised = torch.zeros(8)
        raised[2] = 100.0
        return plain(batch) + raised * (batch.mean(dim=(1, 2, 3)) > 0.4)[:, None]  # all but very dark images

    some = images(100)
    some[:40] *= 0.2
    found = search_triggers(lopsided, some, NAMES, QUICK, run=Run())
    assert len(found.triggers) == 8
    found = search_triggers(lopsided, some[30:], NAMES, QUICK, run=Run())
    assert found.skipped == (2,)
    assert [trigger.target for trigger in found.triggers] == [0, 1, 3, 4, 5, 6, 7]
    assert found.reason.endswith("Not looked at, because the model takes nearly all images for it: 'c'.")
    assert load_search(store_search(found), torch.device("cpu")).skipped == (2,)
    with pytest.raises(NotEnoughDataError, match="classes to compare that the model does not take nearly all"):
        search_triggers(lopsided, some[30:], NAMES, QUICK, targets=[2], run=Run())


@pytest.mark.parametrize("held_out", [0.05, 0.25, 0.4, 0.5, 0.9])
def test_the_fewest_images_are_enough_and_one_less_is_not(held_out: float) -> None:
    fewest = fewest_images(held_out)
    judging = round(held_out * fewest)
    assert min(judging, fewest - judging) >= FEWEST_IMAGES
    judging = round(held_out * (fewest - 1))
    assert min(judging, fewest - 1 - judging) < FEWEST_IMAGES
    assert fewest_images(0.25) == 30


@pytest.mark.parametrize("classes", [6, 24])
def test_a_search_that_was_killed_goes_on_and_finds_the_same(classes: int, tmp_path: Path) -> None:
    config = TriggerSearchConfig(
        success=50.0, finalists=6, first_steps=5, inversion=InversionConfig(steps=12, batch_size=16)
    )
    names = [f"class {number}" for number in range(classes)]
    calls = []

    def watched(batch: Tensor, *, last: int = 0) -> Tensor:
        calls.append(len(batch))
        if len(calls) == last:
            raise KeyboardInterrupt
        return model(classes, 3)(batch)

    undisturbed = search_triggers(watched, images(120), names, config, run=Run())
    every = len(calls)
    calls.clear()
    run = Run(folder=RunFolder.open(tmp_path / "run", {"of": "this"}))
    with pytest.raises(KeyboardInterrupt):
        search_triggers(lambda batch: watched(batch, last=every - 2), images(120), names, config, run=run)
    calls.clear()
    found = search_triggers(watched, images(120), names, config, run=run)
    assert len(calls) < every / 2
    assert found.suspects == undisturbed.suspects
    for one, other in zip(found.triggers, undisturbed.triggers, strict=True):
        assert (one.target, one.size, one.success) == (other.target, other.size, other.success)
        assert torch.equal(one.pattern, other.pattern)
    run.forget(kept_steps(classes))
    assert list((tmp_path / "run/steps").iterdir()) == []


def trigger(target: int, size: float, success: float = 90.0) -> InvertedTrigger:
    blank = torch.zeros(3, 4, 4)
    return InvertedTrigger(
        form="additive", target=target, mask=torch.ones(1, 4, 4), pattern=blank, size=size, success=success
    )


def test_the_verdict_needs_index_gap_and_success() -> None:
    config = TriggerSearchConfig()
    sizes = [0.05, 0.045, 0.055, 0.05, 0.012, 0.048]
    names = NAMES[: len(sizes)]
    found = judge_triggers([trigger(place, size) for place, size in enumerate(sizes)], names, config)
    assert found.suspects == (4,)
    assert found.reason.startswith("A change by 3.1 of 255 levels (root mean square) sends 90 percent of images to 'e'")
    broken = [trigger(place, size, 20.0 if place == 4 else 90.0) for place, size in enumerate(sizes)]
    assert judge_triggers(broken, names, config).suspects == ()
    near = [trigger(place, 0.044 if place == 4 else size) for place, size in enumerate(sizes)]
    assert judge_triggers(near, names, config).suspects == ()
    two = [trigger(place, size / 4 if place in (0, 4) else size) for place, size in enumerate(sizes)]
    assert set(judge_triggers([*two, trigger(6, 0.052), trigger(7, 0.047)], NAMES, config).suspects) == {0, 4}
    even = judge_triggers([trigger(place, 0.05) for place in range(6)], names, config)
    assert even.suspects == ()
    assert not np.any(even.index)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=30), st.integers(1, 4))
def test_suspects_are_the_smallest_and_leave_two_to_compare_with(sizes: list[float], most: int) -> None:
    array = np.array(sizes)
    suspected = find_suspects(array, np.ones(len(array), dtype=bool), TriggerSearchConfig(suspects=most))
    assert suspected.sum() <= min(most, len(sizes) - 2)
    if suspected.any():
        assert array[suspected].max() < array[~suspected].min()


def test_what_is_refused() -> None:
    with pytest.raises(NotEnoughDataError, match="classes to compare"):
        search_triggers(model(2), images(60), NAMES[:2], QUICK, run=Run())
    with pytest.raises(NotEnoughDataError, match="images for inversion: have 29, need at least 30"):
        search_triggers(model(8), images(29), NAMES, QUICK, run=Run())
    refused: list[dict[str, Any]] = [
        {"ratio": 0.0},
        {"held_out": 1.0},
        {"suspects": 0},
        {"finalists": 2},
        {"index": -1.0},
    ]
    for wrong in refused:
        with pytest.raises(ConfigError):
            TriggerSearchConfig(**wrong)
