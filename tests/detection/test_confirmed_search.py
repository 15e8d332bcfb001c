"""What one search suspects has to stand in the mean of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from unpoison.detection import confirmed_search
from unpoison.detection.confirmed_search import kept_twice, search_twice
from unpoison.detection.inversion import InvertedTrigger
from unpoison.detection.trigger_search import TriggerSearch, TriggerSearchConfig, judge_triggers, kept_steps
from unpoison.runs import Run

NAMES = ("airplane", "bird", "cat", "horse", "ship", "truck")
FIRST, SECOND = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)


def search(*sizes: float, by_wave: bool = False) -> TriggerSearch:
    triggers = [InvertedTrigger(form="additive", target=target, mask=torch.ones(1, 8, 8), pattern=torch.zeros(3, 8, 8),
                                size=size, success=90.0) for target, size in enumerate(sizes)]  # fmt: skip
    found = judge_triggers(triggers, NAMES, TriggerSearchConfig())
    return found if not by_wave else TriggerSearch(
        triggers=found.triggers, index=found.index, suspects=(3,), reason="A wave.", by_wave=True
    )  # fmt: skip


@dataclass
class Searches:
    """Answers in place of searches, and what was asked."""

    answers: list[TriggerSearch]
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, logits: Any, images: Tensor, names: Sequence[str], config: Any, **more: Any) -> TriggerSearch:
        self.asked.append({"images": images, "config": config, **more})
        return self.answers.pop(0)


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*answers: TriggerSearch) -> tuple[TriggerSearch, list[dict[str, Any]]]:
        searches = Searches(list(answers))
        monkeypatch.setattr(confirmed_search, "search_triggers", searches)
        found = search_twice(lambda images: torch.zeros(len(images), len(NAMES)), FIRST, lambda: SECOND, NAMES,
                             run=Run(seed=3))  # fmt: skip
        return found, searches.asked

    return run


OUT_OF_LINE = search(0.10, 0.11, 0.03, 0.12, 0.10, 0.11)
IN_LINE = search(0.10, 0.11, 0.12, 0.11, 0.10, 0.11)


def test_what_is_not_suspected_is_not_searched_again(twice: Any) -> None:
    found, asked = twice(IN_LINE)
    assert found is IN_LINE
    assert [call["images"] is FIRST for call in asked] == [True]


def test_a_wave_stands_as_it_is(twice: Any) -> None:
    by_wave = search(0.10, 0.11, 0.12, 0.11, 0.10, 0.11, by_wave=True)
    assert twice(by_wave)[0] is by_wave


def test_a_class_that_stands_out_twice_is_suspected(twice: Any) -> None:
    found, asked = twice(OUT_OF_LINE, search(0.10, 0.11, 0.04, 0.12, 0.10, 0.11))
    assert [NAMES[target] for target in found.suspects] == ["cat"]
    assert found.trigger_of(2).size == pytest.approx((0.03 * 0.04) ** 0.5)
    again = asked[1]
    assert again["images"] is SECOND
    assert again["targets"] == list(range(6))
    assert again["run"].seed != asked[0]["run"].seed
    assert again["config"].waves is None  # else a wave would stand among small changes


def test_a_class_that_stands_out_once_is_let_go(twice: Any) -> None:
    found, _ = twice(OUT_OF_LINE, search(0.10, 0.11, 0.40, 0.12, 0.10, 0.11))
    assert OUT_OF_LINE.suspects == (2,)
    assert found.suspects == ()
    assert found.reason.startswith("Nothing of 6 is reached")


def test_both_searches_steps_are_told_apart() -> None:
    assert len(set(kept_twice(20))) == 2 * len(kept_steps(20))
    assert set(kept_steps(20)) < set(kept_twice(20))
