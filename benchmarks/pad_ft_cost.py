"""What PAD-FT costs in forward passes: a victim of benchmarks/cgd.py and the 10,000 images that it was trained on.

    python benchmarks/pad_ft_cost.py [--rounds 5] [--attack badnet] [--seed 0]

A round: one bare forward pass of the network over all images, in memory as bytes, then PAD-FT on the same, given the
scores of an earlier scan: losses, choice of samples, bounds, head. CPU seconds of one thread, so that other work on the
machine counts little; the median over rounds counts. Claimed: (PAD-FT - 10 s) / pass.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from pad_ft import Setting

from unpoison.data.pixels import to_images
from unpoison.defenses.cgd import CGDConfig
from unpoison.defenses.pad_ft import PADFTConfig, repair_with_pad_ft
from unpoison.detection.cgd import with_mean_rank
from unpoison.detection.self_purified import select_clean, with_suspects
from unpoison.detection.thresholds import split_by_evidence
from unpoison.models.image_classifier import evaluation_mode, images_at_once
from unpoison.results import write_atomically

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/pad_ft_cost.json"
ALLOWED = 10.0  # seconds beside the passes


def cpu_seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attack", default="badnet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-cgd")
    args = parser.parse_args()
    args.set = "test"
    torch.set_num_threads(1)
    setting, config = Setting.of(args.attack, args.seed, args), PADFTConfig()
    victim, pixels = setting.victim(), setting.cell.pixels
    _, scores = setting.cell.scores(CGDConfig().separation)
    size = images_at_once(setting.run.device, pixels.array.shape[1])
    run = replace(setting.run, folder=None)

    def one_pass() -> None:
        with torch.inference_mode(), evaluation_mode(victim.module):
            for start in range(0, len(pixels.array), size):
                victim.logits(to_images(pixels.array[start : start + size]))

    def pad_ft() -> None:
        own = setting.own_scores(victim)
        split = select_clean(own, config.per_class, other=with_mean_rank(scores), share=config.scores_share)
        split = with_suspects(split, split_by_evidence(scores, odd=config.odd_labels).suspect)
        repair_with_pad_ft(victim, pixels, split, config, run=run)

    rounds = []
    for _ in range(args.rounds):
        rounds.append({"pass": cpu_seconds(one_pass), "pad_ft": cpu_seconds(pad_ft)})
        print({name: round(value, 1) for name, value in rounds[-1].items()}, flush=True)
    passes = [(entry["pad_ft"] - ALLOWED) / entry["pass"] for entry in rounds]
    result = {
        "images": len(pixels.array), "attack": args.attack, "seed": args.seed, "threads": 1, "rounds": rounds,
        "allowed_seconds": ALLOWED, "forward_passes": statistics.median(passes),
        "ratio": statistics.median([entry["pad_ft"] / entry["pass"] for entry in rounds]),
        "machine": platform.machine(), "torch": torch.__version__,
    }  # fmt: skip
    write_atomically(RESULT, json.dumps(result, indent=1).encode() + b"\n")
    print(f"{result['forward_passes']:.2f} passes + {ALLOWED:.0f} s; {result['ratio']:.2f} passes in all")


if __name__ == "__main__":
    main()
