"""UBT on backdoored CLIPs and the pairs that they were trained on: who is suspected, and what unlearning leaves.

    unpoison bench run grids/cpu.toml -o runs/bench-cpu      # first: the victims
    python benchmarks/ubt.py run [--attack wanet ...] [--seed 0 ...] [--variant ours ...]
    python recipes/clip_victims.py make --seed 9            # those of --set tune, under runs/clip-victims
    python benchmarks/ubt.py run --set tune --seed 9 --attack badnet-rand ... --variant ours hinge ...
    python benchmarks/ubt.py table [--set tune]

Pairs: all that the victim was trained on, poison included. Reference: the clean CLIP that it was fine-tuned from, which
saw the same pairs without the poison. Measured on the grid's test data; ``--set tune`` on others, for victims of a seed
that no table has. ``twice``: UBT again on the repaired CLIP and the pairs that it did not suspect; what it suspects is
that of the second run. Seconds are the method's alone, its embeddings included: each cell has a cache of its own.
Detectors of pairs beside it: benchmarks/pair_detectors.py.
One JSON a cell, in the grid's precision; a cell that is done with the same settings on the same victim is not computed
again. One thread a process.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from clip_victims import open_data, read_victim  # pyright: ignore[reportMissingImports]
from grid_clips import ATTACKS as GRID_ATTACKS  # pyright: ignore[reportMissingImports]
from grid_clips import BENCH, GRID, find_clip  # pyright: ignore[reportMissingImports]
from kept_cells import inputs_of, is_done, new_run
from par import SETS, Printed, figures, find_victim

from unpoison.api import ScanOutcome
from unpoison.api_clip import count_parameters
from unpoison.api_ubt import UBTOutcome, purify_with_abl_clip, purify_with_ubt
from unpoison.attacks.pairs import apply_pair_poisoning
from unpoison.benchmark.grid import read_grid
from unpoison.data.pairs import ImageTextPairs, open_pairs
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.abl_clip import ABLClipConfig
from unpoison.defenses.ubt import RECOMMENDED_FACTOR, UBTConfig
from unpoison.detection.neighbours import NeighboursConfig
from unpoison.errors import UsageError
from unpoison.evaluation.clip import evaluate_clip
from unpoison.evaluation.metrics import auroc
from unpoison.models.clip_files import load_any_clip
from unpoison.results import write_atomically
from unpoison.runs import RunFolder
from unpoison.types import ImageTextModel

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/ubt"
TUNE_ATTACKS = ("badnet-rand", "badnet-stripes", "blended-rand", "blended-stripes", "blended-triangles", "blended-text",
                "wanet", "badclip", "clean")  # fmt: skip
RUNS = BENCH
"""The results folder of grids/cpu.toml."""
ATTACKS = tuple(sorted({*GRID_ATTACKS, *TUNE_ATTACKS, "two-targets"}))
ABL, ALONE, PAPER, TWICE = "abl-clip", "no-reference", "paper", "twice"
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    TWICE: {},
    ABL: {},
    **{f"{ABL}-{factor}": {"factor": factor} for factor in (8, 16)},
    **{f"{ABL}-16-flagged-{share}": {"factor": 16, "flagged_share": share} for share in (0.1, 0.2)},
    PAPER: {},
    f"{PAPER}-rate-30": {"factor": RECOMMENDED_FACTOR},
    f"{PAPER}-no-overfit": {"expose": "similarity"},
    f"{PAPER}-by-score": {"choose": "score", "unlearn_pairs": 256},
    f"{PAPER}-to-the-end": {"stop_early": False},
    "no-reference": {},
    "no-reference-batches-of-64": {"neighbours": NeighboursConfig(batch_size=64)},
    "hinge": {"loss": "hinge"},
    "ascent": {"loss": "ascent"},
    "whole-captions": {"words": 1.0},
    "patches": {"patches": 0.05},
    "stop-early": {"stop_early": True},
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


def abl_config(clip: ImageTextModel, pairs: int, variant: str) -> ABLClipConfig:
    """ABL's for so many pairs, at ``factor`` times the scaled rate; the table's victims get the grid's 200 steps."""
    settings = dict(VARIANTS[variant])
    factor = settings.pop("factor", 1.0)
    start = ABLClipConfig.scaled(parameters=count_parameters(clip), samples=pairs, batch_size=128, steps=200)
    return replace(start, learning_rate=factor * start.learning_rate, **settings)


