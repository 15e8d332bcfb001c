"""A class that is reached by far too little is searched for once more: of a clean model some class is so by chance.

Steps
    1. :mod:`unpoison.detection.trigger_search`. What it finds by a wave stands: no clean model came near those bounds.
    2. Where it suspects a class by a small change, the same classes again, from other random numbers and on other
       images, or with others of them to judge.
    3. The verdict over the means of both; where nothing is suspected any more, waves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from unpoison.detection.inversion import Logits
from unpoison.detection.trigger_search import (
    STEP,
    TriggerSearch,
    TriggerSearchConfig,
    add_waves,
    judge_triggers,
    kept_steps,
    look_for_waves,
    search_triggers,
)
from unpoison.runs import Run
from unpoison.types import Images

_AGAIN = f"{STEP}-again"


def search_twice(
    logits: Logits,
    images: Images,
    others: Callable[[], Images],
    names: Sequence[str],
    config: TriggerSearchConfig | None = None,
    *,
    run: Run,
) -> TriggerSearch:
    """:func:`unpoison.detection.trigger_search.search_triggers`, what it suspects by a small change searched for again.

    ``others`` are the second one's images, at best different ones; they are asked for where there is a second search.
    :func:`kept_twice` lists the steps of the run.
    """
    config = config or TriggerSearchConfig()
    found = search_triggers(logits, images, names, config, run=run)
    if not found.suspects or found.by_wave:
        return found
    same, second = [trigger.target for trigger in found.triggers], replace(run, seed=run.seed_of("second search"))
    small = replace(config, waves=None)
    again = search_triggers(logits, others(), names, small, targets=same, run=second, step=_AGAIN)
    mean = average_searches(found, again, names, config)
    return mean if mean.suspects else add_waves(mean, look_for_waves(mean, logits, images, config), names)


def average_searches(
    first: TriggerSearch, second: TriggerSearch, names: Sequence[str], config: TriggerSearchConfig
) -> TriggerSearch:
    """The verdict on the geometric means of both sizes; success is the lower one. Triggers are those of ``first``.

    A class that ``second`` did not look at to the end has the numbers of ``first``.
    """
    triggers, again = [], {trigger.target: trigger for trigger in second.triggers}
    for trigger in first.triggers:
        other = again.get(trigger.target, trigger)
        triggers.append(
            replace(
                trigger, size=float(np.sqrt(trigger.size * other.size)), success=min(trigger.success, other.success)
            )
        )
    return judge_triggers(triggers, names, config, skipped=first.skipped)


def kept_twice(count: int) -> list[str]:
    """The steps of a run that :func:`search_twice` over ``count`` classes may have kept; to be forgotten once it is."""
    return kept_steps(count) + kept_steps(count, _AGAIN)
