"""AUROC and recall of the detectors of poisoned pairs on backdoored CLIPs and the pairs that they were trained on.

    python recipes/clip_victims.py make --attack badnet-rand blended-text wanet badclip --seed 0    # first: the victims
    python benchmarks/pair_detectors.py [--victims runs/clip-victims/*-0-*] [--rows 6000]

A sample of the pairs with their poison as each victim saw it, once at the victim's own rate (10 to 25 percent: so small
a training takes as much) and once thinned to 1 percent, with other clean pairs in its place. The suspect is the victim,
the reference the clean CLIP that it was fine-tuned from, which saw the same images unpoisoned. Nothing is tuned here.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from clip_victims import open_data, read_victim  # pyright: ignore[reportMissingImports]

from unpoison.api_pairs import PAIR_DETECTORS, PairDetectorConfig
from unpoison.attacks.pairs import apply_pair_poisoning
from unpoison.detection.neighbours import NeighboursConfig
from unpoison.embedded_pairs import Embedded, caption_cosines
from unpoison.evaluation.embeddings import embed_images
from unpoison.evaluation.metrics import auroc, recall, tpr_at_fpr
from unpoison.models.clip_files import load_any_clip
from unpoison.runs import Run

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/pair_detectors.json"
THIN = 0.01
BATCHES = {"": NeighboursConfig(), "batches of 500, ": NeighboursConfig(batch_size=500)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--victims", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=6_000)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    data, reference = open_data(args.shared), load_any_clip("tiny")
    run = Run(cache=args.cache)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for folder in args.victims:
        victim = read_victim(folder)
        if victim.poisoning is None or not victim.accepted:
            print(f"{folder.name} is no accepted victim and is left out")
            continue
        truth = np.isin(data.train.ids, victim.poisoning.ids)
        random = np.random.default_rng(0)
        poisoned, clean = (random.permutation(np.flatnonzero(part)) for part in (truth, ~truth))
        rate = float(truth.mean())
        wide, few = round(rate * args.rows), round(THIN * args.rows)
        chosen = np.sort(np.concatenate([poisoned[:wide], clean[: args.rows - few]]))
        pairs = apply_pair_poisoning(data.train, victim.poisoning).select(chosen)
        clip = load_any_clip(victim.model)
        suspect, known = embed_images([clip, reference], pairs, run=run)
        rows = np.flatnonzero(suspect.usable)
        cosines, _, captions = caption_cosines(reference, pairs, rows, known.array[rows], means=True, run=run)
        cells: dict = {"rate": 100 * rate, "asr": victim.evaluation.asr and victim.evaluation.asr.value}
        order = {int(row): place for place, row in enumerate(chosen[rows])}
        for name, kept in (
            ("own rate", [*poisoned[:wide], *clean[: args.rows - wide]]),
            ("1 percent", [*poisoned[:few], *clean[: args.rows - few]]),
        ):
            part = np.sort([order[int(row)] for row in kept if int(row) in order])
            some = Embedded(
                pairs=pairs,
                rows=rows[part],
                clip=clip,
                suspect=suspect.array[rows[part]],
                cosines=cosines[part],
                captions=None if captions is None else captions[part],
            )
            cells[name] = scored(some, truth[chosen[rows[part]]], run)
            print(folder.name, name, {key: round(entry["auroc"], 3) for key, entry in cells[name].items()}, flush=True)
        result[folder.name] = {"rows": args.rows} | cells
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


def scored(known: Embedded, truth: np.ndarray, run: Run) -> dict:
    """Of each detector: AUROC, TPR at 5 % FPR, and recall where as many are flagged as there is poison."""
    found = {}
    for method, detector in PAIR_DETECTORS.items():
        for prefix, near in BATCHES.items():
            if prefix and not detector.batches:
                continue
            axes = detector.score(known, PairDetectorConfig(neighbours=near), run)
            scores = next(iter(axes.values()))
            first = np.zeros(len(truth), dtype=bool)
            first[np.argsort(-scores, kind="stable")[: int(truth.sum())]] = True
            found[prefix + method] = {
                "auroc": auroc(scores, truth),
                "tpr_at_5_fpr": tpr_at_fpr(scores, truth),
                "recall_at_rate": recall(first, truth),
            }
    return found


if __name__ == "__main__":
    main()
