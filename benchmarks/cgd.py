"""CGD on CIFAR-10: victims, separation, repair and ablations, one JSON a cell.

    python benchmarks/cgd.py run [--attack badnet ...] [--seed 0 ...] [--until victim|scores|repair|ablations]
    python benchmarks/cgd.py separation    # how each ablation of stage A splits the set: no repair, seconds a cell
    python benchmarks/cgd.py natural       # what a model that was never poisoned says to each trigger
    python benchmarks/cgd.py small         # the early axis on small sets, with the paper's batches and with ours
    python benchmarks/cgd.py table

Rows 25,000..34,999 of CIFAR-10 train, 5 percent poisoned toward class 0; all 10,000 test images for every rate.
A cell that is done with the same settings is not computed again; a cell that was interrupted goes on. One thread a
process: start two processes with other seeds to use two cores. The last rows of train (45,000..) are the ones to look
at while tuning.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import open_images
from unpoison.defenses.cgd import CGDConfig, repair_with_cgd
from unpoison.detection.cgd import (
    CLIP_AXIS,
    EARLY_AXIS,
    JOINT_AXIS,
    SeparationConfig,
    early_model_logits,
    score_with_cgd,
)
from unpoison.detection.ranks import label_cross_entropy
from unpoison.detection.thresholds import split_as_published, split_by_evidence
from unpoison.evaluation.classifier import evaluate_before_after, evaluate_classifier
from unpoison.evaluation.metrics import auroc
from unpoison.models.classifier import new_classifier
from unpoison.models.clip_transformers import load_clip
from unpoison.models.zero_shot import zero_shot_logits
from unpoison.results import Evaluation, Split, write_atomically
from unpoison.runs import Run, RunFolder
from unpoison.training import train_classifier

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cgd"
SUMMARY = ROOT / "benchmarks/results/cgd.json"
NATURAL = ROOT / "benchmarks/results/cgd_natural.json"
SEPARATION = ROOT / "benchmarks/results/cgd_separation.json"
SMALL = ROOT / "benchmarks/results/cgd_small.json"
ATTACKS = ("clean", "badnet", "blended", "sig", "wanet", "clean-image")
RATE, TARGET, ROWS, EPOCHS = 0.05, 0, "25000:35000", 15
ABLATIONS = {
    "scale-1": CGDConfig(separation=SeparationConfig(clip_logit_scale=1.0)),
    "rank-in-class": CGDConfig(separation=SeparationConfig(rank_within="class")),
    "clip-axis-only": CGDConfig(),
    "early-axis-only": CGDConfig(),
    "no-unlearning": CGDConfig(beta=0.0, believed=100.0),
    "no-kl": CGDConfig(alpha=0.0),
    "authors-kl": CGDConfig(alpha=5e-4, teacher="all"),
    "published-regions": CGDConfig(regions="published"),
    "as-published": CGDConfig.as_published(samples=10_000),
}


class Printed:
    """Progress as plain lines."""

    def track(self, items, *, total, what, weight=1, unit=""):
        begun, done = time.time(), 0
        for item in items:
            yield item
            done += weight
            print(f"  {what}: {done}/{total} {unit}, {done / (time.time() - begun):.0f}/s", flush=True)

    def log(self, message: str) -> None:
        print(f"  {message}", flush=True)


class Cell:
    """One attack and seed: everything below is computed once and kept in its run folder."""

    def __init__(self, attack: str, seed: int, shared: Path, work: Path) -> None:
        self.attack, self.seed, self.name = attack, seed, f"{attack}-{seed}"
        data = shared / "data/cifar10"
        base = open_images(f"{data}/train.parquet[{ROWS}]")
        self.test = open_images(data / "test.parquet")
        # The clean control has no manifest of its own: its trigger rates are those of a trigger it never saw.
        self.poisoning = plan_poisoning(
            base, "badnet" if attack == "clean" else attack, rate=RATE, target=TARGET, seed=seed
        )
        self.source = base if attack == "clean" else apply_poisoning(base, self.poisoning)
        inputs = {"cell": self.name, "rows": ROWS, "rate": RATE, "target": TARGET, "epochs": EPOCHS}
        self.folder = RunFolder.open(work / self.name, inputs)
        self.run = Run(seed=seed, progress=Printed(), cache=work / "cache", folder=self.folder)
        self.pixels = load_pixels(self.source, 32, cache=self.run.cache, progress=self.run.progress)
        poisoned = set() if attack == "clean" else set(self.poisoning.ids)
        self.truth = np.array([sample in poisoned for sample in self.source.ids])

    @property
    def wants_victim(self) -> bool:
        """A clean set in which nothing is flagged leaves any model as it is: one seed's victim shows that."""
        return self.attack != "clean" or self.run.seed == 0

    def victim(self):
        start = new_classifier("small-resnet", self.source.class_names, seed=self.run.seed_of("victim"))
        return train_classifier(start, self.pixels, self.source.labels, epochs=EPOCHS, run=self.run)

    def evaluate(self, classifier) -> Evaluation:
        return evaluate_classifier(classifier, self.test, poisoning=self.poisoning, run=self.run)

    def scores(self, config: SeparationConfig):
        zero_shot = zero_shot_logits(load_clip("tiny"), self.source, run=self.run)
        fresh = new_classifier("small-resnet", self.source.class_names)
        return zero_shot, score_with_cgd(fresh, self.source, self.pixels, zero_shot, config, run=self.run)

    def detection(self, scores, split: Split) -> dict:
        flagged = np.zeros(len(self.truth), dtype=bool)
        flagged[split.suspect] = True
        hits = int((flagged & self.truth).sum())
        figures = {
            "flagged_percent": 100 * float(flagged.mean()),
            "clean_region_percent": 100 * len(split.clean) / len(self.truth),
            "poison_in_clean_region": int(self.truth[split.clean].sum()),
            "estimate": asdict(split.estimate) if split.estimate else None,
        }
        if self.truth.any():
            figures |= {
                "recall_percent": 100 * hits / int(self.truth.sum()),
                "precision_percent": 100 * hits / max(1, int(flagged.sum())),
                "auroc": {axis: auroc(scores.axes[axis], self.truth) for axis in (CLIP_AXIS, EARLY_AXIS, JOINT_AXIS)},
            }
        return figures

    def purify(self, config: CGDConfig, label: str, split_of=None) -> dict:
        """``split_of`` replaces the split, for the ablations of one axis."""
        begun = time.time()
        zero_shot, scores = self.scores(config.separation)
        split = (split_of or self.split)(scores, config)
        separated = time.time()
        run = replace(self.run, folder=RunFolder.open(self.folder.path / label, {"config": asdict(config)}))
        repair = before = after = None
        if len(split.suspect) > 0:
            victim = self.victim()
            before = self.evaluate(victim)
            repair = repair_with_cgd(victim, self.pixels, split, zero_shot.cosines, config, run=run)
            after = self.evaluate(repair.classifier)
        elif self.wants_victim:  # handed back as it is
            before = after = self.evaluate(self.victim())
        return {
            "attack": self.attack,
            "seed": self.seed,
            "variant": label,
            "config": asdict(config),
            "repaired": repair is not None,
            "before": rates(before) if before else None,
            "after": rates(after) if after else None,
            "der": evaluate_before_after(before, after) if before and after else None,
            "detection": self.detection(scores, split),
            "history": repair.history if repair else [],
            "kept_step": repair.steps if repair else None,
            "seconds": {"separation": separated - begun, "all": time.time() - begun},
        }

    @staticmethod
    def split(scores, config: CGDConfig) -> Split:
        if config.regions == "published":
            return split_as_published(scores, sigma1=config.sigma1, sigma2=config.sigma2)
        return split_by_evidence(scores, odd=config.odd_labels)


