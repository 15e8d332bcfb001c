"""Activation clustering and spectral signatures, ours beside those of the Adversarial Robustness Toolbox (ART); STRIP
and IBD-PSC, which ART has no detector of training samples for, alone.

    make art                                         # once: ART in an environment of its own
    python benchmarks/detectors.py run [--attack badnet ...] [--seed 0 ...] [--repeats 3]
    python benchmarks/detectors.py table

The poisoned sets and the networks trained on them are those of benchmarks/cgd.py. Both libraries get the same network
and the same images in memory, already decoded, and run one after the other in processes of one thread each; CPU seconds
are of the detection alone: forward pass and statistics, without imports and decoding. Ours keeps features in the cache
folder, which is empty when a measurement begins: the first method pays for the pass, the second reads it; the ratio is
that of both methods together. ART reads activations from the last child of the module that it is given: here that is
the features before the head, what the papers use (with whole networks, whose last child gives logits, its AUROC was
lower). Its network has torch's usual memory layout, as it comes from a file. Of ART's spectral signatures, whose result
is a cut, AUROC is that of the scores it computes on the way; activation clustering there says yes or no, and is scored
as such.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/detectors"
SUMMARY = ROOT / "benchmarks/results/detectors.json"
ART = ROOT / ".venv-art/bin/python"
METHODS = ("activation-clustering", "spectral-signatures")
ALONE = ("strip", "ibd-psc")
LIBRARIES = ("ours", "art")
ATTACKS = ("badnet", "blended", "sig", "wanet", "clean-image")
RATE = 0.05


class Last(nn.Module):
    """What ART reads: the features before the head, of images that are normalised inside."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.network = classifier.module.to(memory_format=torch.contiguous_format)
        self.shift, self.scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (classifier.mean, classifier.std))
        self.found = torch.empty(0)
        classifier.head().register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.found = inputs[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.network((images - self.shift) / self.scale)
        return self.found


def detect_with_art(classifier: Any, images: np.ndarray, labels: np.ndarray, method: str) -> np.ndarray:
    from art.defences.detector.poison import ActivationDefence, SpectralSignatureDefense  # pyright: ignore[reportMissingImports]
    from art.estimators.classification import PyTorchClassifier  # pyright: ignore[reportMissingImports]

    module = nn.Sequential(Last(classifier))
    wrapped = PyTorchClassifier(
        module, loss=nn.CrossEntropyLoss(), input_shape=images.shape[1:], nb_classes=len(classifier.class_names)
    )
    answers = np.eye(len(classifier.class_names), dtype=np.float32)[labels]
    if method == "activation-clustering":
        _, clean = ActivationDefence(wrapped, images, answers).detect_poison(nb_clusters=2, nb_dims=10, reduce="PCA")
        return 1.0 - np.asarray(clean, dtype=np.float64)
    original = SpectralSignatureDefense.spectral_signature_scores

    def keep(matrix: np.ndarray) -> np.ndarray:
        values = original(matrix)
        kept.append(values[:, 0])
        return values

    kept: list[np.ndarray] = []
    SpectralSignatureDefense.spectral_signature_scores = staticmethod(keep)
    SpectralSignatureDefense(wrapped, images, answers, expected_pp_poison=RATE).detect_poison()
    scores, found = np.zeros(len(labels)), iter(kept)
    for label in range(len(classifier.class_names)):  # the order in which it goes through the labels
        rows = np.flatnonzero(labels == label)
        if len(rows):
            scores[rows] = next(found)
    return scores


def measure(args: argparse.Namespace) -> None:
    """One library, attack and seed, in this process; JSON on the last line."""
    from cgd import Cell

    from unpoison.api_detectors import NETWORK_DETECTORS, DetectorConfig, Trained
    from unpoison.data.pixels import to_images
    from unpoison.evaluation.metrics import auroc
    from unpoison.runs import Run

    torch.set_num_threads(1)
    cell = Cell(args.attack[0], args.seed[0], args.shared, args.work)
    victim = cell.victim()
    victim.module.eval()
    rows = np.flatnonzero(cell.pixels.usable)
    labels, truth = cell.source.labels[rows], cell.truth[rows]
    images = to_images(cell.pixels.array[rows]).numpy()
    found, cache = {}, tempfile.TemporaryDirectory()
    ours = Run(seed=cell.run.seed, cache=Path(cache.name))  # empty at first: only the second method finds the features
    for method in (*METHODS, *ALONE) if args.library == "ours" else METHODS:
        begun, wall = time.process_time(), time.perf_counter()
        if args.library == "ours":
            known = Trained(classifier=victim, pixels=cell.pixels, rows=rows, labels=labels)
            scores = NETWORK_DETECTORS[method](known, DetectorConfig(), ours).scores
        else:
            with torch.no_grad():
                scores = detect_with_art(victim, np.ascontiguousarray(images), labels, method)
        found[method] = {
            "cpu_seconds": time.process_time() - begun, "seconds": time.perf_counter() - wall,
            "auroc": auroc(scores, truth), "samples": len(rows),
        }  # fmt: skip
    print(json.dumps(found))


def run(args: argparse.Namespace) -> None:
    args.results.mkdir(parents=True, exist_ok=True)
    if not ART.exists():
        raise SystemExit("ART is not installed: run `make art` first.")
    for seed in args.seed:
        for attack in args.attack:
            file = args.results / f"{attack}-{seed}.json"
            if file.exists() and set(ALONE) <= json.loads(file.read_bytes())["runs"]["ours"][0].keys():
                continue
            runs: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
            for _ in range(args.repeats):
                for library in LIBRARIES:
                    runs[library].append(_elsewhere(library, attack, seed, args))
            result = {"attack": attack, "seed": seed, "runs": runs}
            file.write_text(json.dumps(result, indent=1) + "\n")
            for method in (*METHODS, *ALONE):
                print(f"{attack} {seed} {method}: {_line(runs, method)}", flush=True)


def _elsewhere(library: str, attack: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    python = sys.executable if library == "ours" else str(ART)
    command = [python, __file__, "measure", "--library", library, "--attack", attack, "--seed", str(seed),
               "--shared", str(args.shared), "--work", str(args.work)]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def _line(runs: dict[str, list[dict[str, Any]]], method: str) -> str:
    parts = []
    for library, repeats in runs.items():
        if method not in repeats[0]:
            continue
        seconds = statistics.median(entry[method]["cpu_seconds"] for entry in repeats)
        auroc = statistics.mean(entry[method]["auroc"] for entry in repeats)
        parts.append(f"{library} AUROC {auroc:.3f}, {seconds:.1f} CPU s")
    return "; ".join(parts)


def table(args: argparse.Namespace) -> None:
    """Means over seeds as Markdown; the largest CPU ratio and the least gain in AUROC over attacks as JSON.

    Those are of means over seeds, and the ratio is that of both methods together; the worst single cell, and each
    method's own ratio, stand beside them.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    for file in sorted(args.results.glob("*.json")):
        result = json.loads(file.read_bytes())
        rows.setdefault(result["attack"], []).append({"seed": result["seed"], **_figures(result["runs"])})
    everywhere = [entry for found in rows.values() for entry in found]
    names = [name for name in dict.fromkeys(name for entry in everywhere for name in entry) if name != "seed"]
    print("| attack | seeds | " + " | ".join(names) + " |\n|" + "---|" * (2 + len(names)))
    means: dict[str, dict[str, float]] = {}
    for attack, found in rows.items():
        known = {name: [entry[name] for entry in found if name in entry] for name in names}
        means[attack] = {name: statistics.mean(values) for name, values in known.items() if values}
        shown = [f"{means[attack][name]:.3f}" if name in means[attack] else "" for name in names]
        print(f"| {attack} | {len(found)} | {' | '.join(shown)} |")
    gains = [mean[f"gain {method}"] for mean in means.values() for method in METHODS]
    cells = [(f"{attack}-{entry['seed']:.0f}", entry) for attack, found in rows.items() for entry in found]
    ratios = ["cpu ratio", *(f"cpu ratio {method}" for method in METHODS)]
    worst = {name: _worst(cells, name, max) for name in ratios}
    worst |= {f"gain {method}": _worst(cells, f"gain {method}", min) for method in METHODS}
    for name, entry in worst.items():
        print(f"worst cell, {name}: {entry['value']:.3f} ({entry['cell']})")
    summary = {
        "worst_cells": worst,
        "cells": sum(map(len, rows.values())),
        "seeds": sorted({int(entry["seed"]) for found in rows.values() for entry in found}),
        "cpu_ratio_max": max(mean["cpu ratio"] for mean in means.values()), "auroc_gain_min": min(gains),
        "means": means, "cells_of": rows,
    }  # fmt: skip
    SUMMARY.write_text(json.dumps(summary, indent=1) + "\n")


def _worst(
    cells: list[tuple[str, dict[str, float]]], name: str, pick: Callable[..., tuple[str, dict[str, float]]]
) -> dict[str, Any]:
    cell, entry = pick(cells, key=lambda item: item[1][name])
    return {"value": entry[name], "cell": cell}


def _figures(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """AUROC and CPU seconds of each method, the gain over ART, each ratio of CPU seconds and that of the sums."""
    figures: dict[str, float] = {}
    for method in METHODS:
        found = {library: [entry[method] for entry in runs[library]] for library in LIBRARIES}
        aurocs = {name: statistics.mean(entry["auroc"] for entry in entries) for name, entries in found.items()}
        figures |= {f"auroc {method} {name}": value for name, value in aurocs.items()}
        figures[f"gain {method}"] = aurocs["ours"] - aurocs["art"]
        for name in ("ours", "art"):
            figures[f"cpu {method} {name}"] = statistics.median(entry["cpu_seconds"] for entry in found[name])
        figures[f"cpu ratio {method}"] = figures[f"cpu {method} ours"] / figures[f"cpu {method} art"]
    for method in ALONE:
        alone = [entry[method] for entry in runs["ours"] if method in entry]
        if alone:
            figures[f"auroc {method} ours"] = statistics.mean(entry["auroc"] for entry in alone)
            figures[f"cpu {method} ours"] = statistics.median(entry["cpu_seconds"] for entry in alone)
    ours, theirs = (sum(figures[f"cpu {method} {name}"] for method in METHODS) for name in ("ours", "art"))
    return figures | {"cpu ratio": ours / theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "measure", "table"])
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--library", choices=LIBRARIES, default="ours", help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-cgd")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    {"run": run, "measure": measure, "table": table}[args.verb](args)


if __name__ == "__main__":
    main()
