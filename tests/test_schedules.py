"""Schedules at their ends and turning points, the rule for small models, and who decays."""

import itertools

import pytest
import torch
from torch import nn

from unpoison.schedules import (
    cosine,
    decay_groups,
    linear,
    linear_then_cosine,
    scaled_rate,
    set_rate,
    warm_up,
    warm_up_cosine,
)


def test_pars_rate_falls_all_the_way() -> None:
    rates = [linear_then_cosine(step, total=100, peak=3e-5, middle=3e-6, end=1e-9) for step in range(101)]
    assert rates[0] == 3e-5
    assert rates[25] == pytest.approx((3e-5 + 3e-6) / 2)
    assert rates[50] == pytest.approx(3e-6)
    assert rates[75] == pytest.approx((3e-6 + 1e-9) / 2)
    assert rates[100] == pytest.approx(1e-9)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_warm_up_then_down_to_zero() -> None:
    rates = [warm_up_cosine(step, total=1000, peak=1.0, warm_up_steps=50) for step in range(1001)]
    assert rates[0] == pytest.approx(1 / 50)
    assert rates[49] == rates[50] == 1.0
    assert max(rates) == 1.0
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[50:]))


def test_a_short_run_reaches_its_peak() -> None:
    rates = [warm_up_cosine(step, total=20, peak=2.0, warm_up_steps=50) for step in range(20)]
    assert max(rates) == 2.0
    assert rates.index(2.0) <= 2
    assert warm_up(3, steps=0) == 1.0


def test_ends_hold_beyond_the_run() -> None:
    assert cosine(2.0, begin=1.0, end=0.25) == pytest.approx(0.25)
    assert cosine(-1.0, begin=1.0) == 1.0
    assert linear(5.0, begin=1.0, end=3.0) == 3.0


def test_the_rate_suits_both_sizes_that_it_was_taken_from() -> None:
    assert scaled_rate(3e-5, 100_000_000) == pytest.approx(3e-5)
    assert scaled_rate(3e-5, 400_000_000) == pytest.approx(3e-5)
    assert scaled_rate(3e-5, 460_000) == pytest.approx(1e-3, rel=0.02)
    assert scaled_rate(3e-5, 1) == pytest.approx(1e-3)
    sizes = [10**power for power in range(9)]
    rates = [scaled_rate(3e-5, size) for size in sizes]
    assert rates == sorted(rates, reverse=True)


def test_biases_and_norms_do_not_decay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.LayerNorm(2))
    net.register_parameter("logit_scale", nn.Parameter(torch.tensor(1.0)))
    decayed, free = decay_groups(net.named_parameters(), 0.3)
    names = {id(value): name for name, value in net.named_parameters()}
    assert {names[id(value)] for value in decayed["params"]} == {"0.weight", "3.weight"}
    assert decayed["weight_decay"] == 0.3
    assert free["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    optimiser = torch.optim.AdamW([decayed, free], 1.0)
    set_rate(optimiser, 0.125)
    assert [group["lr"] for group in optimiser.param_groups] == [0.125, 0.125]