def rates(evaluation: Evaluation) -> dict:
    names = ("c_acc", "asr", "asr_floor", "ra")
    figures = {name: getattr(evaluation, name) for name in names}
    return {name: None if rate is None else asdict(rate) for name, rate in figures.items()} | {
        "asr_excess": evaluation.asr_excess
    }


def one_axis(axis: str):
    """The published regions with the other axis held at zero, so that it decides nothing."""

    def split(scores, config: CGDConfig) -> Split:
        other = EARLY_AXIS if axis == CLIP_AXIS else CLIP_AXIS
        values = np.where(np.isnan(scores.axes[axis]), np.nan, 0.0)
        return split_as_published(
            replace(scores, axes=scores.axes | {other: values}), sigma1=config.sigma1, sigma2=config.sigma2
        )

    return split


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        for attack in args.attack:
            print(f"{attack} {seed}", flush=True)
            cell = Cell(attack, seed, args.shared, args.work)
            if args.until in ("victim", "scores"):
                if cell.wants_victim:
                    print("  before", rates(cell.evaluate(cell.victim())), flush=True)
                if args.until == "scores":
                    from unpoison.detection.cgd import early_model_logits

                    fresh = new_classifier("small-resnet", cell.source.class_names)
                    early_model_logits(fresh, cell.pixels, cell.source.labels, SeparationConfig(), run=cell.run)
                continue
            variants = {"default": CGDConfig()} | (ABLATIONS if args.until == "ablations" else {})
            for label, config in variants.items():
                file = RESULTS / f"{cell.name}-{label}.json"
                if file.exists() and json.loads(file.read_bytes())["config"] == json.loads(json.dumps(asdict(config))):
                    continue
                axis = {"clip-axis-only": CLIP_AXIS, "early-axis-only": EARLY_AXIS}.get(label)
                result = cell.purify(config, label, one_axis(axis) if axis else None)
                write_atomically(file, json.dumps(result, indent=1, default=float).encode() + b"\n")
                print(f"  {label}: before {result['before']} after {result['after']}", flush=True)


