"""The search for a trigger on backdoored and clean CLIPs: is the target found, is a clean model left alone?

    python recipes/clip_victims.py make --seed 0 1 2        # first: the models, under runs/clip-victims
    python benchmarks/trigger_search.py run [--attack wanet ...] [--seed 0 ...] [--by concepts classes]
    python benchmarks/trigger_search.py table

``concepts``: with the pairs that a repair is given (rows 0..24,999 of CIFAR-10 train and Flickr8k train), as
``unpoison purify par`` does. ``classes``: with CIFAR-10's class names and 640 images (rows 30,000..30,639 of train), as
a defense with class names does. Thresholds were set on seeds 0 and 1 and the shipped tiny CLIP; seed 2 is held out.
A cell that is done is not computed again.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from par import ATTACKS, CLEAN, ROOT, Data, find_victim

from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.data.pixels import load_pixels, to_images
from unpoison.data.sources import open_images
from unpoison.detection.clip_triggers import search_concepts
from unpoison.detection.inversion import InvertedTrigger
from unpoison.detection.trigger_search import TriggerSearch, TriggerSearchConfig, judge_triggers, search_triggers
from unpoison.evaluation.embeddings import embed_texts, ready
from unpoison.models.clip_files import load_any_clip
from unpoison.models.zero_shot import TEMPLATES, class_embeddings
from unpoison.results import write_atomically
from unpoison.runs import Run
from unpoison.types import Images, ImageTextModel

RESULTS = ROOT / "benchmarks/results/trigger_search"
SUMMARY = ROOT / "benchmarks/results/trigger_search.json"
CHOSEN_ON = (0, 1)
TINY = "tiny"


def by_concepts(clip: ImageTextModel, args: argparse.Namespace, run: Run) -> tuple[TriggerSearch, tuple[str, ...]]:
    pairs = Data.open(args.shared, "test", None).pairs
    return search_concepts(clip, pairs, run=run)


def by_classes(clip: ImageTextModel, args: argparse.Namespace, run: Run) -> tuple[TriggerSearch, tuple[str, ...]]:
    rows = open_images(f"{args.shared}/data/cifar10/train.parquet[30000:30640]")
    images = to_images(load_pixels(rows, clip.image_size, cache=run.cache, progress=run.progress).array)
    probed, names = clip.copy(), tuple(rows.class_names)
    with ready(probed, run):
        probed.module.float().requires_grad_(False)
        classes = class_embeddings(probed, names, TEMPLATES).float()

        def logits(batch: Images) -> torch.Tensor:
            return clip.logit_scale * probed.encode_images(batch) @ classes.T

        return search_triggers(logits, images.to(run.device), names, run=run), names


KINDS: dict[str, Callable[..., tuple[TriggerSearch, tuple[str, ...]]]] = {
    "concepts": by_concepts,
    "classes": by_classes,
}


def compute(model: Path, attack: str, seed: int, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    clip = load_any_clip(model)
    run = Run(seed=seed, cache=args.work / "cache")
    began, processor = time.time(), time.process_time()
    found, names = KINDS[kind](clip, args, run)
    result: dict[str, Any] = {
        "attack": attack, "seed": seed, "by": kind, "model": clip.fingerprint, "names": names,
        "targets": [trigger.target for trigger in found.triggers],
        "sizes": [trigger.size for trigger in found.triggers],
        "success": [trigger.success for trigger in found.triggers],
        "seconds": time.time() - began, "processor_seconds": time.process_time() - processor,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    manifest = model.parent / "manifest.json"
    if attack != CLEAN and manifest.exists():
        wanted = PairPoisoning.load(manifest).target_name
        near = embed_texts(clip, names, run=run) @ embed_texts(clip, [f"a photo of a {wanted}."], run=run)[0]
        result["wanted"] = int(near.argmax())
    return result


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        for attack in args.attack:
            model = find_victim(args.victims, attack, seed)
            if model is None:
                print(f"{attack} {seed}: no accepted victim under {args.victims}", flush=True)
                continue
            for kind in args.by:
                measure(model / "model", attack, seed, kind, args)
    for kind in args.by:
        measure(ROOT / "src/unpoison/assets/tiny_clip", CLEAN, 0, kind, args, name=TINY)


def measure(model: Path, attack: str, seed: int, kind: str, args: argparse.Namespace, *, name: str = "") -> None:
    file = args.results / f"{kind}-{name or f'{attack}-{seed}'}.json"
    if file.exists():
        return
    result = compute(model, attack, seed, kind, args)
    write_atomically(file, json.dumps(result, indent=1, default=float).encode() + b"\n")
    print(f"{file.stem}: {verdict(result)}", flush=True)


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """What today's thresholds say of what was found; the search itself is not repeated."""
    sizes = np.array(row["sizes"])
    triggers = [stored_trigger(row, place) for place in range(len(sizes))]
    found = judge_triggers(triggers, row["names"], TriggerSearchConfig())
    order = np.argsort(sizes)
    return {
        "suspects": [row["names"][target] for target in found.suspects],
        "right": row.get("wanted") in found.suspects if "wanted" in row else None,
        "ratio": round(float(sizes[order[0]] / sizes[order[1]]), 3),
        "index": round(max(found.index), 2),
    }


def stored_trigger(row: dict[str, Any], place: int) -> InvertedTrigger:
    """What a verdict reads of a trigger; its picture was not kept."""
    nothing = torch.zeros(3, 1, 1)
    target, size, success = (row[name][place] for name in ("targets", "sizes", "success"))
    return InvertedTrigger(
        form="additive", target=target, mask=nothing[:1], pattern=nothing, size=size, success=success
    )


def table(args: argparse.Namespace) -> None:
    """Rates over all models, and over those of other seeds than the thresholds were chosen on."""
    rows = [json.loads(file.read_bytes()) for file in sorted(args.results.glob("*.json"))]
    rows = [row | {"verdict": verdict(row)} for row in rows]
    summary: dict[str, Any] = {}
    print("| by | attack | seed | suspected | ratio | index | s |\n|---|---|---|---|---|---|---|")
    for row in rows:
        said = row["verdict"]
        print(f"| {row['by']} | {row['attack']} | {row['seed']} | {', '.join(said['suspects']) or '-'} | "
              f"{said['ratio']} | {said['index']} | {row['processor_seconds']:.0f} |")  # fmt: skip
    for kind in KINDS:
        for part in ("all", "held_out"):
            chosen = [row for row in rows if row["by"] == kind and (part == "all" or row["seed"] not in CHOSEN_ON)]
            poisoned = [row["verdict"] for row in chosen if row["attack"] != CLEAN]
            clean = [row["verdict"] for row in chosen if row["attack"] == CLEAN]
            if poisoned and clean:
                summary[f"{kind}.{part}"] = {
                    "victims": len(poisoned), "clean": len(clean),
                    "target_found": 100 * sum(bool(entry["right"]) for entry in poisoned) / len(poisoned),
                    "suspected": 100 * sum(bool(entry["suspects"]) for entry in poisoned) / len(poisoned),
                    "false_alarms": 100 * sum(bool(entry["suspects"]) for entry in clean) / len(clean),
                    "processor_seconds": float(np.median([row["processor_seconds"] for row in chosen])),
                }  # fmt: skip
    print(json.dumps(summary, indent=1))
    write_atomically(SUMMARY, json.dumps(summary, indent=1).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table"])
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--by", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--victims", type=Path, default=ROOT / "runs/clip-victims")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-par")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    {"run": run, "table": table}[args.verb](args)


if __name__ == "__main__":
    main()