def ubt_config(clip: ImageTextModel, pairs: int, variant: str) -> UBTConfig:
    """The paper's way as ``--paper`` has it, ``factor`` times its rate, or what is recommended; over it the variant."""
    settings = dict(VARIANTS[variant])
    factor = settings.pop("factor", 1.0)
    make = UBTConfig.paper if variant.startswith(PAPER) else UBTConfig.recommended
    config = make(parameters=count_parameters(clip), samples=pairs, **settings)
    return replace(config, learning_rate=factor * config.learning_rate)


@dataclass(frozen=True, kw_only=True, eq=False)
class Victim:
    """A CLIP and the pairs that it was trained on; the data that it is measured on; ``poisoned``: ids of pairs."""

    clip: ImageTextModel
    reference: ImageTextModel
    pairs: ImageTextPairs
    poisoning: Any
    poisoned: Sequence[str]
    images: LabelledImages
    retrieval: ImageTextPairs | None


def open_victim(attack: str, seed: int, args: argparse.Namespace) -> Victim:
    """Raises UsageError where it was not made, or not accepted."""
    if args.set == "test":
        found = find_clip(read_grid(ROOT / GRID), args.bench, attack, seed, Printed())
        setting = found.setting
        return Victim(
            clip=load_any_clip(found.model), reference=load_any_clip(setting.cell.model.clip), pairs=setting.pairs,
            poisoning=found.poisoning, poisoned=found.poisoned, images=setting.test, retrieval=setting.retrieval,
        )  # fmt: skip
    folder = find_victim(args.victims, attack, seed)
    if folder is None:
        raise UsageError(f"no accepted victim under {args.victims}.", hint="Make it with recipes/clip_victims.py.")
    victim, data = read_victim(folder), open_data(args.shared)
    poisoning = victim.poisoning
    images, retrieval = (f"{args.shared}/data/{source}" for source in SETS[args.set])
    return Victim(
        clip=load_any_clip(victim.model), reference=load_any_clip("tiny"),
        pairs=data.train if poisoning is None else apply_pair_poisoning(data.train, poisoning), poisoning=poisoning,
        poisoned=() if poisoning is None else poisoning.ids, images=open_images(images),
        retrieval=open_pairs(retrieval),
    )  # fmt: skip


def config_of(victim: Victim, variant: str) -> UBTConfig | ABLClipConfig:
    """The settings of a variant for this victim and so many pairs."""
    make = abl_config if variant.startswith(ABL) else ubt_config
    return make(victim.clip, len(victim.pairs), variant)


def inputs(victim: Victim, variant: str, which: str) -> dict[str, Any]:
    """All that a cell's figures rest on; ``twice`` is one name for two runs with the same settings."""
    reference = None if variant.startswith((ABL, ALONE)) else victim.reference.fingerprint
    return inputs_of(
        config_of(victim, variant), set=which, victim=victim.clip.fingerprint, reference=reference,
        pairs=victim.pairs.caption_fingerprint, tests=victim.images.fingerprint(),
    )  # fmt: skip


