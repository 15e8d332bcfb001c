"""Intervals against textbook figures and their defining equations."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unpoison.errors import NotEnoughDataError, UsageError
from unpoison.evaluation.intervals import mean_over_seeds, wilson

# a busy machine is no failure
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@UNHURRIED
@given(n=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilson_bounds_solve_the_score_equation(n: int, share: float) -> None:
    successes = round(share * n)
    interval = wilson(successes, n)
    rate = successes / n
    assert interval.n == n
    assert interval.value == pytest.approx(100 * rate)
    assert 0 <= interval.low <= interval.value <= interval.high <= 100
    for bound in (interval.low / 100, interval.high / 100):
        if 0 < bound < 1:  # |rate - p| = z sqrt(p (1 - p) / n) at both ends
            assert (rate - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, rel=1e-6, abs=1e-12)


def test_wilson_at_the_ends() -> None:
    none, all_of_them = wilson(0, 10), wilson(10, 10)
    assert none.low == 0
    assert none.high == pytest.approx(27.75, abs=0.01)
    assert all_of_them.low == pytest.approx(72.25, abs=0.01)
    assert all_of_them.high == 100


@pytest.mark.parametrize(("successes", "n", "z"), [(-1, 5, 1.96), (6, 5, 1.96), (2, 5, 0.0)])
def test_wilson_refuses_what_is_no_count(successes: int, n: int, z: float) -> None:
    with pytest.raises(UsageError):
        wilson(successes, n, z)


def test_nothing_has_no_rate() -> None:
    with pytest.raises(NotEnoughDataError):
        wilson(0, 0)
    with pytest.raises(NotEnoughDataError):
        mean_over_seeds([])


def test_mean_over_three_seeds_uses_students_t() -> None:
    result = mean_over_seeds([1.0, 2.0, 3.0])
    assert (result.mean, result.std, result.n) == (2.0, 1.0, 3)
    assert result.high is not None
    assert result.low is not None
    assert result.high - 2 == pytest.approx(4.3027 / np.sqrt(3), abs=1e-3)  # t(0.975, 2) = 4.3027
    assert result.low == pytest.approx(4 - result.high)
    assert str(result) == "2.00 ± 1.00 (n=3)"


def test_one_seed_says_nothing_about_spread() -> None:
    result = mean_over_seeds([97.5])
    assert (result.mean, result.std, result.low, result.high) == (97.5, None, None, None)
    assert str(result) == "97.50 (n=1)"
