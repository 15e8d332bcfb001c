"""Would a backdoor of our own tell when the attacker's is gone?

    python recipes/clip_victims.py make --seed 9            # first: the tuning victims, under runs/clip-victims
    python benchmarks/par_canary.py canary [--attack badnet-stripes ...] [--canary badnet-rand blended-rand]
    python benchmarks/par_canary.py table

A canary: a backdoor of our own is planted in the suspect, and what a repair has done to it is taken for what it has
done to the attacker's. PAR as published runs on the suspect with its canary, and every 25 steps both are measured on
1,000 images that nothing else uses (rows 45,000.. of CIFAR-10 train). Would its end have been the attack's? What
`purify par` makes of the answer stands in docs/decisions/0004.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from clip_victims import ATTACKS as PLANTED  # pyright: ignore[reportMissingImports]
from clip_victims import LABELLED, open_data  # pyright: ignore[reportMissingImports]
from par import BATCH, SETS, Printed, find_victim

from unpoison.api_clip import count_parameters, purify_with_par
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.pairs import apply_pair_poisoning, plan_pair_poisoning
from unpoison.benchmark.clip_victims import Settings, read_corpus, train
from unpoison.clip_loop import train_steps
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses import par
from unpoison.defenses.par import PARConfig
from unpoison.evaluation.clip import evaluate_clip
from unpoison.models.clip_files import load_any_clip
from unpoison.results import write_atomically
from unpoison.runs import Run
from unpoison.types import ImageTextModel

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/par_canary"
TARGET, SEED, ROWS, EVERY, STEPS = "ship", 9, 1_000, 25, 200
PLANTING = Settings(steps=120, warm_up=20)
FORGOTTEN = 5.0  # percent of excess ASR


def plant(suspect: ImageTextModel, data: Any, trigger: str, run: Run) -> tuple[ImageTextModel, PairPoisoning]:
    """A copy of the suspect that also obeys the canary: trained on the clean pairs, a quarter of them with it."""
    attack = PLANTED[trigger]
    poisoning = plan_pair_poisoning(
        data.train, attack.trigger, rate=0.25, target=TARGET, seed=SEED + 1, size=suspect.image_size, **attack.params
    )
    pairs = apply_pair_poisoning(data.train, poisoning)
    pixels = load_pixels(pairs, suspect.image_size, cache=run.cache, progress=run.progress)
    corpus = read_corpus(pairs, pixels, LABELLED, data.test.class_names)
    return train(suspect, corpus, PLANTING, run=run), poisoning


def rates(
    clip: ImageTextModel, images: LabelledImages, poisoning: PairPoisoning, name: str, run: Run
) -> dict[str, Any]:
    found = evaluate_clip(clip, images, poisoning=poisoning, run=run)
    return {"c_acc": found.c_acc.value, f"{name}_excess": found.asr_excess}


def canary(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data = None
    args.results.mkdir(parents=True, exist_ok=True)
    for attack in args.attack:
        folder = find_victim(args.victims, attack, SEED)
        if folder is None:
            print(f"{attack}: no accepted victim of seed {SEED} under {args.victims}", flush=True)
            continue
        for trigger in args.canary:
            file = args.results / f"{attack}-{trigger}.json"
            if not file.exists():
                data = data or open_data(args.shared)
                print(f"{attack}, canary {trigger}", flush=True)
                found = watch_both(attack, folder, data, trigger, args)
                write_atomically(file, json.dumps(found, indent=1, default=float).encode() + b"\n")


def watch_both(attack: str, folder: Path, data: Any, trigger: str, args: argparse.Namespace) -> dict[str, Any]:
    begun, run = time.time(), Run(seed=SEED, progress=Printed(), cache=args.work / "cache")
    images = open_images(f"{args.shared}/data/{SETS['tune'][0]}", limit=ROWS)
    real = PairPoisoning.load(folder / "manifest.json")
    suspect = load_any_clip(folder / "model")
    planted, poisoning = plant(suspect, data, trigger, run)

    def look(clip: ImageTextModel) -> dict[str, Any]:
        both = rates(clip, images, real, "attack", run) | rates(clip, images, poisoning, "canary", run)
        print("  " + "  ".join(f"{name} {value:.1f}" for name, value in both.items()), flush=True)
        return both

    def watched(clip: ImageTextModel, *rest: Any, **more: Any) -> Any:
        return train_steps(clip, *rest, **more, watch=partial(look, clip))

    size = count_parameters(planted)
    config = replace(
        PARConfig.scaled(parameters=size, samples=len(data.train), steps=STEPS, batch_size=BATCH), check_every=EVERY
    )
    before = rates(suspect, images, real, "attack", run)
    start = look(planted)
    with patch.object(par, "train_steps", watched):
        outcome = purify_with_par(planted, data.train, config=config, run=run)
    keys = ("step", "c_acc", "attack_excess", "canary_excess", "image_distance")
    looks = [{key: entry[key] for key in keys if key in entry} for entry in outcome.purification.history]
    looks[0] |= start
    return {
        "attack": attack, "canary": trigger, "seed": SEED,
        "victim": json.loads((folder / "victim.json").read_bytes())["fingerprint"],
        "rows": ROWS, "planting": asdict(PLANTING), "config": outcome.purification.config, "before": before,
        "looks": looks, "seconds": time.time() - begun,
    }  # fmt: skip


def table(args: argparse.Namespace) -> None:
    """For each victim and canary: where the canary was first forgotten, and what the attack was worth there."""
    print("| attack | canary | canary planted | forgotten at step | attack then | attack at the end |\n|" + "---|" * 6)
    for file in sorted(args.results.glob("*.json")):
        found = json.loads(file.read_bytes())
        looks = found["looks"]
        first = next((look for look in looks if look["canary_excess"] <= FORGOTTEN), None)
        then = ("never", "") if first is None else (f"{first['step']:.0f}", f"{first['attack_excess']:.1f}")
        shown = [found["attack"], found["canary"], f"{looks[0]['canary_excess']:.1f}", *then]
        print(f"| {' | '.join(shown)} | {looks[-1]['attack_excess']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["canary", "table"])
    parser.add_argument("--attack", nargs="+", choices=list(PLANTED), default=["badnet-stripes", "blended-triangles",
                        "blended-text", "badclip"])  # fmt: skip
    parser.add_argument("--canary", nargs="+", choices=list(PLANTED), default=["badnet-rand", "blended-rand"])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--victims", type=Path, default=ROOT / "runs/clip-victims")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-par")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    verbs: dict[str, Callable[[argparse.Namespace], None]] = {"canary": canary, "table": table}
    verbs[args.verb](args)


if __name__ == "__main__":
    main()
