"""Labels that look odd: which classes of made-up clean sets are named, and which of sets where labels were changed.

    python benchmarks/odd_labels.py run [--set ...]    # scores, kept in --work; then the counts of every class
    python benchmarks/odd_labels.py table

Clean sets: CIFAR-10 rows that no test cell uses, whole and small, and 20 random classes of Tiny-ImageNet at a time;
each again with one class after the other under a word that CLIP does not know. Changed sets: the clean-image attack
with seeds that no test cell uses. The constants of unpoison.detection.odd_labels were chosen on these.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.detection.cgd import SeparationConfig, early_model_logits, scores_of_losses
from unpoison.detection.odd_labels import count_ready
from unpoison.detection.poison_estimate import estimate_poison
from unpoison.detection.ranks import label_cross_entropy
from unpoison.models.classifier import new_classifier
from unpoison.models.clip_transformers import load_clip
from unpoison.models.zero_shot import zero_shot_logits
from unpoison.results import write_atomically
from unpoison.runs import Run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/odd_labels.json"
CIFAR = ("0:10000", "10000:20000", "35000:45000", "40000:50000")
WORDS = ("wug", "blicket", "dax", "zorp", "fep", "tupa", "gazzer", "modi", "toma", "kiki")
CLEAN = (
    *(f"cifar {rows} {seed}" for seed, rows in enumerate(CIFAR, 1)),
    *(f"cifar {start}:{start + 2500} {seed}" for seed, start in enumerate(range(0, 10000, 2500), 1)),
    *(f"tiny {seed}" for seed in range(1, 9)),
)
CHANGED = (
    *(f"changed 25000:35000 {seed} 0.05 0" for seed in (5, 6, 7, 10, 11, 12)),
    "changed 25000:35000 13 0.05 3",
    "changed 25000:35000 14 0.05 5",
    "changed 25000:35000 15 0.02 0",
    "changed 25000:35000 16 0.1 0",
    *(f"changed 25000:27500 {seed} 0.05 0" for seed in (17, 18, 19, 20)),
)


def opened(name: str, shared: Path, work: Path) -> tuple[LabelledImages, set[str], int, int]:
    """The set, the ids whose labels were changed, the seed of its early models, its target label or -1."""
    kind, *rest = name.split()
    if kind == "tiny":
        return open_images(some_classes(shared, work, seed=int(rest[0]))), set(), int(rest[0]), -1
    base = open_images(f"{shared / 'data/cifar10/train.parquet'}[{rest[0]}]")
    if kind == "cifar":
        return base, set(), int(rest[1]), -1
    seed, rate, target = int(rest[1]), float(rest[2]), int(rest[3])
    poisoning = plan_poisoning(base, "clean-image", rate=rate, target=target, seed=seed)
    return apply_poisoning(base, poisoning), set(poisoning.ids), seed, target


def some_classes(shared: Path, work: Path, *, seed: int) -> Path:
    """20 random classes of Tiny-ImageNet, 2,000 images, as a parquet file of their own."""
    path = work / f"tiny-{seed}.parquet"
    if not path.exists():
        rows = datasets.Dataset.from_parquet(str(shared / "data/tiny_imagenet/train.parquet"))
        names, labels = rows.features["label"].names, np.array(rows["label"])
        chosen = np.sort(np.random.default_rng(seed).choice(len(names), 20, replace=False))
        part = rows.select(np.flatnonzero(np.isin(labels, chosen)))
        features = part.features | {"label": datasets.ClassLabel(names=[names[c] for c in chosen])}
        relabelled = [int(np.searchsorted(chosen, label)) for label in part["label"]]
        part.remove_columns("label").add_column("label", relabelled).cast(datasets.Features(features)).to_parquet(path)
    return path


def scored(name: str, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Cosines with the given names [n, c] and with made-up words [n, w], early logits [n, c], who was changed [n]."""
    file = args.work / f"{name.replace(' ', '_').replace(':', '_')}.npz"
    source, changed, seed, _ = opened(name, args.shared, args.work)
    run = Run(seed=seed, cache=args.work / "cache")
    if not file.exists():
        clip, fresh = load_clip("tiny"), new_classifier("small-resnet", source.class_names)
        pixels = load_pixels(source, 32, cache=run.cache, progress=run.progress)
        np.savez(
            file,
            cos=zero_shot_logits(clip, source, run=run).cosines,
            words=zero_shot_logits(clip, replace(source, class_names=WORDS), run=run).cosines,
            early=early_model_logits(fresh, pixels, source.labels, SeparationConfig(), run=run),
            truth=np.array([sample in changed for sample in source.ids]),
        )
    return dict(np.load(file))


def counted(cosines: np.ndarray, early: np.ndarray, source: LabelledImages, only: int | None = None) -> dict:
    """Of every class, or of ``only`` one, the counts; the odd labels; the corner's targets."""
    clip_loss, early_loss = (label_cross_entropy(logits, source.labels) for logits in (100 * cosines, early))
    scores = scores_of_losses(source, clip_loss, early_loss, SeparationConfig(), skipped=(), agreement=0.0)
    estimate, _ = estimate_poison(scores)
    labels = np.unique(source.labels).tolist() if only is None else [only]
    return {
        "classes": {label: asdict(count_ready(scores, label)) for label in labels},
        "odd": list(estimate.odd_labels),
        "targets": list(estimate.target_labels),
    }


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.set:
        source, _, _, target = opened(name, args.shared, args.work)
        arrays = scored(name, args)
        cosines, early = arrays["cos"], arrays["early"]
        entry: dict[str, Any] = {"samples": len(source), "changed": int(arrays["truth"].sum()), "target": target}
        entry |= counted(cosines, early, source)
        if target < 0:
            renamed: dict[int, dict] = {}
            for label in range(cosines.shape[1]):
                other = cosines.copy()
                other[:, label] = arrays["words"][:, label % len(WORDS)]
                renamed[label] = counted(other, early, source, only=label)
            entry["renamed"] = renamed
        found[name] = entry
        print(name, "odd", entry["odd"], "targets", entry["targets"], flush=True)
        write_atomically(RESULTS, json.dumps(found, indent=1).encode() + b"\n")


def table(args: argparse.Namespace) -> None:
    found = json.loads(RESULTS.read_text())
    print("| set | sets | with an odd label | with a target |")
    print("|---|---|---|---|")
    clean = [entry for name, entry in found.items() if name in CLEAN]
    rows = {
        "clean, CIFAR-10": [entry for name, entry in found.items() if name.startswith("cifar")],
        "clean, 20 classes of Tiny-ImageNet": [entry for name, entry in found.items() if name.startswith("tiny")],
        "clean, one class under a made-up word": [entry for whole in clean for entry in whole["renamed"].values()],
        "labels changed": [entry for name, entry in found.items() if name in CHANGED],
    }
    for label, entries in rows.items():
        odd, targets = (sum(bool(entry[kind]) for entry in entries) for kind in ("odd", "targets"))
        print(f"| {label} | {len(entries)} | {odd} | {targets} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--set", nargs="+", default=[*CLEAN, *CHANGED], choices=[*CLEAN, *CHANGED])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "out/odd-labels")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    {"run": run, "table": table}[arguments.command](arguments)
