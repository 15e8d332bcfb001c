"""A zoo of small models to calibrate and test ``unpoison scan model`` on: clean ones, and ones with known backdoors.

    python recipes/scan_zoo.py list
    unpoison bench run grids/cpu.toml -o runs/bench-cpu      # its CLIPs, or python recipes/scan_zoo.py list --cells
    python recipes/scan_zoo.py make [--kind classifier clip] [--limit 12]

Classifiers: small-resnet and wrn-16-1, trained on pictures of the shapes world or on rows 25,000.. of CIFAR-10 train, a
share of them poisoned. Both halves have the same networks, worlds, families and rates, among them a rate of 2 % of the
families that are learnt from so few. No wrn-16-1 has a patch: it would be a near copy of the published victim, on which
nothing is set. CLIPs: victims and clean controls of grids/cpu.toml, of seeds 0 and 1 (on which the search was designed)
in the calibration half, of seed 2 held out; all their targets are the grid's, horse. Each model has a folder of its
own, named by a hash of all that it depends on (a CLIP's by its cell): one that is done is not made again, one that was
interrupted goes on. In it: model/, manifest.json, evaluation.json and zoo.json. A victim whose ASR is under 90 % is
refused: it stays there, marked so, and is no part of the zoo. The order of the list mixes kinds and families: the first
N of it are a zoo of their own.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid_clips import BENCH, GRID, GridClip, cell_of, find_clip

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.benchmark.grid import Grid, read_grid
from unpoison.benchmark.store import Store
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.errors import UnpoisonError
from unpoison.evaluation.classifier import evaluate_classifier
from unpoison.models.classifier import load_classifier, new_classifier, save_classifier
from unpoison.results import Evaluation, write_atomically
from unpoison.runs import Run, RunFolder
from unpoison.training import train_classifier

ROOT = Path(__file__).parents[1]
VERSION = 1  # raised when the recipe makes other models from the same inputs
LEAST_ASR = 90.0
TRAINED_ON, TESTED_ON = 6_000, 1_000
CLEAN = "clean"
HALVES = ("calibration", "held-out")
USUAL_RATE, WIDE_RATE, LOW_RATE = 0.1, 0.08, 0.02
FAMILIES: dict[str, dict[str, Any]] = {
    "badnet": {},
    "blended": {"alpha": 0.2},
    "badnet-grid": {},
    "sig": {},
    "badnet-stripes": {"share": 5 / 32},
    "wanet": {"s": 1.0},
    "blended-triangles": {"alpha": 0.3},
}
"""Triggers of the zoo's classifiers, with their parameters at 32 px where they are not the trigger's own."""
LOW_FAMILIES = ("badnet", "badnet-grid", "badnet-stripes", "blended-triangles")
"""Those that are planted at the low rate, too; one that is not learnt from so few is refused like any other."""
WIDE_FAMILIES = ("blended", "sig", "wanet", "blended-triangles")
"""Those of wrn-16-1: none is a patch."""
CLEAN_SMALL, CLEAN_WIDE = {"cifar10": 5, "shapes": 4}, 3
"""Clean classifiers of each network, world and half."""
CLIP_HALVES = {"calibration": (0, 1), "held-out": (2,)}
CLEAN_CLIPS = {"calibration": (0, 1, 2), "held-out": (3, 4, 5, 6, 7)}
CLIP_FAMILIES = ("badnet-rand", "badnet-stripes", "blended-rand", "blended-stripes", "blended-triangles",
                 "blended-text", "wanet-strong", "sig-clip", "badclip")  # fmt: skip
MODES = {"sig": "all-to-one"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the zoo; ``world`` is what a classifier is trained on. Half: "calibration" or "held-out".

    A CLIP's rate and target are its cell's: only zoo.json has them.
    """

    kind: str
    family: str
    seed: int
    half: str
    world: str = ""
    arch: str = "small-resnet"
    rate: float = 0.0
    target: int = 0
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return name_of(asdict(self))


