"""CBPT and what it is made of, on backdoored CLIPs: attack x seed x variant, one JSON a cell.

    unpoison bench run grids/cpu.toml -o runs/bench-cpu       # first: the victims
    python benchmarks/cbpt.py run [--attack badclip ...] [--seed 0 ...] [--method cbpt contrast ...]
    python benchmarks/cbpt.py table                           # Markdown, and benchmarks/results/cbpt.json
    python recipes/clip_victims.py make --seed 9              # victims to tune on, under runs/clip-victims
    python benchmarks/cbpt.py run --set tune --seed 9 --method cbpt rvpt rvpt-prompts-4
    python benchmarks/cbpt.py table --set tune

CBPT beside RVPT and a linear probe on all attacks is the grid's (docs/results.md); here one thing at a time is left out
or changed, on the same victims, shots and test images. ``--set tune`` learns from rows 30,000..30,999 of CIFAR-10
train and measures rows 45,000.., on victims of a seed that no table has: constants were chosen there. Variants whose
name begins with "contrast" have one dummy by InfoNCE, those with "published" all of the plain reading of the paper.
Retrieval is not measured: no weight changes. The grid's precision; a cell that is done with the same settings on the
same victim is not computed again. One thread.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept_cells import inputs_of, is_done, new_run
from par import CLEAN, SETS, find_victim

from unpoison.api_zero_shot import (
    ZeroShotOutcome,
    purify_with_cbpt,
    purify_with_linear_probe,
    purify_with_rvpt,
)
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.benchmark.grid import read_grid
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.linear_probe import LinearProbeConfig
from unpoison.defenses.baselines.rvpt import RVPTConfig
from unpoison.defenses.cbpt import CBPTConfig
from unpoison.errors import UsageError
from unpoison.evaluation.clip import evaluate_clip
from unpoison.models.clip_files import load_any_clip
from unpoison.results import write_atomically
from unpoison.types import ImageTextModel

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "recipes"))
RESULTS = ROOT / "benchmarks/results/cbpt"
SUMMARY = ROOT / "benchmarks/results/cbpt.json"
ATTACKS = ("badnet-rand", "badnet-stripes", "blended-rand", "blended-text", "wanet", "wanet-strong", "sig-clip",
           "badclip", CLEAN)  # fmt: skip
FEW = ("badnet-rand", "blended-text", "badclip", CLEAN)
ABLATIONS = {
    "cbpt": CBPTConfig(),
    "no-inversion": CBPTConfig(delta="none"),
    "no-inversion-labels": CBPTConfig(delta="none", clean="labels"),
    "random-delta": CBPTConfig(delta="random"),
    "quiet-only": CBPTConfig(loud=()),
    "loud-16": CBPTConfig(loud=(16 / 255,)),
    "loud-64": CBPTConfig(loud=(64 / 255,)),
    "no-suppression": CBPTConfig(suppress_weight=0.0, trigger_weight=1.0),
    "labels": CBPTConfig(clean="labels"),
    **{f"shots-{count}": CBPTConfig(shots=count) for count in (4, 8, 64)},
    "contrast": CBPTConfig(dummies="contrast"),
    "contrast-text-only": CBPTConfig(dummies="contrast", positives=0),
    "contrast-no-negatives": CBPTConfig(dummies="contrast", negatives=False),
    "contrast-additive": CBPTConfig(dummies="contrast", forms=("additive",)),
    "contrast-patch": CBPTConfig(dummies="contrast", forms=("patch",)),
    **{f"contrast-epsilon-{levels}": CBPTConfig(dummies="contrast", forms=("additive",), epsilon=levels / 255)
       for levels in (8, 32)},
    "prompts": CBPTConfig(tune="prompts"),
    "prompts-shared": CBPTConfig(tune="prompts", shared=True),
    "published": CBPTConfig.as_published(),
    "published-shared": CBPTConfig.as_published(shared=True),
    "published-no-inversion": CBPTConfig.as_published(delta="none", rounds=0),
    "published-random-delta": CBPTConfig.as_published(delta="random", rounds=0),
}  # fmt: skip
RVPTS = {
    "rvpt": RVPTConfig(),
    **{f"rvpt-prompts-{count}": RVPTConfig(prompts=count) for count in (4, 16)},
    **{f"rvpt-repulsion-{alpha}": RVPTConfig(repulsion=alpha) for alpha in (0.0, 0.5)},
    "rvpt-rate-0.0005": RVPTConfig(learning_rate=0.0005),
}
METHODS = (*ABLATIONS, *RVPTS, "linear-probe")
SHOTS = "cifar10/train.parquet[30000:31000]"
RATES = ("c_acc", "asr", "asr_floor", "ra")


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A CLIP as it is given, with its figures, and the clean images that a method gets and that it is measured on."""

    model: Path
    poisoning: Any
    before: dict[str, Any]
    shots: LabelledImages
    tests: LabelledImages


