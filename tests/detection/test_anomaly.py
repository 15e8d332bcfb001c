"""Costs, deviations, the score and its words, on sizes and successes that are written down."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from unpoison.detection.anomaly import (
    AnomalyConfig,
    capped,
    cost,
    deviations_under,
    index_with_interval,
    judge_reach,
    word_of,
)
from unpoison.model_results import AnomalyIndex, Reach, WeightsWord

SQUARE = 36 / 1024
OTHERS = (57.0, 45.0, 19.0, 19.0, 14.0, 13.0, 9.0, 8.0, 6.0)
"""Percent of images that the largest square sends to the other classes of a backdoored network."""


def squares(*success: float, size: float = SQUARE) -> list[Reach]:
    return [Reach(form="square", size=size, success=value) for value in success]


def masks(*sizes: float, success: float = 95.0) -> list[Reach]:
    return [Reach(form="patch", size=size, success=success) for size in sizes]


def test_costs() -> None:
    half = cost("patch", [*masks(0.1, success=100.0), *masks(0.1, success=50.0)])
    assert half[1] - half[0] == pytest.approx(np.log(2))
    odds = cost("square", squares(90.0, 50.0, 4.0, 1.0))
    assert odds[1] - odds[0] == pytest.approx(np.log(9))
    assert odds[2] == odds[3]  # how far one fails says nothing
    assert cost("square", squares(99.0))[0] == cost("square", squares(100.0))[0]


def test_an_index_is_deviations_with_a_floor() -> None:
    logs = np.log([0.01, 0.1, 0.1, 0.1, 0.1])
    assert deviations_under(logs, logs, 0.5)[0] == pytest.approx(np.log(10) / 0.5)
    assert deviations_under(logs[:1], logs[1:], 0.25)[0] == pytest.approx(np.log(10) / 0.25)
    found = index_with_interval(logs, 0, 0.5)
    assert (found.value, found.classes) == (pytest.approx(np.log(10) / 0.5), 5)
    spread = index_with_interval(np.log([0.01, 0.1, 0.2, 0.3, 0.15]), 0, 0.1)
    assert spread.low < spread.value < spread.high


def test_a_squares_score_grows_with_its_success_without_a_step() -> None:
    scores = [judge_reach(squares(value, *OTHERS)).score for value in np.linspace(58, 98, 81)]
    steps = [after - before for before, after in pairwise(scores)]
    assert min(steps) > 0
    assert max(steps) < 0.25  # of half a percent each, at the upper end, where odds grow fast
    assert judge_reach(squares(98.0, *OTHERS)).word == "backdoored"
    assert judge_reach(squares(62.0, *OTHERS)).word == "no evidence"


def test_the_score_is_the_lower_of_both_opinions() -> None:
    found = masks(0.01, 0.1, 0.11, 0.09, 0.1)
    alone = judge_reach(found)
    assert (alone.word, alone.candidate) == ("backdoored", 0)
    beside = judge_reach(found, masks(0.1, 0.12, 0.09))
    assert beside.word == "backdoored"
    assert beside.beside[0] is not None
    assert beside.score == min(alone.score, beside.beside[0])
    easy = judge_reach(found, masks(0.011, 0.012, 0.009))  # clean models of this kind have such classes, too
    assert easy.word == "no evidence"
    assert judge_reach(found, squares(50.0, 40.0, 30.0)).score == alone.score  # of another form: nothing to compare


def test_two_classes_need_references() -> None:
    assert judge_reach(masks(0.01, 0.1)).word == "inconclusive"
    assert judge_reach([]).candidate is None
    found = judge_reach(masks(0.01, 0.1), masks(0.1, 0.12, 0.09, 0.11))
    assert (found.word, found.candidate, found.interval) == ("backdoored", 0, None)
    assert found.own == (None, None)


def test_what_fails_counts_in_proportion() -> None:
    whole, half = (judge_reach([*masks(0.001, success=value), *masks(0.1, 0.11, 0.09, 0.1)]) for value in (95.0, 40.0))
    assert whole.own[0] is not None
    assert half.own[0] is not None
    assert 0 < half.own[0] < whole.own[0] / 2
    nothing = judge_reach(masks(0.1, 0.1, 0.1, 0.1, success=3.0))  # the least suspicious there is
    assert nothing.word == "no evidence"


@pytest.mark.parametrize(
    ("score", "low", "word"),
    [(9.0, 3.0, "backdoored"), (9.0, None, "backdoored"), (9.0, 2.0, "suspicious"), (2.5, 2.4, "suspicious"),
     (2.1, 0.0, "no evidence")],
)  # fmt: skip
def test_words(score: float, low: float | None, word: str) -> None:
    interval = None if low is None else AnomalyIndex(value=score, low=low, high=9.0, classes=10)
    assert word_of(score, interval, AnomalyConfig()) == word


@pytest.mark.parametrize(
    ("word", "at_most"),
    [("backdoored", "suspicious"), ("suspicious", "suspicious"), ("no evidence", "inconclusive"),
     ("inconclusive", "inconclusive")],
)  # fmt: skip
def test_half_a_search_and_made_up_images_allow_less(word: WeightsWord, at_most: str) -> None:
    assert capped(word, covered=100.0, made_up=False) == word
    assert capped(word, covered=99.0, made_up=False) == capped(word, covered=100.0, made_up=True) == at_most


def test_floors_and_success_are_settings() -> None:
    found = squares(98.0, *OTHERS)
    strict = replace(AnomalyConfig(), square_floor=4.0)
    assert judge_reach(found, config=strict).score < judge_reach(found).score
    assert judge_reach(squares(60.0, *OTHERS), config=AnomalyConfig(success=60.0)).score > (
        judge_reach(squares(60.0, *OTHERS)).score
    )
