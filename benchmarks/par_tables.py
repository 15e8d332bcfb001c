"""The tables of benchmarks/par.py: results of its cells to Markdown, to the figures that are claimed, to a plot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CLEAN = "clean"
Row = dict[str, Any]
Victims = dict[tuple[str, int], Row]


def read_results(folder: Path, which: str) -> list[Row]:
    return [json.loads(file.read_bytes()) for file in sorted(folder.glob(f"{which}-*.json"))]


def at(body: Any, *path: str) -> float | None:
    """The number at a path, None where something on the way is missing."""
    for key in path:
        body = body.get(key) if body is not None else None
    return body


def victims_of(results: list[Row]) -> Victims:
    return {(row["attack"], row["seed"]): row for row in results if row["method"] == "none"}


def print_table(results: list[Row], methods: list[str]) -> None:
    """Mean and spread over seeds, by attack and method; variants come after the methods."""
    victims = victims_of(results)
    columns: dict[str, Callable[[Row], float | None]] = {
        "C-Acc": lambda row: at(row, "after", "c_acc", "value"),
        "fall": lambda row: fall(row, victims),
        "ASR": lambda row: at(row, "after", "asr", "value"),
        "floor": lambda row: at(row, "after", "asr_floor", "value"),
        "excess": lambda row: at(row, "after", "asr_excess"),
        "RA": lambda row: at(row, "after", "ra", "value"),
        "R@1 image to text": lambda row: at(row, "after", "image_to_text", "at_1", "value"),
        "R@1 text to image": lambda row: at(row, "after", "text_to_image", "at_1", "value"),
        "drift raw": lambda row: at(row, "after", "drift", "image_raw"),
        "drift aligned": lambda row: at(row, "after", "drift", "image_aligned"),
        "rebound (excess)": lambda row: at(row, "rebound", "asr_excess"),
        "s": lambda row: at(row, "seconds", "repair"),
    }
    print(f"| attack | method | seeds | {' | '.join(columns)} |")
    print("|" + "---|" * (3 + len(columns)))
    for attack in sorted({row["attack"] for row in results}, key=lambda name: (name == CLEAN, name)):
        found = {row["method"] for row in results if row["attack"] == attack}
        for method in [*(name for name in methods if name in found), *sorted(found - set(methods))]:
            rows = [row for row in results if (row["attack"], row["method"]) == (attack, method)]
            shown = [spread([pick(row) for row in rows], 2 if "drift" in name else 1) for name, pick in columns.items()]
            print(f"| {attack} | {method} | {len(rows)} | {' | '.join(shown)} |")


def summary(results: list[Row], methods: list[str]) -> dict[str, Any]:
    victims = victims_of(results)
    return {name: claims([row for row in results if row["method"] == name], victims) for name in methods}


def spread(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{np.mean(known):.{digits}f}" + (f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else "")


def fall(row: Row, victims: Victims) -> float | None:
    """Points of C-Acc that the repair cost."""
    before = victims.get((row["attack"], row["seed"]))
    return None if before is None else before["after"]["c_acc"]["value"] - row["after"]["c_acc"]["value"]


def claims(rows: list[Row], victims: Victims) -> dict[str, Any]:
    """Mean over all attacked cells, the worst single one, and the clean model's fall."""

    def figure(pick: Callable[[Row], float | None], *, clean: bool = False) -> dict[str, Any]:
        chosen = [row for row in rows if (row["attack"] == CLEAN) == clean]
        known = {f"{row['attack']}-{row['seed']}": number for row in chosen if (number := pick(row)) is not None}
        if not known:
            return {"cells": 0}
        worst = max(known, key=lambda name: known[name])
        return {"mean": float(np.mean([*known.values()])), "max": known[worst], "worst": worst, "cells": len(known)}

    return {
        "asr_before": figure(lambda row: at(victims.get((row["attack"], row["seed"])), "after", "asr_excess")),
        "asr_after": figure(lambda row: at(row, "after", "asr_excess")),
        "c_acc_drop": figure(lambda row: fall(row, victims)),
        "clean_c_acc_drop": figure(lambda row: fall(row, victims), clean=True),
        "ra_after": figure(lambda row: at(row, "after", "ra", "value")),
        "rebound": figure(lambda row: at(row, "rebound", "asr_excess")),
    }


NAMES = {"clean-clip": "CleanCLIP, its rate", "par": "PAR as published, tau", "ours": "default, adversary's share"}
"""The methods of the frontier, and what turns."""


def plot(points: dict[str, list[Row]], file: Path) -> None:
    """A panel for each attack and seed: the lower right corner is best."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((p["attack"], p["seed"]) for p in points["none"]))
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for axes, (attack, seed) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):

        def places(name: str, panel: tuple[str, int] = (attack, seed)) -> tuple[list[float], list[float]]:
            found = [p for p in points.get(name, []) if (p["attack"], p["seed"]) == panel]
            return [p["c_acc"] for p in found], [p["asr_excess"] for p in found]

        for (name, label), marker in zip(NAMES.items(), "soD", strict=True):
            axes.plot(*places(name), marker=marker, markersize=5, linewidth=1, label=label)
        axes.plot(*places("none"), "*", color="black", markersize=9, label="as given")
        axes.set(title=f"{attack}, seed {seed}", xlabel="C-Acc, %", ylabel="excess ASR, %", ylim=(-3, 103))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, metadata={"Date": None})