def of_grid(args: argparse.Namespace, attack: str, seed: int) -> Victim:
    """Raises UsageError where the grid has not made it or found it too weak."""
    from grid_clips import GRID, find_clip  # pyright: ignore[reportMissingImports]

    found = find_clip(read_grid(ROOT / GRID), args.bench, attack, seed)
    data = found.cell.data
    return Victim(model=found.model, poisoning=found.poisoning, before=figures(found.result.before),
                  shots=open_images(data.shots), tests=open_images(data.test))  # fmt: skip


def of_recipe(args: argparse.Namespace, attack: str, seed: int) -> Victim:
    """The same of recipes/clip_victims.py, for victims of the tuning seed."""
    folder = find_victim(args.victims, attack, seed)
    if folder is None:
        raise UsageError(f"no accepted victim under {args.victims}.", hint="Make it with recipes/clip_victims.py.")
    manifest = folder / "manifest.json"
    poisoning = PairPoisoning.load(manifest) if manifest.exists() else None
    shots, tests = (open_images(f"{args.shared}/data/{source}") for source in (SHOTS, SETS["tune"][0]))
    run = new_run(seed, cache=args.work / "cache")
    before = figures(evaluate_clip(load_any_clip(folder / "model"), tests, poisoning=poisoning, run=run))
    return Victim(model=folder / "model", poisoning=poisoning, before=before, shots=shots, tests=tests)


WHERE: dict[str, Callable[..., Victim]] = {"test": of_grid, "tune": of_recipe}


CONFIGS: dict[str, Any] = {**ABLATIONS, **RVPTS, "linear-probe": LinearProbeConfig()}


def purify(clip: ImageTextModel, images: LabelledImages, method: str, seed: int) -> ZeroShotOutcome:
    run, config = new_run(seed), CONFIGS[method]
    if isinstance(config, RVPTConfig):
        return purify_with_rvpt(clip, images, config=config, run=run)
    if isinstance(config, LinearProbeConfig):
        return purify_with_linear_probe(clip, images, config=config, run=run)
    return purify_with_cbpt(clip, images, config=config, run=run)


def inputs(victim: Victim, method: str, which: str) -> dict[str, Any]:
    """All that a cell's figures rest on."""
    return inputs_of(
        CONFIGS[method], set=which, victim=load_any_clip(victim.model).fingerprint, shots=victim.shots.fingerprint(),
        tests=victim.tests.fingerprint(),
    )  # fmt: skip


def compute(victim: Victim, attack: str, seed: int, method: str, inputs: dict[str, Any], work: Path) -> dict[str, Any]:
    clip = load_any_clip(victim.model)
    begun, cpu = time.perf_counter(), time.process_time()
    outcome = purify(clip, victim.shots, method, seed)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    classifier, found = outcome.classifier, outcome.purification
    after = evaluate_clip(classifier.clip, victim.tests, classes=classifier.classes.numpy(),
                          poisoning=victim.poisoning, run=new_run(seed, cache=work / "cache"))  # fmt: skip
    return {
        "attack": attack, "seed": seed, "method": method, "inputs": inputs, "victim": clip.fingerprint,
        "precision": inputs["precision"], "threads": inputs["threads"],
        "learnt": found.learnt, "judging": found.judging,
        "target": None if victim.poisoning is None else victim.poisoning.target_name,
        "suspected": list(found.targets), "searched": found.search is not None,
        "accepted": found.accepted, "reason": found.reason, "class_cosine": found.class_cosine,
        "held_out_before": found.held_out_before, "held_out_after": found.held_out_after,
        "dummies": [{"form": entry.form, "size": entry.size, "success": entry.success, "left": entry.left,
                     "aside": entry.aside} for entry in found.dummies],
        "before": victim.before, "after": figures(after), "seconds": seconds, "processor_seconds": cpu,
        "config": found.config,
    }  # fmt: skip


def figures(found: Any) -> dict[str, Any]:
    """What the table shows of an evaluation, with numbers of samples and intervals."""
    rates = {name: getattr(found, name) for name in RATES}
    body = {name: None if value is None else asdict(value) for name, value in rates.items()}
    return body | {"asr_excess": found.asr_excess}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        for attack in args.attack:
            files = {name: args.results / f"{args.set}-{attack}-{seed}-{name}.json" for name in args.method}
            try:
                victim = WHERE[args.set](args, attack, seed)
            except UsageError as error:
                print(f"{attack} {seed}: {error.message} {error.hint}", flush=True)
                continue
            for method, file in files.items():
                asked = inputs(victim, method, args.set)
                if not is_done(file, asked):
                    result = {"set": args.set} | compute(victim, attack, seed, method, asked, args.work)
                    write_atomically(file, json.dumps(result, indent=1, default=float).encode() + b"\n")
                    print(f"{file.stem}: {describe(result)}", flush=True)


