"""What UBT costs beside CleanCLIP, and CBPT beside RVPT: wall and processor seconds in one run on one victim.

    unpoison bench run grids/cpu.toml -o runs/bench-cpu       # first: the victims
    python benchmarks/ubt_cbpt_cost.py [--attack badnet-rand] [--seed 0] [--rounds 3]
    python benchmarks/ubt_cbpt_cost.py --model tiny --pairs shapes:2000:3 --shots shapes:400:4 --rounds 1 --quick

The methods take turns, ``--rounds`` times, in one process with one thread and in the grid's precision, each with a
cache of its own that starts empty: decoding and embedding count. UBT and CleanCLIP get the same pairs, those that the
victim was trained on. CleanCLIP is timed with the grid's setting (200 steps of 128 pairs) and over one epoch of all
these pairs, as many as UBT looks at once to rank them. CBPT, its search included, and RVPT get the same labelled
images, 16 a class to learn from. A ratio is that of a round, the median over rounds counts. On a victim in which CBPT
finds no target it has less to do: the result says what was found. ``--quick`` is for trying the script: few steps, and
its figures mean nothing.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cbpt import SHOTS
from kept_cells import PRECISION, new_run
from par import SETS
from ubt import ATTACKS, RUNS, open_victim

from unpoison.api_clip import count_parameters, purify_with_clean_clip
from unpoison.api_ubt import purify_with_ubt
from unpoison.api_zero_shot import purify_with_cbpt, purify_with_rvpt
from unpoison.data.pairs import ImageTextPairs, open_pairs
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.clean_clip import CleanClipConfig
from unpoison.defenses.baselines.rvpt import RVPTConfig
from unpoison.defenses.cbpt import CBPTConfig
from unpoison.defenses.ubt import UBTConfig
from unpoison.models.clip_files import load_any_clip
from unpoison.results import write_atomically
from unpoison.runs import Run
from unpoison.types import ImageTextModel

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/ubt_cbpt_cost.json"
STEPS, BATCH, RATE = 200, 128, 1.15e-3
"""CleanCLIP's of grids/cpu.toml."""
UBT, CLEAN_CLIP, EPOCH, CBPT, RVPT = "ubt", "clean-clip", "clean-clip-epoch", "cbpt", "rvpt"
RATIOS = {
    "ubt.wall_ratio_to_cleanclip": (UBT, CLEAN_CLIP),
    "ubt.wall_ratio_to_cleanclip_epoch": (UBT, EPOCH),
    "cbpt.wall_ratio_to_rvpt": (CBPT, RVPT),
}
"""What is claimed, and of which two."""
Method = Callable[..., Any]


def methods(
    clip: ImageTextModel, reference: ImageTextModel, pairs: ImageTextPairs, shots: LabelledImages, *, quick: bool
) -> dict[str, Method]:
    """By name; each still wants a run."""
    size = {"parameters": count_parameters(clip), "samples": len(pairs)}
    few: dict[str, Any] = {"steps": 2} if quick else {}
    by_steps: dict[str, Any] = {"batch_size": BATCH, "learning_rate": RATE, "steps": STEPS} | few
    by_epoch: dict[str, Any] = {"batch_size": BATCH, "learning_rate": RATE, "epochs": 1} | few
    cbpt, rvpt = CBPTConfig(**few), RVPTConfig(epochs=1) if quick else RVPTConfig()
    if quick:
        short = replace(cbpt.inversion, steps=2)
        cbpt = replace(cbpt, loud_steps=2, inversion=short, search=replace(cbpt.search, inversion=short))
    return {
        UBT: partial(
            purify_with_ubt, clip, pairs, reference=reference, config=UBTConfig.recommended(**size, always=True, **few)
        ),
        CLEAN_CLIP: partial(purify_with_clean_clip, clip, pairs, config=CleanClipConfig(**by_steps)),
        EPOCH: partial(purify_with_clean_clip, clip, pairs, config=CleanClipConfig(**by_epoch)),
        CBPT: partial(purify_with_cbpt, clip, shots, config=cbpt),
        RVPT: partial(purify_with_rvpt, clip, shots, config=rvpt),
    }


def measure(method: Method, seed: int) -> dict[str, Any]:
    """Wall and processor seconds of one repair, and what it came to."""
    cache = Path(tempfile.mkdtemp(prefix="cost-"))
    try:
        run: Run = new_run(seed, cache=cache)
        begun, processor = time.perf_counter(), time.process_time()
        found = method(run=run).purification
        seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return {
        "seconds": seconds, "processor_seconds": processor, "steps": found.steps, "left_alone": found.left_alone,
        "targets": list(getattr(found, "targets", ())),
    }  # fmt: skip


def ratios(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds of the ratio of wall seconds, of processor seconds beside it, by the names of RATIOS."""
    body: dict[str, Any] = {}
    for name, (ours, theirs) in RATIOS.items():
        method, _, figure = name.partition(".")
        for kind, key in (("seconds", figure), ("processor_seconds", figure.replace("wall", "processor"))):
            each = [found[ours][kind] / found[theirs][kind] for found in rounds]
            body.setdefault(method, {})[key] = statistics.median(each)
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", choices=ATTACKS, default="badnet-rand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", choices=list(SETS), default="test", help="test: the grid's victims, tune: the recipe's"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    parser.add_argument("--model", help="a CLIP in the victim's place, with --pairs")
    parser.add_argument("--pairs", help="what it was trained on")
    parser.add_argument("--shots", help="labelled images; rows of CIFAR-10 unless given")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--bench", type=Path, default=ROOT / RUNS, help="the results folder of grids/cpu.toml")
    parser.add_argument("--victims", type=Path, default=ROOT / "runs/clip-victims", help="those of --set tune")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shots = open_images(args.shots or f"{args.shared}/data/{SHOTS}")
    if args.model is None:
        victim = open_victim(args.attack, args.seed, args)
        clip, reference, pairs = victim.clip, victim.reference, victim.pairs
    else:
        if args.pairs is None:
            parser.error("--model needs the pairs that it was trained on: --pairs SOURCE")
        clip, reference, pairs = load_any_clip(args.model), load_any_clip("tiny"), open_pairs(args.pairs)
    rounds = []
    for place in range(args.rounds):
        found = {}
        for name, method in methods(clip, reference, pairs, shots, quick=args.quick).items():
            found[name] = measure(method, args.seed)
            print(f"{place} {name}: {found[name]['seconds']:.1f} s, {found[name]['steps']} steps", flush=True)
        rounds.append(found)
    result = {
        "machine": f"{platform.machine()}, torch {torch.__version__}", "precision": PRECISION,
        "threads": torch.get_num_threads(), "quick": args.quick, "victim": clip.fingerprint, "model": args.model,
        "attack": None if args.model else args.attack, "seed": args.seed, "pairs": len(pairs), "shots": len(shots),
        **ratios(rounds), "rounds": rounds,
    }  # fmt: skip
    write_atomically(args.result, json.dumps(result, indent=1).encode() + b"\n")
    print(json.dumps({name: result[name] for name in (UBT, CBPT)}, indent=1))


if __name__ == "__main__":
    main()
