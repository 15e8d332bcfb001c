"""Repairs of backdoored CLIPs: attack x seed x {none, fine-tuning, CleanCLIP, PAR, ours}, one JSON a cell.

    python recipes/clip_victims.py make --seed 0 1 2        # first: the victims, under runs/clip-victims
    python benchmarks/par.py run [--attack wanet ...] [--seed 0 ...] [--method par ours ...]
    python benchmarks/par.py run --set tune --seed 9 --variant frozen frozen-relations ...
    python benchmarks/par.py table [--set tune]
    python benchmarks/par.py frontier [--attack badnet-stripes] [--seed 0]

Every method gets the same clean pairs (rows 0..24,999 of CIFAR-10 train with captions from templates, and Flickr8k
train), the same steps and the same batch; its rate is what its own scaling rule says. All rates are of rows 0..4,999 of
CIFAR-10 test and of Flickr8k test. ``--set tune`` measures rows 45,000.. of CIFAR-10 train and Flickr8k validation
instead, which nothing else uses: variants of "ours" are compared there, on victims of a seed that the table lacks.
Variants that end in "-made-up" get pictures of the shapes world instead, which show none of the classes.
Rebound: the same again after an epoch of plain fine-tuning on rows 25,000..29,999, as the next owner would do.
A cell that is done is not computed again; one that was interrupted goes on. One thread a process. Where the processor
has bfloat16, ACCELERATE_MIXED_PRECISION=bf16 saves two fifths of the time; a cell says which it was.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from par_aligned import aligned_distances
from par_tables import at, plot, print_table, read_results, summary
from par_variants import KNOBS, METHODS, VARIANTS, Variant

from unpoison.api_clip import (
    ClipPurifyOutcome,
    count_parameters,
    purify_with_clean_clip,
    purify_with_fine_tuning,
    purify_with_par,
)
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.prompts import TEMPLATES
from unpoison.clip_training import PairTrainingConfig
from unpoison.data.pairs import ImageTextPairs, join_pairs, open_pairs, pairs_of_labels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.clean_clip import CleanClipConfig
from unpoison.defenses.baselines.fine_tuning import FineTuningConfig
from unpoison.defenses.par import PARConfig
from unpoison.evaluation.clip import evaluate_clip, rebound
from unpoison.models.clip_files import load_any_clip
from unpoison.report.html import write_report
from unpoison.report.runs import read_run
from unpoison.results import ClipEvaluation, write_atomically
from unpoison.runs import Run, RunFolder, Silent
from unpoison.types import ImageTextModel

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/par"
SUMMARY = ROOT / "benchmarks/results/par.json"
FRONTIER = ROOT / "benchmarks/results/par_frontier.json"
PLOT = ROOT / "docs/par_frontier.svg"
CLEAN = "clean"
ATTACKS = ("badnet-rand", "badnet-stripes", "blended-rand", "blended-stripes", "blended-triangles", "blended-text",
           "wanet", "badclip", CLEAN)  # fmt: skip
MORE = ("sig",)
"""Beside the eight: what the search before the repair misses."""
STEPS, BATCH = 200, 128
SETS = {"test": ("cifar10/test.parquet[0:5000]", "flickr8k/test.parquet"),
        "tune": ("cifar10/train.parquet[45000:50000]", "flickr8k/validation.parquet")}  # fmt: skip


class Printed(Silent):
    """What methods log, without the progress between."""

    def log(self, message: str) -> None:
        print(f"  {message}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Clean pairs to repair on, images and captions to measure on, and pairs for the rebound."""

    pairs: ImageTextPairs
    made_up: ImageTextPairs
    images: LabelledImages
    retrieval: ImageTextPairs
    later: ImageTextPairs

    @classmethod
    def open(cls, shared: Path, which: str, limit: int | None) -> "Data":
        folder = shared / "data"
        images, retrieval = (f"{folder}/{source}" for source in SETS[which])
        labelled = pairs_of_labels(open_images(f"{folder}/cifar10/train.parquet[0:25000]", limit=limit), TEMPLATES)
        return cls(
            pairs=join_pairs(
                {"cifar10": labelled, "flickr8k": open_pairs(folder / "flickr8k/train.parquet", limit=limit)}
            ),
            made_up=open_pairs("shapes:25000:1", limit=limit),
            images=open_images(images, limit=limit),
            retrieval=open_pairs(retrieval, limit=limit),
            later=pairs_of_labels(open_images(f"{folder}/cifar10/train.parquet[25000:30000]", limit=limit), TEMPLATES),
        )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A victim and a way to repair it; ``label`` is the method's or the variant's name."""

    attack: str
    seed: int
    label: str
    variant: Variant | None
    victim: Path
    data: Data
    args: argparse.Namespace

    def compute(self) -> dict[str, Any]:
        name = f"{self.attack}-{self.seed}-{self.label}"
        made = json.loads((self.victim / "victim.json").read_bytes())
        inputs = {"victim": made["fingerprint"], "variant": self.variant and asdict(self.variant),
                  "steps": self.args.steps, "batch": self.args.batch,
                  "pairs": self.pairs.caption_fingerprint}  # fmt: skip
        key = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=4).hexdigest()
        folder = RunFolder.open(self.args.work / f"{name}-{key}", inputs)
        run = Run(seed=self.seed, progress=Printed(), cache=self.args.work / "cache", folder=folder)
        manifest = self.victim / "manifest.json"
        poisoning = PairPoisoning.load(manifest) if manifest.exists() else None
        suspect = load_any_clip(self.victim / "model")

        def evaluate(clip: ImageTextModel, *, whole: bool) -> ClipEvaluation:
            return evaluate_clip(
                clip,
                self.data.images,
                poisoning=poisoning,
                retrieval=self.data.retrieval if whole else None,
                suspect=suspect if whole else None,
                run=run,
                name=name,
            )

        result: dict[str, Any] = {
            "attack": self.attack, "seed": self.seed, "method": self.label, "set": self.args.set, **inputs,
            "accepted_victim": made["accepted"], "threads": torch.get_num_threads(),
            "precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        }  # fmt: skip
        if self.variant is None:
            return result | {"after": figures(self.given(lambda: evaluate(suspect, whole=True), name))}
        begun = time.time()
        outcome = self.repair(suspect, run)
        seconds = {"repair": time.time() - begun}
        repaired = blend(outcome.clip, suspect, self.variant.suspect_share)
        found = outcome.purification
        result["purification"] = {
            "config": found.config, "accepted": found.accepted, "reason": found.reason, "stopped": found.stopped,
            "steps": found.steps, "held_out_before": found.held_out_before, "held_out_after": found.held_out_after,
            "history": found.history,
        }  # fmt: skip
        before = self.given(lambda: evaluate(suspect, whole=True), name)
        after = evaluate(repaired, whole=True)
        replace(found, before=before, after=after).save(self.report)
        result["after"] = figures(after)
        if not self.args.no_rebound:
            later = replace(run, folder=RunFolder.open(folder.path / "rebound", {}))

            def fine_tune(clip: ImageTextModel, pairs: ImageTextPairs) -> ImageTextModel:
                config = self.config(FineTuningConfig, clip, epochs=1)
                return purify_with_fine_tuning(clip, pairs, config=config, run=later).clip

            again = rebound(repaired, self.data.later, fine_tune, evaluate=partial(evaluate, whole=False), before=after)
            result["rebound"] = figures(again.after)
        repaired.save(folder.path / "model")
        for file in folder.path.rglob("steps/*.safetensors"):  # large, and no longer needed
            file.unlink()
        return result | {"seconds": seconds | {"all": time.time() - begun}}

    @property
    def report(self) -> Path:
        """What ``unpoison report`` reads of this repair."""
        return self.args.work / f"{self.args.set}-{self.attack}-{self.seed}-{self.label}.json"

    def given(self, evaluate: Callable[[], ClipEvaluation], name: str) -> ClipEvaluation:
        """The evaluation of the victim, made once for all repairs of it."""
        file = self.args.work / f"{self.args.set}-given-{self.victim.name}.json"
        if not file.exists():
            replace(evaluate(), model=name.rpartition("-")[0]).save(file)
        return ClipEvaluation.load(file)

    def repair(self, suspect: ImageTextModel, run: Run) -> ClipPurifyOutcome:
        assert self.variant is not None  # noqa: S101 # the caller has looked
        more = {"steps": self.args.steps, "batch_size": self.args.batch, **self.variant.config}
        pairs = self.pairs
        if self.variant.method == "par":
            with aligned_distances() if self.variant.aligned else nullcontext():
                return purify_with_par(suspect, pairs, config=self.config(PARConfig, suspect, **more), run=run)
        if self.variant.method == "clean-clip":
            return purify_with_clean_clip(suspect, pairs, config=self.config(CleanClipConfig, suspect, **more), run=run)
        return purify_with_fine_tuning(suspect, pairs, config=self.config(FineTuningConfig, suspect, **more), run=run)

    @property
    def pairs(self) -> ImageTextPairs:
        """What it is repaired on."""
        return self.data.made_up if self.variant is not None and self.variant.made_up else self.data.pairs

    def config(self, kind: Any, clip: ImageTextModel, **more: Any) -> Any:
        pairs = self.data.later if "epochs" in more else self.pairs
        made: PairTrainingConfig = kind.scaled(parameters=count_parameters(clip), samples=len(pairs), **more)
        factor = self.variant.rate if self.variant is not None and "epochs" not in more else 1.0
        return replace(made, learning_rate=made.learning_rate * factor)


def figures(found: ClipEvaluation) -> dict[str, Any]:
    """What the table shows, with numbers of samples and intervals where there are any."""
    kept = ("c_acc", "asr", "asr_floor", "asr_excess", "ra", "retrieval_asr", "retrieval_asr_floor", "drift")
    body = {name: getattr(found, name) for name in kept}
    body |= {"image_to_text": found.image_to_text, "text_to_image": found.text_to_image}
    return {name: value if value is None or isinstance(value, float) else asdict(value) for name, value in body.items()}


def blend(clip: ImageTextModel, suspect: ImageTextModel, share: float) -> ImageTextModel:
    """Weights (1 - share) of ``clip`` + share of ``suspect``."""
    if share == 0:
        return clip
    mixed, old = clip.copy(), suspect.module.state_dict()
    state = mixed.module.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = torch.lerp(value.float(), old[name].to(value.device).float(), share).to(value.dtype)
    mixed.module.load_state_dict(state)
    return mixed


def find_victim(folder: Path, attack: str, seed: int) -> Path | None:
    """The accepted victim of this name, the newest where there are several."""
    found = []
    for file in folder.glob(f"{attack}-{seed}-*/victim.json"):
        summary = json.loads(file.read_bytes())
        if (summary["attack"], summary["seed"], summary["accepted"]) == (attack, seed, True):
            found.append(file)
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def cells(args: argparse.Namespace, wanted: dict[str, Variant | None]) -> Iterator[tuple[Path, Cell]]:
    """Those that are not done, with the file that each goes to."""
    data = None
    for seed in args.seed:
        for attack in args.attack:
            victim = find_victim(args.victims, attack, seed)
            if victim is None:
                print(f"{attack} {seed}: no accepted victim under {args.victims}", flush=True)
                continue
            for label, variant in wanted.items():
                file = args.results / f"{args.set}-{attack}-{seed}-{label}.json"
                if not file.exists():
                    data = data or Data.open(args.shared, args.set, args.limit)
                    print(f"{attack} {seed} {label}", flush=True)
                    yield (
                        file,
                        Cell(
                            attack=attack, seed=seed, label=label, variant=variant, victim=victim, data=data, args=args
                        ),
                    )


def compute(args: argparse.Namespace, wanted: dict[str, Variant | None]) -> None:
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    for file, cell in cells(args, wanted):
        result = cell.compute()
        write_atomically(file, json.dumps(result, indent=1, default=float).encode() + b"\n")
        print(f"  {describe(result['after'])}", flush=True)


def run(args: argparse.Namespace) -> None:
    wanted: dict[str, Variant | None] = {name: METHODS[name] for name in args.method}
    compute(args, wanted | {name: VARIANTS[name] for name in args.variant})


def describe(after: dict[str, Any]) -> str:
    names = {"C-Acc": "c_acc", "ASR": "asr", "floor": "asr_floor", "RA": "ra"}
    shown = [f"{name} {after[key]['value']:.1f}" for name, key in names.items() if after[key] is not None]
    return "  ".join(shown)


def table(args: argparse.Namespace) -> None:
    """Mean and spread over seeds as Markdown; what is claimed as JSON."""
    results = read_results(args.results, args.set)
    print_table(results, list(METHODS))
    if args.set == "test":
        write_atomically(SUMMARY, json.dumps(summary(results, list(METHODS)), indent=1).encode() + b"\n")


def frontier(args: argparse.Namespace) -> None:
    """C-Acc and excess ASR while each method's knob turns: JSON, a plot, and for each attack and seed a report."""
    args.no_rebound = True
    args.results = args.results / "frontier"
    wanted: dict[str, Variant | None] = {"none": None}
    for name, turned in KNOBS.items():
        wanted |= {f"{name}-{place}": variant for place, variant in enumerate(turned)}
    compute(args, wanted)
    points: dict[str, list[dict[str, Any]]] = {}
    for row in read_results(args.results, args.set):
        if row["attack"] in args.attack and row["seed"] in args.seed:
            after = row["after"]
            points.setdefault(row["method"].rpartition("-")[0] or "none", []).append({
                "attack": row["attack"], "seed": row["seed"], "variant": row["variant"],
                "c_acc": after["c_acc"]["value"], "asr_excess": after["asr_excess"], "ra": at(after, "ra", "value"),
            })  # fmt: skip
    write_atomically(FRONTIER, json.dumps(points, indent=1).encode() + b"\n")
    plot(points, PLOT)
    for attack, seed in ((attack, seed) for attack in args.attack for seed in args.seed):
        names = [f"{args.set}-{attack}-{seed}-{label}.json" for label in wanted]
        files = [args.work / name for name in names if (args.work / name).exists()]
        if files:
            write_report(args.work / f"frontier-{attack}-{seed}.html", [read_run(file) for file in files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table", "frontier"])
    parser.add_argument("--attack", nargs="+", choices=[*ATTACKS, *MORE])
    parser.add_argument("--seed", nargs="+", type=int)
    parser.add_argument(
        "--method", nargs="*", choices=list(METHODS), help="default: all, none where --variant is given"
    )
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=[])
    parser.add_argument("--set", choices=list(SETS), default="test", help="what is measured")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-rebound", action="store_true")
    parser.add_argument("--limit", type=int, help="rows of every set, for a look at the machinery: with --results")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--victims", type=Path, default=ROOT / "runs/clip-victims")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-par")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    every = args.verb != "frontier"
    args.attack = args.attack or (list(ATTACKS) if every else ["badnet-stripes"])
    args.seed = args.seed if args.seed is not None else ([0, 1, 2] if every else [0])
    if args.method is None:
        args.method = ["none"] if args.variant else list(METHODS)
    {"run": run, "table": table, "frontier": frontier}[args.verb](args)


if __name__ == "__main__":
    main()
