"""How much work a repair of a classifier is taken to be."""

from __future__ import annotations

from typing import Any

import pytest

from unpoison.catalog import DEFENSES, resolve
from unpoison.defenses.baselines.abl import ABLConfig
from unpoison.defenses.baselines.ft import FTConfig
from unpoison.defenses.clipping import ClippingConfig
from unpoison.defenses.pad_ft import PADFTConfig
from unpoison.planning_repairs import attempts, repair_work


@pytest.mark.parametrize(
    ("config", "work"),
    [
        (FTConfig(steps=100, batch_size=50), (5000, 0)),
        (ABLConfig(steps=10, batch_size=50, isolation_epochs=1, training_epochs=2), (500 + 3 * 4000, 0)),
        (PADFTConfig(per_class=20, clip=ClippingConfig(rule="quantile")), (0, 2 * 4000 + 200)),
        (PADFTConfig(per_class=20, clip=ClippingConfig(rule="learned")), (50 * 200, 2 * 4000 + 200)),
        (PADFTConfig(clip=ClippingConfig(rule="suspects", suspect_steps=7, suspect_batch=10)), (70, 8000 + 2500)),
    ],
)
def test_work_follows_the_settings(config: Any, work: tuple[int, int]) -> None:
    assert repair_work(config, 4000, 10) == work


def test_every_repair_of_a_classifier_is_some_work() -> None:
    for entry in DEFENSES:
        if "victim model" in entry.needs:
            assert sum(repair_work(resolve(entry.config)(), 1000, 10)) > 0


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (FTConfig(learning_rate=0.1), 4),
        (FTConfig(learning_rate=0.02), 3),
        (FTConfig(smaller_rates=()), 1),
        (ABLConfig(), 1),
    ],
)
def test_smaller_rates_are_further_attempts(config: Any, most: int) -> None:
    assert attempts(config) == most
