"""``unpoison scan model`` on the zoo and on the published models: AUROC, false alarms, detection, target named, time.

    python recipes/scan_zoo.py make        # first: the models, under runs/scan-zoo and runs/bench-cpu
    python benchmarks/scan_model.py run [--half held-out] [--kind classifier] [--references 2]
    python benchmarks/scan_model.py published  # the published victim and the published clean ResNet-20
    python benchmarks/scan_model.py table      # scan_model.json and the ROC as docs/scan_model_roc.svg

Images to search on are rows 0..479 of CIFAR-10 train, which no classifier of the zoo saw, or pictures of the shapes
world of another seed. Each scan is kept whole under runs/scan-zoo/scans, and its figures in one JSON under
benchmarks/results/scan_model; a scan that is done is not repeated. References are clean models of the calibration half,
of the same kind, world and network, never the scanned model itself. Nothing is set on the published models or on the
held-out half. Figures are of what is there: the table says how many models that is.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unpoison.api_models import scan_model
from unpoison.data.sources import open_images
from unpoison.model_results import ModelScan
from unpoison.models.any_model import Opening
from unpoison.results import write_atomically
from unpoison.runs import Run

ROOT = Path(__file__).parents[1]
RESULTS, SUMMARY = ROOT / "benchmarks/results/scan_model", ROOT / "benchmarks/results/scan_model.json"
ROC = ROOT / "docs/scan_model_roc.svg"
CLEAN, PUBLISHED = "clean", "published"
FOUND = ("backdoored", "suspicious")
sys.path.append(str(ROOT / "recipes"))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model: ``target`` is the name of the true target, None for a clean one."""

    name: str
    model: Path
    kind: str
    family: str
    half: str
    world: str = "cifar10"
    arch: str = ""
    target: str | None = None
    opening: Opening = Opening()  # noqa: RUF009 # frozen


def zoo(args: argparse.Namespace) -> Iterator[Cell]:
    """The accepted models that are there."""
    from scan_zoo import find_zoo  # pyright: ignore[reportMissingImports]

    for folder, body in find_zoo(args.zoo):
        yield Cell(
            name=folder.name, model=Path(body.get("model", folder / "model")), kind=body["kind"],
            family=body["family"], half=body["half"], world=body["world"] or "cifar10", arch=body["arch"],
            target=body["target_name"],
        )  # fmt: skip


