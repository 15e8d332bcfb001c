"""``unpoison scan model`` on the zoo and on the published models: AUROC, false alarms, detection, target named, time.

    python recipes/scan_zoo.py make        # first: the models, under runs/scan-zoo and runs/bench-cpu
    python benchmarks/scan_model.py run --half calibration [--kind classifier]
    python benchmarks/scan_model.py calibrate      # thresholds that the calibration half speaks for; set them by hand
    python benchmarks/scan_model.py run            # all of the zoo, on real images
    python benchmarks/scan_model.py run --made-up  # the same without images, as users who give none
    python benchmarks/scan_model.py run --encoder  # its CLIPs without class names, by DECREE
    python benchmarks/scan_model.py published      # the published victim and the published clean ResNet-20
    python benchmarks/scan_model.py time           # on two idle cores: minutes of a clock for ten classes
    python benchmarks/scan_model.py table          # scan_model.json, the table in docs/scan_model.md and the ROC

Images to search on are rows 5,000..5,479 of CIFAR-10 test, which no model of the zoo saw, or pictures of the shapes
world of another seed. Each model is compared with two clean ones of the calibration half, of the same kind, world and
network, never with itself; the zoo has no clean ResNet-20, so the published one stands beside small-resnets. Each scan
is kept whole under runs/scan-zoo/scans, and what it found in one JSON under benchmarks/results/scan_model, with hashes
of all that the search depends on: it is repeated only where one of them is another. Thresholds are none of them: words,
scores and figures are made from what was found, by the function that gives users their verdict. Nothing is set on the
published models or on the held-out half. The families that are weak go into the package's scan_model_measured.json,
which scans quote.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scan_model_figures import (
    MODES,
    check_alike,
    choose_thresholds,
    draw_roc,
    judged,
    measured,
    summarize,
    write_table,
    zoo_table,
)

from unpoison.api_models import ModelScanConfig, files_of, scan_model
from unpoison.data.sources import LabelledImages, open_images
from unpoison.detection.model_files import hash_files
from unpoison.detection.model_weights import search_inputs
from unpoison.model_results import ModelScan
from unpoison.models.any_model import Opening
from unpoison.results import write_atomically
from unpoison.runs import Run

ROOT = Path(__file__).parents[1]
RESULTS, SUMMARY = ROOT / "benchmarks/results/scan_model", ROOT / "benchmarks/results/scan_model.json"
ROC, PAGE = ROOT / "docs/scan_model_roc.svg", ROOT / "docs/scan_model.md"
MEASURED = ROOT / "src/unpoison/assets/scan_model_measured.json"
CLEAN, PUBLISHED = "clean", "published"
REFERENCES = 2
PROBE = {"cifar10": "{}/data/cifar10/test.parquet[5000:5480]", "shapes": "shapes:480:777"}
TIMES, THRESHOLDS = "scan_model_time.json", "scan_model_thresholds.json"
sys.path.append(str(ROOT / "recipes"))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model: ``target`` is the name of the true target, None for a clean one. ``beside``: network of its
    references, where it is not its own."""

    name: str
    model: Path | str
    kind: str
    family: str
    half: str
    world: str = "cifar10"
    arch: str = ""
    target: str | None = None
    beside: str = ""
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
            family="badnet", half=PUBLISHED, arch="wrn-16-1", target="airplane",
            opening=Opening(arch="wrn-16-1", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        ),
        Cell(
            name="published-clean", model=models / "resnet20_cifar10_clean.th", kind="classifier", family=CLEAN,
            half=PUBLISHED, arch="resnet20", beside="small-resnet",
            opening=Opening(arch="resnet20:resnet20", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ),
    ]  # fmt: skip


def references_of(cell: Cell, clean: Sequence[Cell]) -> list[Path | str]:
    """REFERENCES clean models of the calibration half, the first by name. Raises SystemExit where there are fewer."""
    alike = (cell.kind, cell.world, cell.beside or cell.arch)
    found = [
        other.model
        for other in sorted(clean, key=lambda other: other.name)
        if (other.kind, other.world, other.arch) == alike and other.name != cell.name
    ]
    if len(found) < REFERENCES:
        raise SystemExit(f"{cell.name}: {len(found)} clean references of {alike}, {REFERENCES} needed: make the zoo.")
    return found[:REFERENCES]


