"""Several repairs of CLIPs side by side: what each cost in accuracy against what it left of the attack."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from unpoison.clip_results import ClipPurification
from unpoison.report import charts
from unpoison.report.runs import ReportRun
from unpoison.report.views import Figure

FEWEST = 2
_OWN = {"text_tower": "train", "distill": "none", "recovery": "gate", "crop": 0, "flip": False, "adversary_share": 0.0}
"""PAR's keys beyond the paper, and what switches them off."""


def frontier(runs: Sequence[ReportRun]) -> Figure | None:
    """C-Acc against excess ASR after each repair, one line a method; None where fewer than two were tested so."""
    points: dict[str, list[tuple[float, float]]] = {}
    given: set[tuple[float, float]] = set()
    for run in runs:
        found = run.clip
        if found is None or found.before is None or found.after is None:
            continue
        if found.before.asr_excess is None or found.after.asr_excess is None:
            continue
        points.setdefault(method_name(found), []).append((found.after.c_acc.value, found.after.asr_excess))
        given.add((found.before.c_acc.value, found.before.asr_excess))
    if sum(map(len, points.values())) < FEWEST:
        return None
    lines = {name: sorted(places) for name, places in points.items()}
    return Figure(
        svg=Markup(charts.frontier_chart(lines, sorted(given))),  # noqa: S704 - charts escape all text
        caption="Zero-shot accuracy against what is left of the attack: the lower right corner is best. "
        "Each point is a run; the stars are the models as they were given.",
    )


def method_name(result: ClipPurification) -> str:
    """The method, and whether it was told more than its paper says."""
    beyond = any(result.config.get(key, off) != off for key, off in _OWN.items())
    return f"{result.method}, beyond the paper" if beyond else result.method