def compute(
    victim: Victim, attack: str, seed: int, variant: str, inputs: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    clip, pairs = victim.clip, victim.pairs
    truth = np.isin(pairs.ids, victim.poisoned)
    name = f"{args.set}-{attack}-{seed}-{variant}"
    key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=4).hexdigest()
    own = args.work / f"{name}-{key}"
    resumed = (own / "run.json").exists()
    run = new_run(seed, progress=Printed(), cache=own / "cache", folder=RunFolder.open(own, inputs))
    begun, config = time.time(), config_of(victim, variant)
    if isinstance(config, ABLClipConfig):
        outcome = purify_with_abl_clip(clip, pairs, config=config, run=run)
    else:
        reference = None if variant.startswith(ALONE) else victim.reference
        outcome = purify_with_ubt(clip, pairs, reference=reference, config=config, run=run)
        if variant == TWICE:  # again, on what ``keep`` leaves
            rest = np.setdiff1d(np.arange(len(pairs)), outcome.suspicious.split.suspect)
            again = new_run(seed, progress=Printed(), cache=own / "cache", folder=RunFolder.open(own / "again", inputs))
            pairs, truth = pairs.select(rest), truth[rest]
            outcome = purify_with_ubt(outcome.clip, pairs, reference=reference, config=config, run=again)
    seconds, found = time.time() - begun, outcome.purification
    shutil.rmtree(own / "cache", ignore_errors=True)
    measured = new_run(seed, progress=Printed(), cache=args.work / "cache")

    def evaluate(model: Any) -> dict[str, Any]:
        return figures(
            evaluate_clip(
                model, victim.images, poisoning=victim.poisoning, retrieval=victim.retrieval, suspect=clip,
                run=measured, name=name,
            )
        )  # fmt: skip

    result: dict[str, Any] = {
        "attack": attack, "seed": seed, "method": variant, "set": args.set, "inputs": inputs, "pairs": len(pairs),
        "precision": inputs["precision"], "threads": inputs["threads"],
        "poison_rate": 100 * float(truth.mean()), "before": evaluate(clip), "after": evaluate(outcome.clip),
        "seconds": seconds, "resumed": resumed, "accepted": found.accepted, "left_alone": found.left_alone,
        "reason": found.reason, "history": found.history,
        "exposure": plain(found.exposure), "config": found.config,
    }  # fmt: skip
    return result | (found_pairs(outcome.suspicious, truth) if isinstance(outcome, UBTOutcome) else {})


def plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(value, default=vars))


def found_pairs(suspicious: ScanOutcome, truth: np.ndarray) -> dict[str, Any]:
    """AUROC of the scores; precision and recall of what is flagged."""
    flagged = suspicious.split.suspect
    return {
        "auroc": auroc(suspicious.scores.suspicion, truth) if truth.any() else None, "flagged": len(flagged),
        "precision": float(truth[flagged].mean()) if len(flagged) else None,
        "recall": float(truth[flagged].sum() / truth.sum()) if truth.any() else None,
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        for attack in args.attack or (GRID_ATTACKS if args.set == "test" else TUNE_ATTACKS):
            try:
                victim = open_victim(attack, seed, args)
            except UsageError as error:
                print(f"{attack} {seed}: {error.message} {error.hint}", flush=True)
                continue
            for variant in args.variant:
                file = args.results / f"{args.set}-{attack}-{seed}-{variant}.json"
                asked = inputs(victim, variant, args.set)
                if is_done(file, asked):
                    continue
                print(f"{attack} {seed} {variant}", flush=True)
                result = compute(victim, attack, seed, variant, asked, args)
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
    """Means over seeds as Markdown. What is claimed comes from the grid."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(args.results.glob(f"{args.set}-*.json")):
        result = json.loads(file.read_bytes())
        cells.setdefault((result["attack"], result["method"]), []).append(result)
    names = ("C-Acc before", "C-Acc", "ASR before", "ASR", "floor", "RA", "AUROC", "precision", "recall", "seconds")
    print("| attack | method | seeds | " + " | ".join(names) + " |\n|" + "---|" * (3 + len(names)))
    for (attack, method), found in sorted(cells.items()):
        columns = np.array([_columns(result) for result in found], dtype=float).T
        means = [f"{known.mean():.3g}" if len(known := row[~np.isnan(row)]) else "" for row in columns]
        print(f"| {attack} | {method} | {len(found)} | " + " | ".join(means) + " |")


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
    parser.add_argument("--attack", nargs="+", choices=ATTACKS)
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=["ours"])
    parser.add_argument("--set", choices=list(SETS), default="test", help="what is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--bench", type=Path, default=ROOT / RUNS, help="the results folder of grids/cpu.toml")
    parser.add_argument("--victims", type=Path, default=ROOT / "runs/clip-victims", help="those of --set tune")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-ubt")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    {"run": run, "table": table}[args.verb](args)


if __name__ == "__main__":
    main()
