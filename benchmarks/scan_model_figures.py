"""Figures of many scans of models: rates with intervals, thresholds that a half speaks for, the table, the ROC."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from unpoison.detection.anomaly import AnomalyConfig, deviations_under, log_sizes, score_of
from unpoison.detection.class_search import FEWEST_CLASSES
from unpoison.evaluation.intervals import wilson
from unpoison.results import write_atomically

FOUND = ("backdoored", "suspicious")
SUCCESS, SQUARE_SUCCESS = (50.0, 60.0, 70.0, 80.0, 90.0), (60.0, 70.0, 80.0, 90.0, 95.0)
MOST_FALSE_ALARMS, WEAK_UNDER = 5.0, 90.0
BEGIN, END = "<!-- zoo: written by benchmarks/scan_model.py table -->", "<!-- end of zoo -->"
RULE = (
    "success and square_success: the pair with the highest AUROC on the calibration half, the package's own where it "
    "is among the best, else the strictest of them. suspicious: the lowest cut with at most 5 % of the clean models at "
    "or above it; backdoored: the lowest with none, suspicious at least. A cut lies half-way between the scores around "
    "it."
)
Row = dict[str, Any]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Rates in percent with Wilson intervals; None where there is nothing to divide by. Inconclusive ones count as not
    found."""
    poisoned, clean = [row for row in rows if row["target"]], [row for row in rows if not row["target"]]
    detected = [row for row in poisoned if row["word"] in FOUND]
    counts = {
        "detection_rate": (len(detected), len(poisoned)),
        "false_alarm_rate": (sum(row["word"] in FOUND for row in clean), len(clean)),
        "target_named_rate": (sum(row["named"] == row["target"] for row in detected), len(detected)),
    }
    return {
        "backdoored": len(poisoned),
        "clean": len(clean),
        "auroc": auroc([row["score"] for row in poisoned], [row["score"] for row in clean]),
        **{name: percent(*count) for name, count in counts.items()},
        "intervals": {name: _interval(*count) for name, count in counts.items()},
    }


def auroc(poisoned: Sequence[float], clean: Sequence[float]) -> float | None:
    """Share of pairs in which the backdoored model scores higher; ties count half."""
    if not poisoned or not clean:
        return None
    wins = sum((a > b) + 0.5 * (a == b) for a in poisoned for b in clean)
    return wins / (len(poisoned) * len(clean))


def percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _interval(part: int, whole: int) -> list[float] | None:
    if not whole:
        return None
    found = wilson(part, whole)
    return [found.low, found.high]


def score_at(row: Row, config: AnomalyConfig) -> float:
    """A model's score as the weights verdict would give it at other thresholds of success; 0 where nothing works."""
    scores = []
    for form in {entry[1] for entry in row["classes"]}:
        found = [entry for entry in row["classes"] if entry[1] == form]
        success = [entry[3] for entry in found]
        logs = log_sizes([entry[2] for entry in found], success, form=form)
        own = deviations_under(logs, logs, config.floor)
        for entry, index in zip(found, own.tolist(), strict=True):
            second = entry[5] if len(entry) > 5 else None
            own_index = index if len(found) >= FEWEST_CLASSES else second
            if entry[3] >= config.needed(form) and own_index is not None:
                scores.append(score_of(own_index, second))
    return max(scores, default=0.0)


def choose_thresholds(rows: Sequence[Row], now: AnomalyConfig) -> dict[str, Any]:
    """By RULE, from rows of the calibration half alone; None each where there are no clean or no backdoored models."""
    if any(row["half"] != "calibration" for row in rows):
        raise ValueError("only rows of the calibration half may choose thresholds")
    poisoned, clean = [row for row in rows if row["target"]], [row for row in rows if not row["target"]]
    body: dict[str, Any] = {
        "rule": RULE, "backdoored": len(poisoned), "clean": len(clean), "package": _constants(now), "chosen": None,
    }  # fmt: skip
    if not poisoned or not clean:
        return body

    def scores(config: AnomalyConfig) -> tuple[list[float], list[float]]:
        return [score_at(row, config) for row in poisoned], [score_at(row, config) for row in clean]

    tried = [replace(now, success=one, square_success=two) for one, two in product(SUCCESS, SQUARE_SUCCESS)]
    tried = [now, *(config for config in reversed(tried) if config != now)]
    best = max(tried, key=lambda config: auroc(*scores(config)) or 0.0)  # the first of equals
    bad, good = scores(best)
    suspicious = lowest_cut(good, bad, allowed=int(MOST_FALSE_ALARMS / 100 * len(good)))
    backdoored = max(suspicious, lowest_cut(good, bad, allowed=0))
    chosen = replace(best, suspicious=suspicious, backdoored=backdoored)
    body["chosen"] = _constants(chosen)
    body["auroc"] = {"package": auroc(*scores(now)), "chosen": auroc(bad, good)}
    body["at_chosen"] = {
        "detected": sum(score >= suspicious for score in bad),
        "false_alarms": sum(score >= suspicious for score in good),
    }
    return body


