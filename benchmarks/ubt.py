"""UBT on backdoored CLIPs and the pairs that they were trained on: who is suspected, and what unlearning leaves.

    python recipes/clip_victims.py make --seed 0 1 2        # first: the victims, under runs/clip-victims
    python benchmarks/ubt.py run [--attack wanet ...] [--seed 0 ...] [--variant ours ...]
    python benchmarks/ubt.py run --set tune --seed 9 --variant ours hinge ...
    python benchmarks/ubt.py table [--set tune]

Pairs: all that the victim was trained on, poison included. Reference: the clean CLIP that it was fine-tuned from.
Measured like benchmarks/par.py, on the same images and captions; ``--set tune`` on others, for victims of a seed that
no table has. Detectors of pairs beside it get the same embeddings.
One JSON a cell; a cell that is done is not computed again. One thread a process.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from clip_victims import open_data, read_victim  # pyright: ignore[reportMissingImports]
from par import SETS, Printed, figures, find_victim

from unpoison.api import ScanOutcome
from unpoison.api_clip import count_parameters
from unpoison.api_pairs import PAIR_DETECTORS, PairDetectorConfig
from unpoison.api_ubt import UBTOutcome, purify_with_abl_clip, purify_with_ubt
from unpoison.attacks.pairs import apply_pair_poisoning
from unpoison.data.pairs import open_pairs
from unpoison.data.sources import open_images
from unpoison.defenses.baselines.abl_clip import ABLClipConfig
from unpoison.defenses.ubt import PUBLISHED, UBTConfig
from unpoison.embedded_pairs import Embedded, see_pairs
from unpoison.evaluation.clip import evaluate_clip
from unpoison.evaluation.metrics import auroc, recall
from unpoison.models.clip_files import load_any_clip
from unpoison.results import write_atomically
from unpoison.runs import Run, RunFolder
from unpoison.types import ImageTextModel

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/ubt"
SUMMARY = ROOT / "benchmarks/results/ubt.json"
ATTACKS = ("badnet-rand", "badnet-stripes", "blended-rand", "blended-stripes", "blended-triangles", "blended-text",
           "wanet", "badclip", "clean")  # fmt: skip
DETECTORS = ("dao", "slof", "k-distance", "similarity", "density", "exposure")
ABL = "abl-clip"
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    ABL: {},
    **{f"{ABL}-{factor}": {"factor": factor} for factor in (8, 16)},
    "paper": PUBLISHED,
    "hinge": {"loss": "hinge"},
    "ascent": {"loss": "ascent"},
    "whole-captions": {"words": 1.0},
    "patches": {"patches": 0.05},
    "relations": {"keep": "relations"},
    "no-anchor": {"anchor": 0.0},
    "weight-2": {"unlearn_weight": 2.0},
    "weight-4": {"unlearn_weight": 4.0},
    "weight-8": {"unlearn_weight": 8.0},
    "weight-16": {"unlearn_weight": 16.0},
    "keep-all": {"keep_share": 1.0},
    "epochs-3": {"epochs": 3},
    "weight-8-epochs-4": {"unlearn_weight": 8.0, "epochs": 4},
}


def abl_config(clip: ImageTextModel, pairs: int, settings: dict[str, Any]) -> ABLClipConfig:
    """ABL's for so many pairs, at ``factor`` times the scaled rate; the table's victims get the grid's 200 steps."""
    start = ABLClipConfig.scaled(parameters=count_parameters(clip), samples=pairs, batch_size=128, steps=200)
    factor = settings.get("factor")
    return start if factor is None else replace(start, learning_rate=factor * start.learning_rate)