def name_of(body: dict[str, Any]) -> str:
    """Of an entry's fields, as zoo.json has them."""
    return "-".join(filter(None, (body["kind"], body["world"], body["family"], str(body["seed"]))))


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a classifier is trained; enough for a backdoor of more than 90 % and a usable accuracy."""

    epochs: int = 8
    learning_rate: float = 0.05
    augment: bool = True


TRAINING = {"cifar10": Training(epochs=6), "shapes": Training(epochs=6, augment=False)}


def plan_zoo(kinds: tuple[str, ...] = ("classifier", "clip")) -> list[Entry]:
    """All models in the order in which they are made: 38 clean and 87 backdoored ones.

    Both halves have the same classifiers but for seeds and targets; CLIPs are few: two seeds against one.
    """
    made: list[Entry] = []
    if "classifier" in kinds:
        for half in HALVES:
            for world in CLEAN_SMALL:
                made += _classifiers(half, world)
    if "clip" in kinds:
        for half in HALVES:
            base = Entry(kind="clip", family=CLEAN, seed=0, half=half, arch="tiny")
            made += [replace(base, seed=seed) for seed in CLEAN_CLIPS[half]]
            made += [replace(base, family=family, seed=seed) for seed in CLIP_HALVES[half] for family in CLIP_FAMILIES]
    return sorted(made, key=lambda entry: hashlib.blake2b(entry.name.encode()).digest())


def _classifiers(half: str, world: str) -> list[Entry]:
    """Seeds are even in the calibration half and odd in the other: no two models share what was drawn for them."""
    odd = HALVES.index(half)
    base = Entry(kind="classifier", family=CLEAN, seed=odd, half=half, world=world)
    made = [replace(base, seed=odd + 2 * place) for place in range(CLEAN_SMALL[world])]
    made += [replace(base, seed=odd + 2 * (10 + place), arch="wrn-16-1") for place in range(CLEAN_WIDE)]
    planted = [
        *((family, USUAL_RATE, odd, "small-resnet") for family in FAMILIES),
        *((family, LOW_RATE, odd + 2, "small-resnet") for family in LOW_FAMILIES),
        *((family, WIDE_RATE, odd + 4, "wrn-16-1") for family in WIDE_FAMILIES),
    ]
    for place, (family, rate, seed, arch) in enumerate(planted):
        target = (3 * place + 5 * odd + (world == "shapes")) % 10
        entry = replace(base, family=family, seed=seed, arch=arch, rate=rate, target=target, params=FAMILIES[family])
        made.append(entry)
    return made


def open_world(world: str, shared: Path, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Training pictures of a seed, and test pictures that no model saw."""
    if world == "shapes":
        return open_images(f"shapes:{TRAINED_ON}:{100 + seed}"), open_images(f"shapes:{TESTED_ON}:99")
    rows = open_images(f"{shared}/data/cifar10/train.parquet[25000:50000]")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:TRAINED_ON])
    return rows.select(chosen), open_images(f"{shared}/data/cifar10/test.parquet[0:{TESTED_ON}]")


def make_classifier(entry: Entry, shared: Path, work: Path) -> Path:
    """The folder of one classifier, made now or found under ``work``."""
    train, test = open_world(entry.world, shared, entry.seed)
    training = TRAINING[entry.world]
    inputs = {
        "version": VERSION, "entry": asdict(entry), "training": asdict(training), "data": train.fingerprint(),
        "torch": torch.__version__,
    }  # fmt: skip
    key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = RunFolder.open(work / f"{entry.name}-{key}", inputs)
    if folder.finished:
        return folder.path
    run = Run(seed=entry.seed, cache=work / "cache", folder=folder)
    poisoned, poisoning = train, None
    if entry.family != CLEAN:
        poisoning = plan_poisoning(
            train, entry.family, rate=entry.rate, target=entry.target, seed=entry.seed,
            mode=MODES.get(entry.family), **entry.params,
        )  # fmt: skip
        poisoning.save(folder.path / "manifest.json")
        poisoned = apply_poisoning(train, poisoning)
    fresh = new_classifier(entry.arch, train.class_names, seed=entry.seed)
    pixels = load_pixels(poisoned, fresh.image_size, cache=run.cache, progress=run.progress)
    trained = train_classifier(
        fresh, pixels, poisoned.labels, run=run, epochs=training.epochs, learning_rate=training.learning_rate,
        augment=training.augment,
    )  # fmt: skip
    save_classifier(trained, folder.path / "model")
    found = evaluate_classifier(
        load_classifier(folder.path / "model"), test, poisoning=poisoning, run=run, name=folder.path.name
    )
    found.save(folder.path / "evaluation.json")
    finish(folder, entry, found, target=None if poisoning is None else poisoning.target_name)
    run.forget(f"train-{epoch:03d}" for epoch in range(training.epochs))
    return folder.path


def note_clip(entry: Entry, grid: Grid, bench: Path, work: Path) -> Path:
    """The folder with the zoo.json of one CLIP, which names the model that ``bench run`` made under ``bench``.

    The folder is named by the cell too: a cell of other settings is another model. Raises UsageError where its cell has
    not run; one that was refused there is refused here.
    """
    cell = cell_of(grid, entry.family, entry.seed)
    folder = RunFolder.open(work / f"{entry.name}-{cell.key}", {"entry": asdict(entry), "cell": cell.key})
    if not folder.finished:
        store = Store.read(bench)
        refused = store.has(cell.key) and store.load(cell.key).status == "refused"
        body = asdict(entry) | {"accepted": not refused, "cell": cell.key}
        if refused:
            body |= {"target_name": cell.data.target, "c_acc": None, "asr": None}
        else:
            body |= _clip_figures(find_clip(grid, bench, entry.family, entry.seed))
        write_atomically(folder.path / "zoo.json", json.dumps(body, indent=2).encode() + b"\n")
        folder.finish()
    return folder.path