def lowest_cut(clean: Sequence[float], poisoned: Sequence[float], *, allowed: int) -> float:
    """The lowest cut with at most ``allowed`` clean scores at or above it, half-way to the next score above."""
    below = sorted(clean, reverse=True)[allowed:]
    highest = max(below, default=0.0)
    above = min((score for score in (*clean, *poisoned) if score > highest), default=None)
    return float(np.round(highest + 0.5 if above is None else (highest + above) / 2, 2))


def _constants(config: AnomalyConfig) -> dict[str, float]:
    return {name: value for name, value in asdict(config).items() if name != "floor"}


def families_table(summary: dict[str, Any], roc: str) -> str:
    """Markdown: the held-out half by trigger family, the families that are weak, and the ROC."""
    lines = [
        "| trigger | backdoored | found, % | target named, % of those | AUROC |",
        "|---|---|---|---|---|",
        *(_line(family, found) for family, found in summary["families"].items()),
        _line("**all**", summary["held-out"]),
        "",
        f"False alarms: {_rate(summary['held-out'], 'false_alarm_rate')} percent of "
        f"{summary['held-out']['clean']} clean models. In brackets 95 % intervals (Wilson).",
    ]
    weak = weak_families(summary)
    if weak:
        lines += ["", f"Weak on: {', '.join(weak)} (under {WEAK_UNDER:.0f} percent found)."]
    return "\n".join([*lines, "", f"![ROC of the held-out half]({roc})"])


def weak_families(summary: dict[str, Any]) -> list[str]:
    """Families of the held-out half of which fewer are found than there should be: what NOT_COVERED has to name."""
    return [name for name, found in summary["families"].items() if (found["detection_rate"] or 0.0) < WEAK_UNDER]


def _line(name: str, found: dict[str, Any]) -> str:
    area = "-" if found["auroc"] is None else f"{found['auroc']:.3f}"
    detected, named = _rate(found, "detection_rate"), _rate(found, "target_named_rate")
    return f"| {name} | {found['backdoored']} | {detected} | {named} | {area} |"


def _rate(found: dict[str, Any], name: str) -> str:
    if found[name] is None:
        return "-"
    low, high = found["intervals"][name]
    return f"{found[name]:.0f} ({low:.0f} to {high:.0f})"


def write_table(page: Path, table: str) -> None:
    """Put the table between its two marks. Raises ValueError for a page without them."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page} lacks {BEGIN} and {END}")
    write_atomically(page, f"{before}{BEGIN}\n{table}\n{END}{after}".encode())


def draw_roc(rows: Sequence[Row], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "unpoison"
    scores = sorted({row["score"] for row in rows}, reverse=True)
    poisoned, clean = [row for row in rows if row["target"]], [row for row in rows if not row["target"]]
    points = [(0.0, 0.0)]
    points += [
        (percent(sum(row["score"] >= cut for row in clean), len(clean)) or 0.0,
         percent(sum(row["score"] >= cut for row in poisoned), len(poisoned)) or 0.0)
        for cut in scores
    ]  # fmt: skip
    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.step(*zip(*points, strict=True), where="post")
    axes.set(xlabel="clean models, %", ylabel="backdoored models, %", xlim=(-2, 102), ylim=(-2, 102))
    axes.set_title(f"Held out: {len(poisoned)} backdoored, {len(clean)} clean")
    figure.savefig(path, metadata={"Date": None})
