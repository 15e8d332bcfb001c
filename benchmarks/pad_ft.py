"""PAD-FT and the clean-data defenses on CIFAR-10: attack x seed x method, one JSON a cell.

    python benchmarks/pad_ft.py run [--attack badnet ...] [--seed 0 ...] [--method pad-ft ...]
    python benchmarks/pad_ft.py run --set tune --seed 9 --method pad-ft learned ...   # variants, on other victims
    python benchmarks/pad_ft.py published      # the published WRN-16-1 with its own trigger, every method
    python benchmarks/pad_ft.py table

Victims, scores and splits are those of benchmarks/cgd.py: rows 25,000..34,999 of CIFAR-10 train, 5 percent poisoned
toward class 0. All 10,000 test images for every rate; ``--set tune`` measures rows 45,000.. of train instead, which
nothing else uses. One thread a process; a cell that is done is not computed again.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cgd import Cell, rates

from unpoison.data.sources import open_images
from unpoison.defenses.cgd import CGDConfig, repair_with_cgd
from unpoison.defenses.clipping import ClippingConfig
from unpoison.defenses.pad_ft import PADFTConfig, repair_with_pad_ft
from unpoison.defenses.repair import Repair
from unpoison.detection.cgd import with_mean_rank
from unpoison.detection.self_purified import score_by_own_loss, select_clean
from unpoison.detection.thresholds import split_by_evidence
from unpoison.evaluation.classifier import evaluate_before_after
from unpoison.models.features import features_on, head_logits
from unpoison.results import SampleScores, Split, write_atomically
from unpoison.runs import Run, RunFolder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/pad_ft"
ATTACKS = ("badnet", "blended", "sig", "wanet", "clean-image", "clean")
TUNE = "cifar10/train.parquet[45000:50000]"


def clips(**more: Any) -> ClippingConfig:
    return ClippingConfig(**more)


PAD_FT = {
    "pad-ft": PADFTConfig(),
    "pad-ft-paper": PADFTConfig.as_published(),
}
VARIANTS = {
    **{f"clip-{rule}": PADFTConfig(clip=clips(rule=rule)) for rule in ("none", "learned", "margin")},
    **{f"quantile-{q}": PADFTConfig(clip=clips(quantile=q)) for q in (0.9, 0.95, 0.98, 0.99, 0.999)},
    **{f"n-{n}": PADFTConfig(per_class=n) for n in (10, 25, 50, 100, 500, 1000)},
    "keep-head": PADFTConfig(reset_head=False),
    "share-0.5": PADFTConfig(scores_share=0.5),
    "own-rule": PADFTConfig(scores_share=0.0),
    "views-4": PADFTConfig(views=4),
    "rate-0.1": PADFTConfig(learning_rate=0.1),
    "views-4-rate-0.1": PADFTConfig(views=4, learning_rate=0.1),
}


@dataclass(kw_only=True)
class Setting:
    """A victim, its training set, and what stage A says of it: everything below is computed once."""

    cell: Cell
    run: Run

    @classmethod
    def of(cls, attack: str, seed: int, args: argparse.Namespace) -> "Setting":
        cell = Cell(attack, seed, args.shared, args.work)
        if args.set == "tune":
            cell.test = open_images(f"{args.shared}/data/{TUNE}")
        return cls(cell=cell, run=replace(cell.run, folder=None))

    def own_scores(self, victim) -> SampleScores:
        source = self.cell.source
        rows = np.flatnonzero(self.cell.pixels.usable)
        features = features_on(victim, self.cell.pixels, rows, run=self.run)
        logits = np.full((len(source), len(source.class_names)), np.nan)
        logits[rows] = head_logits(victim, features).numpy()
        return score_by_own_loss(logits, source.labels, list(source.ids), source.class_names)

    def purity(self, split: Split) -> dict[str, float]:
        target = split.clean[split.labels[split.clean] == 0]
        poisoned = self.cell.truth
        return {
            "target": 100 * float((~poisoned[target]).mean()),
            "all": 100 * float((~poisoned[split.clean]).mean()),
            "samples": len(split.clean),
        }


def pad_ft(setting: Setting, victim, config: PADFTConfig, run: Run) -> tuple[Repair, Split]:
    other = None
    if config.scores_share > 0:
        _, scores = setting.cell.scores(CGDConfig().separation)
        other = with_mean_rank(scores)
    split = select_clean(setting.own_scores(victim), config.per_class, other=other, share=config.scores_share)
    return repair_with_pad_ft(victim, setting.cell.pixels, split, config, run=run), split


def cgd(setting: Setting, victim, config: CGDConfig, run: Run) -> tuple[Repair | None, Split]:
    zero_shot, scores = setting.cell.scores(config.separation)
    split = split_by_evidence(scores, odd=config.odd_labels)
    if len(split.suspect) == 0:
        return None, split
    return repair_with_cgd(victim, setting.cell.pixels, split, zero_shot.cosines, config, run=run), split


METHODS: dict[str, Callable[..., tuple[Repair | None, Split]]] = {}
for name, settings in (PAD_FT | VARIANTS).items():
    METHODS[name] = lambda setting, victim, run, settings=settings: pad_ft(setting, victim, settings, run)
METHODS["cgd"] = lambda setting, victim, run: cgd(setting, victim, CGDConfig(), run)


def compute(setting: Setting, method: str) -> dict[str, Any]:
    cell = setting.cell
    victim = cell.victim()
    before = cell.evaluate(victim)
    folder = RunFolder.open(cell.folder.path / f"pad-ft-{method}", {"method": method})
    run = replace(cell.run, folder=folder)
    begun = time.time()
    repair, split = METHODS[method](setting, victim, run)
    seconds = time.time() - begun
    after = cell.evaluate(repair.classifier) if repair else before
    return {
        "attack": cell.attack, "seed": cell.run.seed, "method": method, "test": cell.test.name,
        "repaired": repair is not None, "before": rates(before), "after": rates(after),
        "der": evaluate_before_after(before, after), "purity": setting.purity(split),
        "changed_share": repair.changed_share if repair else 0.0, "history": repair.history if repair else [],
        "seconds": seconds,
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    for attack in args.attack:
        for seed in args.seed:
            setting = None
            for method in args.method:
                file = args.results / f"{args.set}-{attack}-{seed}-{method}.json"
                if file.exists():
                    continue
                setting = setting or Setting.of(attack, seed, args)
                result = compute(setting, method)
                write_atomically(file, json.dumps(result, indent=1, default=float).encode() + b"\n")
                print(describe(result), flush=True)


def describe(result: dict[str, Any]) -> str:
    sides = []
    for name in ("before", "after"):
        found = result[name]
        sides.append(
            " ".join(f"{found[key]['value']:.1f}" for key in ("c_acc", "asr", "asr_floor", "ra") if found[key])
        )
    purity = result["purity"]
    return (f"{result['attack']}-{result['seed']} {result['method']}: {sides[0]} > {sides[1]}  "
            f"purity {purity['target']:.1f} of {purity['samples']}  {result['seconds']:.0f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run"])
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=[*PAD_FT, "cgd"])
    parser.add_argument("--set", choices=["test", "tune"], default="test", help="what is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-cgd")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    {"run": run}[args.verb](args)


if __name__ == "__main__":
    main()