def separation(args: argparse.Namespace) -> None:
    """Stage A's ablations on every cell whose scores are there, as one JSON."""
    torch.set_num_threads(args.threads)
    found = json.loads(SEPARATION.read_text()) if SEPARATION.exists() else {}
    variants = {"default": CGDConfig()} | {
        name: config for name, config in ABLATIONS.items() if config.beta and config.alpha
    }
    for attack in args.attack:
        for seed in args.seed:
            cell = Cell(attack, seed, args.shared, args.work)
            for label, config in variants.items():
                axis = {"clip-axis-only": CLIP_AXIS, "early-axis-only": EARLY_AXIS}.get(label)
                _, scores = cell.scores(config.separation)
                figures = cell.detection(scores, (one_axis(axis) if axis else cell.split)(scores, config))
                found.setdefault(label, {})[cell.name] = figures
            write_atomically(SEPARATION, json.dumps(found, indent=1, default=float).encode() + b"\n")
    print("| variant | attack | recall | precision | flagged | poison in the clean region | AUROC clip / early |")
    print("|" + "---|" * 7)
    for label, cells in found.items():
        for attack in args.attack:
            rows = [figures for name, figures in cells.items() if name.rsplit("-", 1)[0] == attack]
            if rows:
                areas = [np.mean([row["auroc"][axis] for row in rows]) for axis in (CLIP_AXIS, EARLY_AXIS)
                         if "auroc" in rows[0]]  # fmt: skip
                names = ("recall_percent", "precision_percent", "flagged_percent", "poison_in_clean_region")
                shown = [f"{np.mean([row[name] for row in rows]):.1f}" if name in rows[0] else "-" for name in names]
                print(f"| {label} | {attack} | {' | '.join(shown)} | {' / '.join(f'{area:.3f}' for area in areas)} |")


def natural(args: argparse.Namespace) -> None:
    """The triggers on the clean control's victim: a trigger that is a natural feature has a rate there too."""
    torch.set_num_threads(args.threads)
    cell = Cell("clean", 0, args.shared, args.work)
    victim, found = cell.victim(), {}
    for attack in args.attack:
        for seed in args.seed if attack != "clean" else ():
            poisoning = Cell(attack, seed, args.shared, args.work).poisoning
            figures = rates(evaluate_classifier(victim, cell.test, poisoning=poisoning, run=cell.run))
            found[f"{attack}-{seed}"] = figures
            print(attack, seed, figures["asr"], flush=True)
    write_atomically(NATURAL, json.dumps(found, indent=1, default=float).encode() + b"\n")