def inputs_of(cell: Cell, references: list[Path | str], images: LabelledImages | None) -> dict[str, Any]:
    """All that a search depends on but the machine: another value of any of them is another scan."""
    config = ModelScanConfig().weights
    search: dict[str, Any] = search_inputs(config) | {"encoder": [config.decree.backdoored, config.reference_share]}
    return {
        "search": hashlib.blake2b(json.dumps(search, sort_keys=True).encode(), digest_size=8).hexdigest(),
        "model": hash_files(files_of(cell.model)),
        "references": sorted(hash_files(files_of(path)) for path in references),
        "images": "made up" if images is None else images.fingerprint(),
        "opening": hashlib.blake2b(repr(cell.opening).encode(), digest_size=8).hexdigest(), "seed": Run().seed,
    }  # fmt: skip


def scan(cell: Cell, references: list[Path | str], args: argparse.Namespace, mode: str = MODES[0]) -> None:
    """One file of what was found, made where there is none or where it was made from other inputs."""
    inputs = inputs_of(cell, references, images_of(cell, args, mode))
    name = cell.name if mode == MODES[0] else f"{cell.name}.{mode}"
    file = args.results / f"{name}.json"
    if file.exists() and json.loads(file.read_bytes()).get("inputs") == inputs:
        return
    key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=8).hexdigest()
    kept, timed = args.zoo / "scans" / f"{name}-{key}.json", args.zoo / "scans" / f"{name}-{key}-time.json"
    if not (kept.exists() and timed.exists()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        began = time.process_time()
        look(cell, references, args, mode=mode).save(kept)
        took = {"processor_seconds": time.process_time() - began, "threads": torch.get_num_threads()}
        write_atomically(timed, json.dumps(took).encode())
    row = row_of(cell, mode, inputs, ModelScan.load(kept)) | json.loads(timed.read_bytes())
    write_atomically(file, json.dumps(row, indent=1).encode() + b"\n")
    found = judged(row, ModelScanConfig().weights.anomaly)
    print(f"{name}: {found['word']}, {found['score']:.2f}, {found['named']} ({cell.target})", flush=True)


def row_of(cell: Cell, mode: str, inputs: dict[str, Any], found: ModelScan) -> dict[str, Any]:
    """What is kept of a scan. Its word and score count only where no classes were searched (DECREE, not opened)."""
    weights = found.weights
    return {
        "name": cell.name, "mode": mode, "kind": cell.kind, "family": cell.family, "half": cell.half,
        "target": cell.target, "inputs": inputs, "file": found.file.word, "sha256": found.file.sha256,
        "word": weights.word, "score": weights.score, "named": weights.target_name, "form": weights.form,
        "size": weights.size, "reason": weights.reason,
        "asr": None if weights.asr is None else weights.asr.value, "references": len(inputs.get("references", ())),
        "covered": weights.covered, "made_up": weights.made_up, "seconds": found.seconds,
        "classes": [[row.name, row.form, row.size, row.success] for row in weights.classes],
        "reference_classes": [[row.form, row.size, row.success] for row in weights.reference_classes],
        "waves": [asdict(wave) for wave in weights.waves],
    }  # fmt: skip


def images_of(cell: Cell, args: argparse.Namespace, mode: str) -> LabelledImages | None:
    return None if mode == "made-up" else open_images(PROBE[cell.world].format(args.shared))


def look(
    cell: Cell, references: list[Path | str], args: argparse.Namespace, cache: Path | None = None, mode: str = MODES[0]
) -> ModelScan:
    images = images_of(cell, args, mode)
    names = None
    if cell.kind == "clip":  # without any, a CLIP is an encoder
        named = mode != "encoder"
        names = list(open_images(PROBE[cell.world].format(args.shared)).class_names) if named else []
    return scan_model(
        cell.model, images=images, class_names=names, references=references, opening=cell.opening,
        run=Run(cache=cache or args.zoo / "cache"),
    ).scan  # fmt: skip


def run(args: argparse.Namespace) -> None:
    args.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    there = list(zoo(args))
    clean = [cell for cell in there if cell.family == CLEAN and cell.half == "calibration"]
    for cell in published(args) if args.verb == PUBLISHED else there:
        if args.verb == "run" and (cell.half not in args.half or cell.kind not in args.kind):
            continue
        if args.mode == "encoder" and cell.kind != "clip":
            continue
        scan(cell, references_of(cell, clean), args, args.mode)


def measure_time(args: argparse.Namespace) -> None:
    """Wall seconds of ten classes without references: a backdoored and a clean classifier, the bundled tiny CLIP, and
    the first backdoored CLIP of the zoo where it is there: squares of a backdoor are searched longer."""
    torch.set_num_threads(args.threads)
    tiny = Cell(name="tiny-clip", model="tiny", kind="clip", family=CLEAN, half=PUBLISHED)
    planted = [cell for cell in zoo(args) if cell.kind == "clip" and cell.target is not None][:1]
    load, rows = os.getloadavg()[0], {}
    for cell in (*published(args), tiny, *planted):
        with tempfile.TemporaryDirectory() as folder:
            began, processor = time.perf_counter(), time.process_time()
            look(cell, [], args, Path(folder))
            rows[cell.name] = {
                "seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor,
            }  # fmt: skip
        print(f"{cell.name}: {rows[cell.name]['seconds']:.0f} s by the clock", flush=True)
    body = {"threads": args.threads, "load_before": load, "models": rows}
    write_atomically(args.summary.parent / TIMES, json.dumps(body, indent=1).encode() + b"\n")


def read_rows(args: argparse.Namespace, halves: Sequence[str]) -> list[dict[str, Any]]:
    """What was found of these halves. SystemExit where it was not all found by the same search on the same images."""
    rows = [json.loads(file.read_bytes()) for file in sorted(args.results.glob("*.json"))]
    rows = [row for row in rows if row["half"] in halves]
    try:
        check_alike(rows)
    except ValueError as error:
        raise SystemExit(f"{error}") from error
    return rows


def calibrate(args: argparse.Namespace) -> None:
    """The held-out half and the published models are not so much as looked at."""
    rows = [row for row in read_rows(args, ["calibration"]) if row["mode"] == MODES[0]]
    chosen = choose_thresholds(rows, ModelScanConfig().weights.anomaly)
    print(json.dumps(chosen, indent=1))
    write_atomically(args.summary.parent / THRESHOLDS, json.dumps(chosen, indent=1).encode() + b"\n")


def table(args: argparse.Namespace) -> None:
    from scan_zoo import find_made, plan_zoo  # pyright: ignore[reportMissingImports]

    planned, config = {entry.name: asdict(entry) for entry in plan_zoo()}, ModelScanConfig().weights
    rows = [row for row in read_rows(args, ["calibration", "held-out", PUBLISHED])
            if row["name"] in planned or row["half"] == PUBLISHED]  # fmt: skip
    refused = [body for _, body in find_made(args.zoo).values() if not body["accepted"]]
    summary = summarize(rows, list(planned.values()), refused, config.anomaly)
    times = args.summary.parent / TIMES
    timed = json.loads(times.read_bytes())["models"] if times.exists() else {}
    summary["seconds_10_classes"] = max((row["seconds"] for row in timed.values()), default=None)
    summary["processor_seconds_10_classes"] = max((row["processor_seconds"] for row in timed.values()), default=None)
    print(json.dumps(summary, indent=1))
    write_atomically(args.summary, json.dumps(summary, indent=1).encode() + b"\n")
    held_out = [row for row in rows if row["half"] == "held-out" and row["mode"] == MODES[0]]
    if held_out and summary["held-out"]["auroc"] is not None:
        draw_roc([judged(row, config.anomaly) for row in held_out], args.roc)
        write_table(args.page, zoo_table(summary, args.roc.name))
        write_atomically(args.measured, json.dumps(measured(rows, config), indent=1).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", PUBLISHED, "calibrate", "time", "table"])
    parser.add_argument("--half", nargs="+", default=["calibration", "held-out"], choices=["calibration", "held-out"])
    parser.add_argument("--kind", nargs="+", default=["classifier", "clip"], choices=["classifier", "clip"])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--made-up", dest="mode", action="store_const", const="made-up", help="without images")
    how.add_argument("--encoder", dest="mode", action="store_const", const="encoder", help="CLIPs without class names")
    parser.set_defaults(mode=MODES[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--zoo", type=Path, default=ROOT / "runs/scan-zoo")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    parser.add_argument("--roc", type=Path, default=ROC)
    parser.add_argument("--page", type=Path, default=PAGE, help="whose table of the zoo is written anew")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="the package's own record of the figures")
    args = parser.parse_args()
    {"table": table, "calibrate": calibrate, "time": measure_time}.get(args.verb, run)(args)


if __name__ == "__main__":
    main()