def compute(attack: str, seed: int, variant: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    victim, data = read_victim(folder), open_data(args.shared)
    poisoning = victim.poisoning
    pairs = data.train if poisoning is None else apply_pair_poisoning(data.train, poisoning)
    truth = np.isin(pairs.ids, [] if poisoning is None else poisoning.ids)
    clip, reference = load_any_clip(victim.model), load_any_clip("tiny")
    inputs = {"victim": clip.fingerprint, "pairs": pairs.caption_fingerprint, "variant": VARIANTS[variant]}
    name = f"{args.set}-{attack}-{seed}-{variant}"
    run = Run(seed=seed, progress=Printed(), cache=args.work / "cache", folder=RunFolder.open(args.work / name, inputs))
    images, retrieval = (f"{args.shared}/data/{source}" for source in SETS[args.set])

    def evaluate(model: Any) -> dict[str, Any]:
        found = evaluate_clip(
            model, open_images(images), poisoning=poisoning, retrieval=open_pairs(retrieval), suspect=clip, run=run,
            name=name,
        )  # fmt: skip
        return figures(found)

    result: dict[str, Any] = {"attack": attack, "seed": seed, "method": variant, "set": args.set, "pairs": len(pairs)}
    result["poison_rate"] = 100 * float(truth.mean())
    if variant == "ours" and truth.any():
        result["detectors"] = detection(see_pairs(pairs, clip=clip, reference=reference, captions=True, run=run), truth)
    begun = time.time()
    if variant.startswith(ABL):
        outcome = purify_with_abl_clip(clip, pairs, config=abl_config(clip, len(pairs), VARIANTS[variant]), run=run)
    else:
        config = UBTConfig.recommended(parameters=count_parameters(clip), samples=len(pairs), **VARIANTS[variant])
        outcome = purify_with_ubt(clip, pairs, reference=reference, config=config, run=run)
    seconds, found = time.time() - begun, outcome.purification
    result |= {
        "before": evaluate(clip), "after": evaluate(outcome.clip), "seconds": seconds, "accepted": found.accepted,
        "left_alone": found.left_alone, "reason": found.reason, "history": found.history,
        "exposure": json.loads(json.dumps(found.exposure, default=vars)), "config": found.config,
    }  # fmt: skip
    return result | (found_pairs(outcome.suspicious, truth) if isinstance(outcome, UBTOutcome) else {})


def found_pairs(suspicious: ScanOutcome, truth: np.ndarray) -> dict[str, Any]:
    """AUROC of the scores; precision and recall of what is flagged."""
    flagged = suspicious.split.suspect
    return {
        "auroc": auroc(suspicious.scores.suspicion, truth) if truth.any() else None, "flagged": len(flagged),
        "precision": float(truth[flagged].mean()) if len(flagged) else None,
        "recall": float(truth[flagged].sum() / truth.sum()) if truth.any() else None,
    }  # fmt: skip


def detection(known: Embedded, truth: np.ndarray) -> dict[str, Any]:
    """AUROC and recall (as many flagged as there is poison) of the detectors on all usable pairs."""
    here, found = truth[known.rows], {}
    for method in DETECTORS:
        axes = PAIR_DETECTORS[method].score(known, PairDetectorConfig(), Run())
        scores = next(iter(axes.values()))
        first = np.zeros(len(here), dtype=bool)
        first[np.argsort(-scores, kind="stable")[: int(here.sum())]] = True
        found[method] = {"auroc": auroc(scores, here), "recall_at_rate": recall(first, here)}
    return found


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        for attack in args.attack:
            folder = find_victim(args.victims, attack, seed)
            if folder is None:
                print(f"{attack} {seed}: no accepted victim under {args.victims}", flush=True)
                continue
            for variant in args.variant:
                file = args.results / f"{args.set}-{attack}-{seed}-{variant}.json"
                if file.exists():
                    continue
                print(f"{attack} {seed} {variant}", flush=True)
                result = compute(attack, seed, variant, folder, args)
                write_atomically(file, json.dumps(result, indent=1, default=float).encode() + b"\n")
                print(f"  {describe(result)}", flush=True)


def describe(result: dict[str, Any]) -> str:
    rates = ("c_acc", "asr", "asr_floor", "ra")
    sides = [
        " ".join(f"{side[key]['value']:.1f}" for key in rates if side[key])
        for side in (result["before"], result["after"])
    ]
    shown = "-" if result.get("auroc") is None else f"{result['auroc']:.3f}"
    return f"{' > '.join(sides)}  AUROC {shown}  {result['seconds']:.0f} s  {result['reason']}"


def table(args: argparse.Namespace) -> None:
    """Means over seeds as Markdown; the figures that are claimed as JSON."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(args.results.glob(f"{args.set}-*.json")):
        result = json.loads(file.read_bytes())
        cells.setdefault((result["attack"], result["method"]), []).append(result)
    names = ("C-Acc before", "C-Acc", "ASR before", "ASR", "floor", "RA", "AUROC", "precision", "recall", "seconds")
    print("| attack | method | seeds | " + " | ".join(names) + " |\n|" + "---|" * (3 + len(names)))
    for (attack, method), found in sorted(cells.items()):
        columns = np.array([_columns(result) for result in found], dtype=float)
        means = [f"{value:.3g}" if not np.isnan(value) else "" for value in np.nanmean(columns, axis=0)]
        print(f"| {attack} | {method} | {len(found)} | " + " | ".join(means) + " |")
    ours = [result for (attack, method), found in cells.items() if method == "ours" and attack != "clean"
            for result in found]  # fmt: skip
    if args.set == "test" and ours:
        falls = [entry["before"]["c_acc"]["value"] - entry["after"]["c_acc"]["value"] for entry in ours]
        summary = {
            "cells": len(ours), "auroc_min": min(entry["auroc"] for entry in ours),
            "asr_after_max": max(entry["after"]["asr_excess"] for entry in ours), "c_acc_drop_max": max(falls),
            "detectors": {f"{entry['attack']}-{entry['seed']}": entry["detectors"] for entry in ours},
        }  # fmt: skip
        SUMMARY.write_text(json.dumps(summary, indent=1) + "\n")


def _columns(result: dict[str, Any]) -> list[float]:
    before, after = result["before"], result["after"]

    def value(side: dict[str, Any], key: str) -> float:
        return side[key]["value"] if side[key] else np.nan

    rates = [value(before, "c_acc"), value(after, "c_acc"), value(before, "asr"), value(after, "asr"),
             value(after, "asr_floor"), value(after, "ra")]  # fmt: skip
    more = [result.get(key) for key in ("auroc", "precision", "recall")]
    return [*rates, *(np.nan if entry is None else entry for entry in more), result["seconds"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table"])
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=["ours"])
    parser.add_argument("--set", choices=list(SETS), default="test", help="what is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--victims", type=Path, default=ROOT / "runs/clip-victims")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-ubt")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    {"run": run, "table": table}[args.verb](args)


if __name__ == "__main__":
    main()