def small(args: argparse.Namespace) -> None:
    """How the early axis ranks the poison of the first 1,000 and 2,500 rows, one early model a cell."""
    torch.set_num_threads(args.threads)
    found: dict[str, dict] = json.loads(SMALL.read_text()) if SMALL.exists() else {}
    for rows in (1000, 2500):
        base = open_images(f"{args.shared / 'data/cifar10/train.parquet'}[25000:{25000 + rows}]")
        for attack in ("badnet", "blended", "sig"):
            for seed in args.seed:
                poisoning = plan_poisoning(base, attack, rate=RATE, target=TARGET, seed=seed)
                source, run = apply_poisoning(base, poisoning), Run(seed=seed, cache=args.work / "cache")
                pixels = load_pixels(source, 32, cache=run.cache, progress=run.progress)
                truth = np.isin(source.ids, list(poisoning.ids))
                for label, size in (("paper", 256), ("default", None)):
                    name = f"{rows}-{attack}-{seed}-{label}"
                    if name in found:
                        continue
                    config = SeparationConfig(scorers=1, scorer_batch_size=size)
                    fresh = new_classifier("small-resnet", source.class_names)
                    logits = early_model_logits(fresh, pixels, source.labels, config, run=run)
                    ease = -label_cross_entropy(logits, source.labels)
                    found[name] = {"auroc": auroc(ease, truth), "batch_size": config.batch_size(rows)}
                    print(name, found[name], flush=True)
                    write_atomically(SMALL, json.dumps(found, indent=1).encode() + b"\n")


def worst(cells: list[dict]) -> dict:
    """The worst single cell, not the worst mean: ``cgd.asr_after_max`` and its like in claims.json."""
    attacked, clean = ([cell for cell in cells if (cell["attack"] == "clean") == control] for control in (False, True))

    def fall(cell: dict) -> float:
        if not cell["repaired"]:  # handed back as it is
            return 0.0
        return cell["before"]["c_acc"]["value"] - cell["after"]["c_acc"]["value"]

    def largest(found: list[dict], figure: Callable[[dict], float]) -> dict | None:
        if not found:
            return None
        cell = max(found, key=figure)
        return {"value": figure(cell), "cell": f"{cell['attack']}-{cell['seed']}", "cells": len(found)}

    return {
        "asr_after_max": largest(attacked, lambda cell: cell["after"]["asr_excess"]),
        "c_acc_drop_max": largest(attacked, fall),
        "clean_flagged": largest(clean, lambda cell: cell["detection"]["flagged_percent"]),
        "clean_c_acc_drop": largest(clean, fall),
    }


def table(args: argparse.Namespace) -> None:
    """Mean over seeds of every attack and variant, as Markdown; the worst cells, which are what is claimed, as JSON."""
    cells: dict[tuple[str, str], list[dict]] = {}
    for file in sorted(RESULTS.glob("*-*.json")):
        result = json.loads(file.read_text())
        cells.setdefault((result["variant"], result["attack"]), []).append(result)
    default = [cell for (variant, _), found in cells.items() if variant == "default" for cell in found]
    if default:
        write_atomically(SUMMARY, json.dumps(worst(default), indent=1).encode() + b"\n")

    def mean(values: list) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "-"
        spread = f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else ""
        return f"{np.mean(known):.1f}{spread}"

    print("| variant | attack | seeds | C-Acc before | after | ASR before | after | floor | excess | RA after | "
          "recall | precision | flagged | AUROC clip / early / joint | s |")  # fmt: skip
    print("|" + "---|" * 15)
    for (variant, attack), results in sorted(cells.items()):

        def pick(*path: str, rows: list[dict] = results) -> str:
            values = []
            for row in rows:
                for key in path:
                    row = row.get(key) if row is not None else None
                values.append(row)
            return mean(values)

        known = [row["detection"]["auroc"] for row in results if "auroc" in row["detection"]]
        areas = " / ".join(f"{np.mean([row[axis] for row in known]):.3f}" if known else "-"
                           for axis in (CLIP_AXIS, EARLY_AXIS, JOINT_AXIS))  # fmt: skip
        row = [
            variant, attack, str(len(results)), pick("before", "c_acc", "value"), pick("after", "c_acc", "value"),
            pick("before", "asr", "value"), pick("after", "asr", "value"), pick("after", "asr_floor", "value"),
            pick("after", "asr_excess"), pick("after", "ra", "value"), pick("detection", "recall_percent"),
            pick("detection", "precision_percent"), pick("detection", "flagged_percent"), areas, pick("seconds", "all"),
        ]  # fmt: skip
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "separation", "natural", "small", "table"])
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--until", choices=["victim", "scores", "repair", "ablations"], default="repair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-cgd")
    args = parser.parse_args()
    verbs = {"run": run, "separation": separation, "natural": natural, "small": small, "table": table}
    verbs[args.verb](args)


if __name__ == "__main__":
    main()
