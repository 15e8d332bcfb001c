"""Detectors of poisoned pairs on the grid's backdoored CLIPs and the pairs that they were trained on.

    unpoison bench run grids/cpu.toml -o runs/bench-cpu                           # first: the victims
    python benchmarks/pair_detectors.py run [--attack badclip ...] [--seed 0 ...] [--method dao exposure ...]
    python benchmarks/pair_detectors.py run --attack clean --seed 0 1 2 3 4 5 6 7
    python benchmarks/pair_detectors.py table

All pairs with their poison as each victim saw it (10 to 25 percent: so small a training takes as much), and a sample of
them in which it is thinned to 1 percent. The suspect is the victim, the reference the clean CLIP that it was fine-tuned
from, which saw the same images unpoisoned. Nothing is tuned here. Of each detector: AUROC, TPR at 5 % FPR, recall where
as many are flagged as there is poison (precision is the same then), and recall and precision of what it flags by
itself where it does (exposure, which is UBT's first step). ``clean``: false alarms of those that say whether a set is
poisoned, on the pairs of a clean CLIP, all of them and with half of their classes. The grid's precision, one thread.
One JSON a victim; what is there is not computed again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from grid_clips import ATTACKS, BENCH, GRID, GridClip, find_clip  # pyright: ignore[reportMissingImports]
from kept_cells import new_run
from par import Printed

from unpoison.api_pairs import PAIR_DETECTORS, PairDetectorConfig
from unpoison.benchmark.clip_cells import LABELLED
from unpoison.benchmark.grid import read_grid
from unpoison.benchmark.settings import CLEAN
from unpoison.data.sources import open_images
from unpoison.detection.neighbours import NeighboursConfig
from unpoison.embedded_pairs import Embedded, see_pairs
from unpoison.errors import UsageError
from unpoison.evaluation.intervals import wilson
from unpoison.evaluation.metrics import auroc, precision, recall, tpr_at_fpr
from unpoison.models.clip_files import load_any_clip
from unpoison.results import write_atomically
from unpoison.runs import Run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/pair_detectors"
THIN, THIN_ROWS = 0.01, 6_000
SMALL = NeighboursConfig(batch_size=500)
METHODS: dict[str, tuple[str, PairDetectorConfig]] = {
    **{name: (name, PairDetectorConfig()) for name in PAIR_DETECTORS},
    **{f"{name}, batches of 500": (name, PairDetectorConfig(neighbours=SMALL))
       for name, detector in PAIR_DETECTORS.items() if detector.batches},
}  # fmt: skip
HALVES = {
    "all": range(10),
    "first half": range(5),
    "second half": range(5, 10),
    "even": range(0, 10, 2),
    "odd": range(1, 10, 2),
}
"""Classes of CIFAR-10 beside the captioned pairs, of which all stay."""
DECIDING = tuple(name for name in METHODS if name == "exposure")
SHARES = {"own": "at the victim's own rate", "thin": "thinned to 1 percent"}
FIGURES = ("auroc", "recall_at_rate", "recall", "precision")


def scored(method: str, known: Embedded, truth: np.ndarray, run: Run) -> dict[str, float | None]:
    name, config = METHODS[method]
    found = PAIR_DETECTORS[name].score(known, config, run)
    scores = next(iter(found.axes.values()))
    first = np.zeros(len(truth), dtype=bool)
    first[np.argsort(-scores, kind="stable")[: int(truth.sum())]] = True
    figures: dict[str, float | None] = {
        "auroc": auroc(scores, truth), "tpr_at_5_fpr": tpr_at_fpr(scores, truth),
        "recall_at_rate": recall(first, truth),
    }  # fmt: skip
    if found.flagged is None:
        return figures
    flagged = {"flagged": float(found.flagged.mean()), "recall": recall(found.flagged, truth)}
    return figures | flagged | ({"precision": precision(found.flagged, truth)} if found.flagged.any() else {})


def thinned(truth: np.ndarray) -> np.ndarray:
    """Rows of a sample of which 1 percent is poison."""
    random = np.random.default_rng(0)
    poisoned, clean = (random.permutation(np.flatnonzero(part)) for part in (truth, ~truth))
    few = round(THIN * THIN_ROWS)
    return np.sort(np.concatenate([poisoned[:few], clean[: THIN_ROWS - few]]))


def part_of(known: Embedded, rows: np.ndarray) -> Embedded:
    def some(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[rows]

    return Embedded(
        pairs=known.pairs, rows=known.rows[rows], clip=known.clip, suspect=some(known.suspect),
        cosines=some(known.cosines), captions=some(known.captions), misfit=some(known.misfit), alone=known.alone,
    )  # fmt: skip


def alarms(method: str, known: Embedded, run: Run) -> dict[str, float] | None:
    """Whether clean pairs are said to be poisoned, and the share that is flagged; None where they are only ranked."""
    name, config = METHODS[method]
    found = PAIR_DETECTORS[name].score(known, config, run)
    if found.flagged is None or found.estimate is None:
        return None
    return {"alarm": float(found.estimate.poisoned), "flagged": float(found.flagged.mean()), "pairs": len(known.rows)}


def class_rows(victim: GridClip, known: Embedded, classes: Sequence[int]) -> np.ndarray:
    """Places in ``known`` of the captioned pairs and of those of ``classes``."""
    images = open_images(victim.cell.data.train or "")
    others = ~np.isin(images.labels, list(classes))
    gone = {f"{LABELLED}/{name}" for name, other in zip(images.ids, others, strict=True) if other}
    return np.array([place for place, row in enumerate(known.rows) if known.pairs.ids[row] not in gone])


def compute_clean(victim: GridClip, wanted: list[str], file: Path, work: Path) -> None:
    """The same of a clean CLIP: false alarms."""
    result: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
    deciding = [method for method in wanted if method in DECIDING]
    missing = [(half, method) for half in HALVES for method in deciding if method not in result.get(half, {})]
    if not missing:
        return
    run = new_run(victim.cell.names.seed, progress=Printed(), cache=work / "cache")
    clip, reference = load_any_clip(victim.model), load_any_clip(victim.cell.model.clip)
    known = see_pairs(victim.setting.pairs, clip=clip, reference=reference, captions=True, run=run)
    result |= {"pairs": len(known.rows), "poison_rate": 0.0, "victim": clip.fingerprint, "alone": known.alone}
    for half, method in missing:
        found = alarms(method, part_of(known, class_rows(victim, known, HALVES[half])), run)
        result.setdefault(half, {})[method] = found
        write_atomically(file, json.dumps(result, indent=1).encode() + b"\n")
        print(f"  {half} {method}: {found}", flush=True)


def compute(victim: GridClip, wanted: list[str], file: Path, work: Path) -> None:
    """Add to ``file`` what it lacks."""
    result: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
    missing = [(share, method) for share in SHARES for method in wanted if method not in result.get(share, {})]
    if not missing:
        return
    run = new_run(victim.cell.names.seed, progress=Printed(), cache=work / "cache")
    clip, reference = load_any_clip(victim.model), load_any_clip(victim.cell.model.clip)
    pairs = victim.setting.pairs
    known = see_pairs(pairs, clip=clip, reference=reference, captions=True, run=run)
    truth = np.isin(pairs.ids, victim.poisoned)[known.rows]
    result |= {"pairs": len(truth), "poison_rate": 100 * float(truth.mean()), "victim": clip.fingerprint}
    thin = thinned(truth)
    for share, method in missing:
        here = (known, truth) if share == "own" else (part_of(known, thin), truth[thin])
        result.setdefault(share, {})[method] = scored(method, *here, run)
        write_atomically(file, json.dumps(result, indent=1).encode() + b"\n")
        print(f"  {share} {method}: AUROC {result[share][method]['auroc']:.3f}", flush=True)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    grid = read_grid(ROOT / GRID)
    for seed in args.seed:
        for attack in args.attack:
            print(f"{attack} {seed}", flush=True)
            try:
                victim = find_clip(grid, args.bench, attack, seed, Printed())
            except UsageError as error:
                print(f"  {error.message} {error.hint}", flush=True)
            else:
                make = compute_clean if attack == CLEAN else compute
                make(victim, args.method, args.results / f"{attack}-{seed}.json", args.work)


def table(args: argparse.Namespace) -> None:
    """Means over seeds as Markdown, how many in brackets."""
    found = {file.stem: json.loads(file.read_bytes()) for file in sorted(args.results.glob("*.json"))}
    attacks = [name for name in args.attack if name != CLEAN and any(key.rpartition("-")[0] == name for key in found)]
    for share, said in SHARES.items():
        for figure in FIGURES:
            print(f"\n{figure}, {said}\n\n| | " + " | ".join(attacks) + " |\n|" + "---|" * (1 + len(attacks)))
            for method in args.method:
                shown = []
                for attack in attacks:
                    values = [
                        result.get(share, {}).get(method, {}).get(figure)
                        for key, result in found.items()
                        if key.rpartition("-")[0] == attack
                    ]
                    known = [value for value in values if value is not None]
                    shown.append(f"{np.mean(known):.3f} ({len(known)})" if known else "")
                if any(shown):
                    print(f"| {method} | " + " | ".join(shown) + " |")

    print("\n".join(clean_table([found[name] for name in found if name.rpartition("-")[0] == CLEAN])))


def clean_table(found: list[dict[str, Any]]) -> list[str]:
    """False alarms on pairs of clean CLIPs; an interval where each is a trial of its own, as halves of one are not."""
    lines = [
        "",
        "false alarms, clean pairs",
        "",
        "| | pairs | alarms | 95 % interval | most flagged |",
        "|---|---|---|---|---|",
    ]
    for method in DECIDING:
        for half in HALVES:
            each = [result[half][method] for result in found if result.get(half, {}).get(method)]
            if each:
                count = round(sum(entry["alarm"] for entry in each))
                interval = wilson(count, len(each))
                most = 100 * max(entry["flagged"] for entry in each)
                bounds = f"{interval.low:.0f} to {interval.high:.0f} %"
                lines.append(f"| {method} | {half} | {count} of {len(each)} | {bounds} | {most:.2f} % |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table"])
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--bench", type=Path, default=ROOT / BENCH, help="the results folder of grids/cpu.toml")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-pair-detectors")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    {"run": run, "table": table}[args.verb](args)


if __name__ == "__main__":
    main()
