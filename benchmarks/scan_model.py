"""``unpoison scan model`` on the zoo and on the published models: AUROC, false alarms, detection, target named, time.

    python recipes/scan_zoo.py make        # first: the models, under runs/scan-zoo and runs/bench-cpu
    python benchmarks/scan_model.py run --half calibration [--kind classifier] [--references 2]
    python benchmarks/scan_model.py calibrate  # thresholds that the calibration half speaks for; set them by hand
    python benchmarks/scan_model.py run [--references 2]
    python benchmarks/scan_model.py published  # the published victim and the published clean ResNet-20
    python benchmarks/scan_model.py time       # on two idle cores: minutes of a clock for ten classes
    python benchmarks/scan_model.py table      # scan_model.json, the table in docs/scan_model.md and the ROC

Images to search on are rows 0..479 of CIFAR-10 train, which no classifier of the zoo saw, or pictures of the shapes
world of another seed. Each scan is kept whole under runs/scan-zoo/scans, and its figures in one JSON under
benchmarks/results/scan_model, with the hashes of all that it depends on: a scan is repeated only where one of them is
another. References are clean models of the calibration half, of the same kind, world and network, never the scanned
model itself. Nothing is set on the published models or on the held-out half. Figures are of what is there: the table
says how many models that is, and names the families that are weak: NOT_COVERED in unpoison.api_models has to say them.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scan_model_figures import choose_thresholds, draw_roc, families_table, figures, weak_families, write_table

from unpoison import __version__
from unpoison.api_models import ModelScanConfig, files_of, scan_model
from unpoison.data.sources import open_images
from unpoison.detection.model_files import hash_files
from unpoison.model_results import ModelScan
from unpoison.models.any_model import Opening
from unpoison.results import write_atomically
from unpoison.runs import Run

ROOT = Path(__file__).parents[1]
RESULTS, SUMMARY = ROOT / "benchmarks/results/scan_model", ROOT / "benchmarks/results/scan_model.json"
ROC, PAGE = ROOT / "docs/scan_model_roc.svg", ROOT / "docs/scan_model.md"
CLEAN, PUBLISHED = "clean", "published"
TIMES, THRESHOLDS = "scan_model_time.json", "scan_model_thresholds.json"
sys.path.append(str(ROOT / "recipes"))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model: ``target`` is the name of the true target, None for a clean one."""

    name: str
    model: Path | str
    kind: str
    family: str
    half: str
    world: str = "cifar10"
    arch: str = ""
    target: str | None = None
    opening: Opening = Opening()  # noqa: RUF009 # frozen