def published(args: argparse.Namespace) -> list[Cell]:
    models = args.shared / "models"
    return [
        Cell(
            name="published-victim", model=models / "wrn16_1_cifar10_grid_target0.pth", kind="classifier",
            family="badnet", half=PUBLISHED, target="airplane",
            opening=Opening(arch="wrn-16-1", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        ),
        Cell(
            name="published-clean", model=models / "resnet20_cifar10_clean.th", kind="classifier", family=CLEAN,
            half=PUBLISHED,
            opening=Opening(arch="resnet20:resnet20", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ),
    ]  # fmt: skip


def scan(cell: Cell, references: list[Path], args: argparse.Namespace) -> None:
    file = args.results / f"{cell.name}.json"
    if file.exists():
        return
    kept, processor = args.zoo / "scans" / f"{cell.name}.json", None
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        began = time.process_time()
        look(cell, references, args).save(kept)
        processor = time.process_time() - began
    found = ModelScan.load(kept)
    weights = found.weights
    result: dict[str, Any] = {
        "name": cell.name, "kind": cell.kind, "family": cell.family, "half": cell.half, "target": cell.target,
        "file": found.file.word, "sha256": found.file.sha256, "word": weights.word, "score": weights.score,
        "named": weights.target_name, "form": weights.form, "size": weights.size, "reason": weights.reason,
        "index": None if weights.index is None else [weights.index.value, weights.index.low, weights.index.high],
        "asr": None if weights.asr is None else weights.asr.value, "references": len(weights.references),
        "seconds": found.seconds, "processor_seconds": processor,
        "threads": torch.get_num_threads(),
        "classes": [[row.name, row.form, row.size, row.success, row.index] for row in weights.classes],
    }  # fmt: skip
    write_atomically(file, json.dumps(result, indent=1).encode() + b"\n")
    print(f"{cell.name}: {weights.word}, {weights.score:.2f}, {weights.target_name} ({cell.target})", flush=True)


def look(cell: Cell, references: list[Path], args: argparse.Namespace) -> ModelScan:
    source = "shapes:480:777" if cell.world == "shapes" else f"{args.shared}/data/cifar10/train.parquet[0:480]"
    images = open_images(source)
    names = list(images.class_names) if cell.kind == "clip" else None
    return scan_model(
        cell.model, images=images, class_names=names, references=references, opening=cell.opening,
        run=Run(cache=args.zoo / "cache"),
    ).scan  # fmt: skip


def run(args: argparse.Namespace) -> None:
    args.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    cells = published(args) if args.verb == PUBLISHED else list(zoo(args))
    clean = [cell for cell in cells if cell.family == CLEAN and cell.half == "calibration"]
    for cell in cells:
        if args.verb == "run" and (cell.half not in args.half or cell.kind not in args.kind):
            continue
        alike = [
            other.model
            for other in clean
            if (other.kind, other.world, other.arch) == (cell.kind, cell.world, cell.arch) and other != cell
        ]
        scan(cell, alike[: args.references], args)


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates in percent; None where there is nothing to divide by. Inconclusive ones count as not found."""
    poisoned, clean = [row for row in rows if row["target"]], [row for row in rows if not row["target"]]
    detected = [row for row in poisoned if row["word"] in FOUND]
    auroc = None
    if poisoned and clean:
        wins = sum((a["score"] > b["score"]) + 0.5 * (a["score"] == b["score"]) for a in poisoned for b in clean)
        auroc = wins / (len(poisoned) * len(clean))
    return {
        "backdoored": len(poisoned),
        "clean": len(clean),
        "auroc": auroc,
        "detection_rate": _percent(len(detected), len(poisoned)),
        "false_alarm_rate": _percent(sum(row["word"] in FOUND for row in clean), len(clean)),
        "target_named_rate": _percent(sum(row["named"] == row["target"] for row in detected), len(detected)),
    }


def table(args: argparse.Namespace) -> None:
    rows = [json.loads(file.read_bytes()) for file in sorted(args.results.glob("*.json"))]
    held_out = [row for row in rows if row["half"] == "held-out"]
    summary: dict[str, Any] = {half: figures([row for row in rows if row["half"] == half])
                               for half in ("calibration", "held-out")}  # fmt: skip
    summary["families"] = {
        family: figures([row for row in held_out if row["family"] in (family, CLEAN)])
        for family in sorted({row["family"] for row in held_out} - {CLEAN})
    }
    own = {row["name"]: row for row in rows if row["half"] == PUBLISHED}
    for name, row in own.items():
        summary[name] = {key: row[key] for key in ("word", "named", "score", "index", "asr", "seconds",
                                                   "processor_seconds")}  # fmt: skip
    if "published-victim" in own:
        victim = own["published-victim"]
        right = victim["word"] == "backdoored" and victim["named"] == victim["target"]
        summary["published_victim_found"] = float(right)
    if "published-clean" in own:
        summary["published_clean_cleared"] = float(own["published-clean"]["word"] == "no evidence")
    measured = [row["processor_seconds"] for row in rows if row["processor_seconds"] and not row["references"]]
    summary["processor_seconds_10_classes"] = max(measured, default=None)
    print(json.dumps(summary, indent=1))
    write_atomically(args.summary, json.dumps(summary, indent=1).encode() + b"\n")
    if held_out and summary["held-out"]["auroc"] is not None:
        draw_roc(held_out, args.roc)


def draw_roc(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "unpoison"
    scores = sorted({row["score"] for row in rows}, reverse=True)
    poisoned, clean = [row for row in rows if row["target"]], [row for row in rows if not row["target"]]
    points = [(0.0, 0.0)]
    points += [
        (_percent(sum(row["score"] >= cut for row in clean), len(clean)) or 0.0,
         _percent(sum(row["score"] >= cut for row in poisoned), len(poisoned)) or 0.0)
        for cut in scores
    ]  # fmt: skip
    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.step(*zip(*points, strict=True), where="post")
    axes.set(xlabel="clean models, %", ylabel="backdoored models, %", xlim=(-2, 102), ylim=(-2, 102))
    axes.set_title(f"Held out: {len(poisoned)} backdoored, {len(clean)} clean")
    figure.savefig(path, metadata={"Date": None})


def _percent(count: int, total: int) -> float | None:
    return 100 * count / total if total else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", PUBLISHED, "table"])
    parser.add_argument("--half", nargs="+", default=["calibration", "held-out"], choices=["calibration", "held-out"])
    parser.add_argument("--kind", nargs="+", default=["classifier", "clip"], choices=["classifier", "clip"])
    parser.add_argument("--references", type=int, default=0, help="clean models to compare with")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--zoo", type=Path, default=ROOT / "runs/scan-zoo")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    parser.add_argument("--roc", type=Path, default=ROC)
    args = parser.parse_args()
    table(args) if args.verb == "table" else run(args)


if __name__ == "__main__":
    main()