def describe(row: dict[str, Any]) -> str:
    shown = [f"{name} {row['before'][key]['value']:.1f} -> {row['after'][key]['value']:.1f}"
             for name, key in (("C-Acc", "c_acc"), ("ASR", "asr"), ("RA", "ra")) if row["after"][key]]  # fmt: skip
    accepted = "accepted" if row["accepted"] else "not accepted"
    return f"{'  '.join(shown)}  {row['suspected']}  {accepted}  {row['processor_seconds']:.0f} s"


COLUMNS: dict[str, str] = {
    "victims": "victims", "excess ASR": "asr_after_mean", "worst": "asr_after_max", "fall of C-Acc": "c_acc_drop_mean",
    "RA": "ra_mean", "target found %": "target_found_rate", "accepted": "accepted", "clean": "clean",
    "fall of C-Acc, clean": "clean_c_acc_drop_mean", "CPU s": "processor_seconds_median",
}  # fmt: skip


def table(args: argparse.Namespace) -> None:
    """One row a variant as Markdown, then one a cell; of the grid's victims also the figures as JSON."""
    rows = [json.loads(file.read_bytes()) for file in sorted(args.results.glob(f"{args.set}-*.json"))]
    found = summary(rows)
    print(f"| variant | {' | '.join(COLUMNS)} |\n|" + "---|" * (1 + len(COLUMNS)))
    for method, made in found.items():
        cells = [made.get(key) for key in COLUMNS.values()]
        print(f"| {method} | {' | '.join('' if value is None else f'{value:.4g}' for value in cells)} |")
    seeds = sorted({row["seed"] for row in rows})
    print(f"\nMeans over poisoned victims of seeds {', '.join(map(str, seeds))}; excess over the natural floor.\n")
    print("| attack | seed | variant | suspected | C-Acc | excess ASR (ASR, floor) | RA | accepted | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        before, after = row["before"], row["after"]
        asr = "" if after["asr"] is None else (
            f"{before['asr_excess']:.1f} → {after['asr_excess']:.1f} ({after['asr']['value']:.1f}, "
            f"{after['asr_floor']['value']:.1f})"
        )  # fmt: skip
        ra = "" if after["ra"] is None else f"{before['ra']['value']:.1f} → {after['ra']['value']:.1f}"
        print(f"| {row['attack']} | {row['seed']} | {row['method']} | {', '.join(row['suspected']) or '-'} | "
              f"{before['c_acc']['value']:.1f} → {after['c_acc']['value']:.1f} | {asr} | {ra} | "
              f"{'yes' if row['accepted'] else 'no'} | {row['processor_seconds']:.0f} |")  # fmt: skip
    if args.set == "test":
        write_atomically(SUMMARY, json.dumps(found, indent=1).encode() + b"\n")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By variant: means over the poisoned victims that are there, targets found, what clean ones lose, time."""
    made: dict[str, Any] = {}
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        poisoned, clean = ([row for row in mine if (row["attack"] == CLEAN) == wanted] for wanted in (False, True))
        if not poisoned:
            continue
        made[method] = {
            "victims": len(poisoned), "clean": len(clean), "seeds": sorted({row["seed"] for row in mine}),
            "asr_after_mean": mean(row["after"]["asr_excess"] for row in poisoned),
            "asr_after_max": max(row["after"]["asr_excess"] for row in poisoned),
            "c_acc_drop_mean": mean(map(fall, poisoned)),
            "clean_c_acc_drop_mean": mean(map(fall, clean)) if clean else None,
            "ra_mean": mean(row["after"]["ra"]["value"] for row in poisoned),
            "accepted": sum(row["accepted"] for row in poisoned),
            "processor_seconds_median": float(np.median([row["processor_seconds"] for row in poisoned])),
        }  # fmt: skip
        if poisoned[0]["searched"]:
            made[method]["target_found_rate"] = 100 * mean(row["target"] in row["suspected"] for row in poisoned)
    return made


def fall(row: dict[str, Any]) -> float:
    return row["before"]["c_acc"]["value"] - row["after"]["c_acc"]["value"]


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table"])
    parser.add_argument("--set", choices=list(WHERE), default="test")
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(FEW))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(ABLATIONS))
    parser.add_argument("--bench", type=Path, default=ROOT / "runs/bench-cpu")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--victims", type=Path, default=ROOT / "runs/clip-victims")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-cbpt")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    {"run": run, "table": table}[args.verb](args)


if __name__ == "__main__":
    main()