def zoo(args: argparse.Namespace) -> Iterator[Cell]:
    """The accepted models that are there."""
    from scan_zoo import find_zoo, name_of  # pyright: ignore[reportMissingImports]

    for folder, body in find_zoo(args.zoo):
        yield Cell(
            name=name_of(body), model=Path(body.get("model", folder / "model")), kind=body["kind"],
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


def inputs_of(cell: Cell, references: list[Path | str], source: str) -> dict[str, Any]:
    """All that a scan depends on but the machine: another value of any of them is another scan."""
    config = json.dumps(asdict(ModelScanConfig()), sort_keys=True).encode()
    return {
        "unpoison": __version__, "model": hash_files(files_of(cell.model)),
        "references": sorted(hash_files(files_of(path)) for path in references),
        "config": hashlib.blake2b(config, digest_size=8).hexdigest(), "images": open_images(source).fingerprint(),
        "opening": hashlib.blake2b(repr(cell.opening).encode(), digest_size=8).hexdigest(), "seed": Run().seed,
    }  # fmt: skip


def scan(cell: Cell, references: list[Path | str], args: argparse.Namespace) -> None:
    """One file of figures, made where there is none or where it was made from other inputs."""
    file, inputs = args.results / f"{cell.name}.json", inputs_of(cell, references, source_of(cell, args))
    if file.exists() and json.loads(file.read_bytes()).get("inputs") == inputs:
        return
    key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=8).hexdigest()
    kept, timed = args.zoo / "scans" / f"{cell.name}-{key}.json", args.zoo / "scans" / f"{cell.name}-{key}-time.json"
    if not (kept.exists() and timed.exists()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        began = time.process_time()
        look(cell, references, args).save(kept)
        took = {"processor_seconds": time.process_time() - began, "threads": torch.get_num_threads()}
        write_atomically(timed, json.dumps(took).encode())
    found = ModelScan.load(kept)
    weights = found.weights
    result: dict[str, Any] = {
        "name": cell.name, "kind": cell.kind, "family": cell.family, "half": cell.half, "target": cell.target,
        "inputs": inputs,
        "file": found.file.word, "sha256": found.file.sha256, "word": weights.word, "score": weights.score,
        "named": weights.target_name, "form": weights.form, "size": weights.size, "reason": weights.reason,
        "index": None if weights.index is None else [weights.index.value, weights.index.low, weights.index.high],
        "asr": None if weights.asr is None else weights.asr.value, "references": len(weights.references),
        "seconds": found.seconds, **json.loads(timed.read_bytes()),
        "classes": [[row.name, row.form, row.size, row.success, row.index, row.reference_index]
                    for row in weights.classes],
    }  # fmt: skip
    write_atomically(file, json.dumps(result, indent=1).encode() + b"\n")
    print(f"{cell.name}: {weights.word}, {weights.score:.2f}, {weights.target_name} ({cell.target})", flush=True)


def source_of(cell: Cell, args: argparse.Namespace) -> str:
    return "shapes:480:777" if cell.world == "shapes" else f"{args.shared}/data/cifar10/train.parquet[0:480]"


def look(cell: Cell, references: list[Path | str], args: argparse.Namespace, cache: Path | None = None) -> ModelScan:
    images = open_images(source_of(cell, args))
    names = list(images.class_names) if cell.kind == "clip" else None
    return scan_model(
        cell.model, images=images, class_names=names, references=references, opening=cell.opening,
        run=Run(cache=cache or args.zoo / "cache"),
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


def measure_time(args: argparse.Namespace) -> None:
    """Wall seconds of ten classes without references, for a classifier of each network and the bundled tiny CLIP."""
    torch.set_num_threads(args.threads)
    tiny = Cell(name="tiny-clip", model="tiny", kind="clip", family=CLEAN, half=PUBLISHED)
    load, rows = os.getloadavg()[0], {}
    for cell in (*published(args), tiny):
        with tempfile.TemporaryDirectory() as folder:
            began, processor = time.perf_counter(), time.process_time()
            look(cell, [], args, Path(folder))
            rows[cell.name] = {
                "seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor,
            }  # fmt: skip
        print(f"{cell.name}: {rows[cell.name]['seconds']:.0f} s by the clock", flush=True)
    body = {"threads": args.threads, "load_before": load, "unpoison": __version__, "models": rows}
    write_atomically(args.summary.parent / TIMES, json.dumps(body, indent=1).encode() + b"\n")


def read_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of the models of the zoo as it is planned now, and of the published ones."""
    from scan_zoo import plan_zoo  # pyright: ignore[reportMissingImports]

    known = {entry.name for entry in plan_zoo()} | {cell.name for cell in published(args)}
    rows = [json.loads(file.read_bytes()) for file in sorted(args.results.glob("*.json"))]
    return [row for row in rows if row["name"] in known]


def calibrate(args: argparse.Namespace) -> None:
    """The held-out half and the published models are not so much as read."""
    files = sorted(args.results.glob("*.json"))
    rows = [row for row in map(json.loads, (file.read_bytes() for file in files)) if row["half"] == "calibration"]
    chosen = choose_thresholds(rows, ModelScanConfig().weights.anomaly)
    print(json.dumps(chosen, indent=1))
    write_atomically(args.summary.parent / THRESHOLDS, json.dumps(chosen, indent=1).encode() + b"\n")


def table(args: argparse.Namespace) -> None:
    rows = read_rows(args)
    held_out = [row for row in rows if row["half"] == "held-out"]
    summary: dict[str, Any] = {half: figures([row for row in rows if row["half"] == half])
                               for half in ("calibration", "held-out")}  # fmt: skip
    summary["families"] = {
        family: figures([row for row in held_out if row["family"] in (family, CLEAN)])
        for family in sorted({row["family"] for row in held_out} - {CLEAN})
    }
    summary["weak_families"] = weak_families(summary)
    summary["references"] = sorted({row["references"] for row in held_out})
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
    times = args.summary.parent / TIMES
    timed = json.loads(times.read_bytes())["models"] if times.exists() else {}
    summary["seconds_10_classes"] = max((row["seconds"] for row in timed.values()), default=None)
    summary["processor_seconds_10_classes"] = max((row["processor_seconds"] for row in timed.values()), default=None)
    print(json.dumps(summary, indent=1))
    write_atomically(args.summary, json.dumps(summary, indent=1).encode() + b"\n")
    if held_out and summary["held-out"]["auroc"] is not None:
        draw_roc(held_out, args.roc)
        write_table(args.page, families_table(summary, args.roc.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", PUBLISHED, "calibrate", "time", "table"])
    parser.add_argument("--half", nargs="+", default=["calibration", "held-out"], choices=["calibration", "held-out"])
    parser.add_argument("--kind", nargs="+", default=["classifier", "clip"], choices=["classifier", "clip"])
    parser.add_argument("--references", type=int, default=0, help="clean models to compare with")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--zoo", type=Path, default=ROOT / "runs/scan-zoo")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    parser.add_argument("--roc", type=Path, default=ROC)
    parser.add_argument("--page", type=Path, default=PAGE, help="whose table of the zoo is written anew")
    args = parser.parse_args()
    {"table": table, "calibrate": calibrate, "time": measure_time}.get(args.verb, run)(args)


if __name__ == "__main__":
    main()
