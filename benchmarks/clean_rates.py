"""What clean models say to the attacks' triggers: how much of an attack success rate needs no backdoor at all.

    unpoison bench run grids/cpu.toml -o runs/bench-cpu       # first: the victims and the clean controls
    python benchmarks/clean_rates.py run [--bench runs/bench-cpu] [--seed 0 1 2]
    python benchmarks/clean_rates.py table

The floor of an ASR is taken on images without the trigger. A trigger that changes an image much may make a clean model
say the target as well, and what a model says that was never attacked no repair can be asked to remove. Here the clean
control of the same kind and seed sees the test images of each attack of the grid, with its trigger and target. Attacks
whose victim the grid has not made, or found too weak, are left out; backdoors with several targets too. What is kept
for the same model and trigger is not computed again. One thread.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kept_cells import new_run

from unpoison.attacks.parts import PoisoningParts
from unpoison.benchmark import classifier_cells, clip_cells
from unpoison.benchmark.cell import Cell
from unpoison.benchmark.formats import bars
from unpoison.benchmark.grid import read_grid
from unpoison.benchmark.store import Store
from unpoison.data.sources import open_images
from unpoison.evaluation.classifier import evaluate_classifier
from unpoison.evaluation.clip import evaluate_clip
from unpoison.models.classifier import load_classifier
from unpoison.models.clip_files import load_any_clip
from unpoison.results import write_atomically
from unpoison.runs import Silent

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/clean_rates.json"
GRID, BENCH = ROOT / "grids/cpu.toml", ROOT / "runs/bench-cpu"
NOTE = (
    "The clean control of the same kind and seed on test images outside the target class: how many it takes for the "
    "target without and with each attack's trigger (`python benchmarks/clean_rates.py run`). What it says with a "
    "trigger needs no backdoor, and no repair can be asked to remove it. Percent, means over seeds."
)
HEADINGS = ("models", "attack", "seeds", "clean model, no trigger", "clean model, trigger", "victim, trigger")


def attacked(store: Store, seeds: list[int]) -> Iterator[tuple[Cell, Cell]]:
    """Each cell of a victim with one target as it is given, and that of the clean control beside it."""
    given = [cell for cell in read_grid(GRID).cells if cell.is_given and store.has(cell.key)]
    done = [cell for cell in given if store.load(cell.key).status == "done" and cell.names.seed in seeds]
    controls = {(cell.names.model, cell.names.seed): cell for cell in done if cell.attack is None}
    for cell in done:
        control = controls.get((cell.names.model, cell.names.seed))
        if cell.attack is not None and not cell.attack.also and control is not None:
            yield cell, control


def measure(cell: Cell, control: Cell, bench: Path) -> dict[str, Any]:
    """The control's rates on the attack's test images."""
    run, test = new_run(cell.names.seed, cache=bench / "cache"), open_images(cell.data.test)
    if cell.model.kind == "clip":
        manifest = clip_cells.open_setting(cell, bench, Silent()).poisoning
        assert not isinstance(manifest, PoisoningParts)  # noqa: S101 # `attacked` left them out
        clip = load_any_clip(clip_cells.victim_of(clip_cells.open_setting(control, bench, Silent())))
        found: Any = evaluate_clip(clip, test, poisoning=manifest, run=run)
    else:
        poisoning = classifier_cells.open_setting(cell, bench, Silent()).poisoning
        folder = classifier_cells.victim_of(classifier_cells.open_setting(control, bench, Silent()))
        found = evaluate_classifier(load_classifier(folder), test, poisoning=poisoning, run=run)
    return {"c_acc": asdict(found.c_acc), "floor": asdict(found.asr_floor), "asr": asdict(found.asr)}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = Store.read(args.bench)
    kept = {row["key"]: row for row in rows()}
    for cell, control in attacked(store, args.seed):
        names, inputs = cell.names, {"cell": cell.key, "control": control.key}
        if kept.get(cell.key, {}).get("inputs") != inputs:
            victim = store.load(cell.key).before
            assert victim is not None  # noqa: S101 # it is done
            kept[cell.key] = {
                "key": cell.key, "kind": cell.model.kind, "attack": names.attack, "rate": names.rate,
                "seed": names.seed, "inputs": inputs, **measure(cell, control, args.bench),
                "victim": asdict(victim.asr) if victim.asr is not None else None,
            }  # fmt: skip
            row = kept[cell.key]
            print(f"{names.attack} {names.seed}: {row['floor']['value']:.1f} -> {row['asr']['value']:.1f}", flush=True)
            write_atomically(RESULT, json.dumps(list(kept.values()), indent=1).encode() + b"\n")
    current = {cell.key for cell, _ in attacked(store, args.seed)}
    left = [row for row in kept.values() if row["key"] in current or row["seed"] not in args.seed]
    write_atomically(RESULT, json.dumps(left, indent=1).encode() + b"\n")


def rows() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_bytes()) if RESULT.is_file() else []


def table() -> list[str]:
    """Markdown: means over seeds, the attack that clean models obey most first."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows():
        grouped.setdefault((row["kind"], row["attack"]), []).append(row)

    def mean(found: list[dict[str, Any]], name: str) -> float:
        return sum(row[name]["value"] for row in found) / len(found)

    lines = [
        (kind, attack, str(len(found)), *(f"{mean(found, name):.1f}" for name in ("floor", "asr", "victim")))
        for (kind, attack), found in sorted(
            grouped.items(), key=lambda item: (item[0][0], mean(item[1], "floor") - mean(item[1], "asr"))
        )
    ]
    return bars(HEADINGS, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--bench", type=Path, default=BENCH, help="the results folder of grids/cpu.toml")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.command == "run":
        run(args)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
