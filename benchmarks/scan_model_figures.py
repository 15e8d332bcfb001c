"""Figures of many scans of models: rates with intervals, thresholds that a half speaks for, the tables, the ROC.

A row is what a scan found (benchmarks/scan_model.py); its word and score are made here by the package's own verdict.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from unpoison.detection.anomaly import AnomalyConfig, judge_reach
from unpoison.detection.measured import settings_of
from unpoison.detection.model_weights import DECREE, INVERSION, WeightsConfig, wave_score
from unpoison.detection.waves import WaveConfig
from unpoison.evaluation.intervals import wilson
from unpoison.model_results import ClassWave, Reach
from unpoison.results import write_atomically

FOUND, CLEAN = ("backdoored", "suspicious"), "clean"
MODES = ("images", "made-up", "encoder")
HALVES = ("calibration", "held-out")
SUCCESS = (100.0, 90.0, 80.0, 70.0, 60.0)
FLOORS, SQUARE_FLOORS = (0.4, 0.25, 0.15), (1.5, 1.0, 0.5)
MOST_FALSE_ALARMS, WEAK_UNDER = 5.0, 90.0
BEGIN, END = "<!-- zoo: written by benchmarks/scan_model.py table -->", "<!-- end of zoo -->"
RULE = (
    "success, floor and square_floor: those with the highest AUROC on the calibration half, the package's own where "
    "they are among the best, else the strictest of them. suspicious: the lowest cut with at most 5 % of the clean "
    "models at or above it; backdoored: the lowest with none, suspicious at least. A cut lies half-way between the "
    "scores around it."
)
Row = dict[str, Any]


def judged(row: Row, config: AnomalyConfig, *, alone: bool = False) -> Row:
    """The row with the word, score and target that the package gives at these thresholds, ``alone``: without
    references.

    What searched no classes (DECREE, a model that could not be opened) keeps its own.
    """
    if not row.get("classes"):
        return row
    found = [Reach(form=form, size=size, success=success) for _, form, size, success in row["classes"]]
    clean = [Reach(form=form, size=size, success=success) for form, size, success in row["reference_classes"]]
    result = judge_reach(found, [] if alone else clean, config, covered=row["covered"], made_up=row["made_up"])
    named = None if result.candidate is None else row["classes"][result.candidate][0]
    index = None if result.interval is None else [getattr(result.interval, name) for name in ("value", "low", "high")]
    word, score = result.word, result.score
    for wave in (ClassWave(**one) for one in row["waves"]):
        if wave_score(wave, config, WaveConfig()) > score:
            word, score, named, index = "backdoored", wave_score(wave, config, WaveConfig()), wave.name, None
    return row | {"word": word, "score": score, "named": named, "index": index}


def check_alike(rows: Sequence[Row]) -> None:
    """Raises ValueError unless all of a mode were found by the same search, with as many references, on the same images
    of each world."""
    for mode in MODES:
        own = [row for row in rows if row.get("mode") == mode]
        for what, values in {
            "searches": {row["inputs"]["search"] for row in own},
            "seeds": {row["inputs"]["seed"] for row in own},
            "numbers of references": {row["references"] for row in own},
            "sets of images": {row["inputs"]["images"] for row in own},
        }.items():
            if len(values) > (2 if what == "sets of images" else 1):  # one of each world
                raise ValueError(f"{mode}: {len(values)} {what} are mixed; run it again, which repeats what is old.")
    old = [row["name"] for row in rows if row.get("mode") not in MODES]
    if old:
        raise ValueError(f"{', '.join(old)}: of another version; run it again.")


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
        "inconclusive": sum(row["word"] == "inconclusive" for row in rows),
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


def choose_thresholds(rows: Sequence[Row], now: AnomalyConfig) -> dict[str, Any]:
    """By RULE, from rows of the calibration half alone; None each where there are no clean or no backdoored models."""
    if any(row["half"] != "calibration" for row in rows):
        raise ValueError("only rows of the calibration half may choose thresholds")
    poisoned, clean = [row for row in rows if row["target"]], [row for row in rows if not row["target"]]
    body: dict[str, Any] = {
        "rule": RULE, "backdoored": len(poisoned), "clean": len(clean), "package": asdict(now), "chosen": None,
        "references": sorted({row["references"] for row in rows}),
    }  # fmt: skip
    if not poisoned or not clean:
        return body

    def scores(config: AnomalyConfig) -> tuple[list[float], list[float]]:
        return [judged(row, config)["score"] for row in poisoned], [judged(row, config)["score"] for row in clean]

    tried = [replace(now, success=one, floor=two, square_floor=three)
             for one, two, three in product(SUCCESS, FLOORS, SQUARE_FLOORS)]  # fmt: skip
    tried = [now, *(config for config in tried if config != now)]
    best = max(tried, key=lambda config: auroc(*scores(config)) or 0.0)  # the first of equals
    bad, good = scores(best)
    suspicious = lowest_cut(good, bad, allowed=int(MOST_FALSE_ALARMS / 100 * len(good)))
    backdoored = max(suspicious, lowest_cut(good, bad, allowed=0))
    chosen = replace(best, suspicious=suspicious, backdoored=backdoored)
    body["chosen"] = asdict(chosen)
    body["auroc"] = {"package": auroc(*scores(now)), "chosen": auroc(bad, good)}
    body["at_package"], body["at_chosen"] = (figures([judged(row, config) for row in rows]) for config in (now, chosen))
    return body


def lowest_cut(clean: Sequence[float], poisoned: Sequence[float], *, allowed: int) -> float:
    """The lowest cut with at most ``allowed`` clean scores at or above it, half-way to the next score above."""
    below = sorted(clean, reverse=True)[allowed:]
    highest = max(below, default=0.0)
    above = min((score for score in (*clean, *poisoned) if score > highest), default=None)
    return float(np.round(highest + 0.5 if above is None else (highest + above) / 2, 2))


def summarize(
    rows: Sequence[Row], planned: Sequence[Row], refused: Sequence[Row], config: AnomalyConfig
) -> dict[str, Any]:
    """All figures: of each half, by family, without references, of each other mode, and of the published models."""
    own = [judged(row, config) for row in rows if row["mode"] == MODES[0]]
    held_out = [row for row in own if row["half"] == "held-out"]
    summary: dict[str, Any] = {half: figures([row for row in own if row["half"] == half]) for half in HALVES}
    summary["zoo"] = {
        half: {
            "planned": sum(entry["half"] == half for entry in planned),
            "refused": {
                family: sum(entry["half"] == half and entry["family"] == family for entry in refused)
                for family in sorted({entry["family"] for entry in refused if entry["half"] == half})
            },
            **{mode: sum(row["half"] == half and row["mode"] == mode for row in rows) for mode in MODES},
        }
        for half in HALVES
    }
    summary["families"] = {
        family: figures([row for row in held_out if row["family"] in (family, CLEAN)])
        for family in sorted({row["family"] for row in held_out} - {CLEAN})
    }
    summary["weak_families"] = weak_families(summary["families"])
    summary["references"] = sorted({row["references"] for row in held_out})
    alone = [judged(row, config, alone=True) for row in rows if row["mode"] == MODES[0] and row["half"] == "held-out"]
    summary["held-out without references"] = figures(alone)
    for mode in MODES[1:]:
        found = [judged(row, config) for row in rows if row["mode"] == mode and row["half"] == "held-out"]
        summary[f"held-out {mode}"] = figures(found)
    known = {row["name"]: row for row in own if row["half"] == "published"}
    for name, row in known.items():
        summary[name] = {key: row[key] for key in ("word", "named", "score", "index", "asr", "references", "seconds",
                                                   "processor_seconds")}  # fmt: skip
    if "published-victim" in known:
        victim = known["published-victim"]
        right = victim["word"] == "backdoored" and victim["named"] == victim["target"]
        summary["published_victim_found"] = float(right)
    if "published-clean" in known:
        summary["published_clean_cleared"] = float(known["published-clean"]["word"] == "no evidence")
    return summary


def weak_families(families: dict[str, Any]) -> list[str]:
    """Families of the held-out half of which fewer are found than there should be."""
    return [name for name, found in families.items() if (found["detection_rate"] or 0.0) < WEAK_UNDER]


def measured(rows: Sequence[Row], config: WeightsConfig) -> list[Row]:
    """What the package tells its users: counts of the held-out half by kind of model and of scan, with the settings."""
    made: list[Row] = []
    for kind, (mode, alone) in product(("classifier", "clip"), (*product(MODES[:2], (False, True)), (MODES[2], False))):
        own = [judged(row, config.anomaly, alone=alone) for row in rows
               if (row["half"], row["kind"], row["mode"]) == ("held-out", kind, mode)]  # fmt: skip
        found = figures(own)
        if not own or (not alone and own[0]["references"] == 0):
            continue
        families = {family: figures([row for row in own if row["family"] == family])
                    for family in sorted({row["family"] for row in own} - {CLEAN})}  # fmt: skip
        method = DECREE if mode == "encoder" else INVERSION
        made.append({
            "kind": "CLIP" if kind == "clip" else kind, "method": method, "made_up": mode == "made-up",
            "references": 0 if alone else own[0]["references"], "settings": settings_of(config, method),
            "clean": found["clean"], "backdoored": found["backdoored"],
            "false_alarms": sum(row["word"] in FOUND for row in own if not row["target"]),
            "found": sum(row["word"] in FOUND for row in own if row["target"]),
            "named": sum(row["word"] in FOUND and row["named"] == row["target"] for row in own if row["target"]),
            "weak": weak_families(families),
        })  # fmt: skip
    return made


def zoo_table(summary: dict[str, Any], roc: str) -> str:
    """Markdown: what there is of the zoo, the held-out half by trigger family, other ways to scan, the ROC."""
    held_out = summary["held-out"]
    lines = [
        *(_census(half, summary["zoo"][half], summary[half]) for half in HALVES),
        "",
        "| trigger, held-out half | backdoored | found, % | target named, % of those | AUROC |",
        "|---|---|---|---|---|",
        *(_line(family, found) for family, found in summary["families"].items()),
        _line("**all**", held_out),
    ]
    others = ("held-out without references", "held-out made-up", "held-out encoder")
    shown = {name: summary[name] for name in others if summary.get(name, {}).get("clean")}
    lines += [
        "",
        "| scan | clean | false alarms, % | backdoored | found, % | target named, % of those | AUROC |",
        "|---|---|---|---|---|---|---|",
        *(_mode(name.removeprefix("held-out "), found)
          for name, found in {f"{summary['references'][0]} references": held_out, **shown}.items()),
        "",
        "In brackets 95 % intervals (Wilson). An encoder scan (DECREE) names no target.",
    ]  # fmt: skip
    weak = summary["weak_families"]
    if weak:
        lines += ["", f"Weak on: {', '.join(weak)} (under {WEAK_UNDER:.0f} percent found)."]
    return "\n".join([*lines, "", f"![ROC of the held-out half]({roc})"])


def _census(half: str, zoo: dict[str, Any], found: dict[str, Any]) -> str:
    refused = sum(zoo["refused"].values())
    scanned = zoo[MODES[0]]
    by = ", ".join(f"{family} {count}" for family, count in zoo["refused"].items())
    done = "" if scanned + refused >= zoo["planned"] else f" **Only {scanned} of {zoo['planned'] - refused} so far.**"
    said = (
        f"{half.capitalize()}: {zoo['planned']} models planned, {refused} refused as too weak{f' ({by})' if by else ''}"
    )
    return f"- {said}, {scanned} scanned, {found['inconclusive']} of them inconclusive.{done}"


def _line(name: str, found: dict[str, Any]) -> str:
    detected, named = _rate(found, "detection_rate"), _rate(found, "target_named_rate")
    return f"| {name} | {found['backdoored']} | {detected} | {named} | {_area(found)} |"


def _mode(name: str, found: dict[str, Any]) -> str:
    rates = [_rate(found, rate) for rate in ("false_alarm_rate", "detection_rate", "target_named_rate")]
    return (
        f"| {name} | {found['clean']} | {rates[0]} | {found['backdoored']} | {rates[1]} | {rates[2]} | {_area(found)} |"
    )


def _area(found: dict[str, Any]) -> str:
    return "-" if found["auroc"] is None else f"{found['auroc']:.3f}"


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