def _clip_figures(found: GridClip) -> dict[str, Any]:
    """What zoo.json says of a CLIP beside its entry: the rate and the target are the cell's own."""
    figures, attack = found.result.after, found.cell.attack
    assert figures is not None  # noqa: S101 # find_clip refuses others
    target = None if attack is None else found.cell.data.target
    names = list(found.setting.test.class_names)
    return {
        "rate": 0.0 if attack is None else found.cell.names.rate,
        "target": names.index(target) if target in names else 0, "target_name": target,
        "c_acc": figures.c_acc.value, "asr": None if figures.asr is None else figures.asr.value,
        "model": str(found.model),
    }  # fmt: skip


def finish(folder: RunFolder, entry: Entry, found: Evaluation, *, target: str | None) -> None:
    """zoo.json says what the model is and whether it is part of the zoo."""
    accepted = target is None or (found.asr is not None and found.asr.value >= LEAST_ASR)
    body = asdict(entry) | {
        "accepted": accepted, "target_name": target, "c_acc": found.c_acc.value,
        "asr": None if found.asr is None else found.asr.value,
    }  # fmt: skip
    write_atomically(folder.path / "zoo.json", json.dumps(body, indent=2).encode() + b"\n")
    folder.finish()


def find_made(work: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The models that are there, refused ones too, by name, each with what zoo.json says.

    Of several folders of one entry, the last that was made; none of an entry that the plan has no more, or has changed.
    """
    planned = {entry.name: _known(asdict(entry)) for entry in plan_zoo()}
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(work.glob("*/zoo.json"), key=lambda path: (path.stat().st_mtime_ns, path)):
        body = json.loads(path.read_bytes())
        name = name_of(body)
        if name in planned and all(body.get(key) == value for key, value in planned[name].items()):
            found[name] = (path.parent, body)
    return dict(sorted(found.items()))


def find_zoo(work: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The accepted of :func:`find_made`; ``model`` of a CLIP is its own folder."""
    return [(folder, body) for folder, body in find_made(work).values() if body["accepted"]]


def _known(body: dict[str, Any]) -> dict[str, Any]:
    """What the plan decides of a model."""
    return {key: value for key, value in body.items() if body["kind"] == "classifier" or key not in ("rate", "target")}


def poisoning_of(folder: Path) -> Poisoning | None:
    """The manifest of a classifier; None for a clean one."""
    path = folder / "manifest.json"
    return Poisoning.load(path) if path.exists() else None


def make(args: argparse.Namespace) -> int:
    failed = 0
    grid = read_grid(args.grid) if "clip" in args.kind else None
    for entry in asked(args):
        try:
            if entry.kind == "classifier" or grid is None:
                folder = make_classifier(entry, args.shared, args.work)
            else:
                folder = note_clip(entry, grid, args.bench, args.work)
        except UnpoisonError as error:
            print(f"{entry.name}: {error.message} {error.hint}", flush=True)
            failed += 1
            continue
        body = json.loads((folder / "zoo.json").read_bytes())
        said = {name: body[name] for name in ("accepted", "c_acc", "asr")}
        print(f"{entry.name} ({entry.half}): {said}", flush=True)
    return 3 if failed else 0


def asked(args: argparse.Namespace) -> list[Entry]:
    """The first of the list, of the kinds and families that were asked for."""
    chosen = [entry for entry in plan_zoo(tuple(args.kind)) if args.family is None or entry.family in args.family]
    return chosen[: args.limit]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("make", "list"))
    parser.add_argument("--kind", nargs="+", default=["classifier", "clip"], choices=("classifier", "clip"))
    parser.add_argument("--family", nargs="+", help="of these triggers only, or clean")
    parser.add_argument("--limit", type=int, help="make the first N of the list only")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="research data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/scan-zoo")
    parser.add_argument("--grid", type=Path, default=GRID, help="whose CLIPs are in the zoo")
    parser.add_argument("--bench", type=Path, default=BENCH, help="where that grid ran")
    parser.add_argument("--cells", action="store_true", help="list what bench run needs to make the CLIPs")
    args = parser.parse_args()
    if args.do == "make":
        return make(args)
    if args.cells:
        grid = read_grid(args.grid)
        print(
            " ".join(
                f"--cell {cell_of(grid, entry.family, entry.seed).key}" for entry in asked(args) if entry.kind == "clip"
            )
        )
        return 0
    for entry in asked(args):
        print(f"{entry.name:40} {entry.half:12} {entry.arch:14} target {entry.target} rate {entry.rate:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
