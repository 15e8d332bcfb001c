"""What PAR costs beside plain CLIP fine-tuning: seconds a step, and memory of gradient caching.

    python benchmarks/par_cost.py [--rounds 9] [--steps 6] [--batch 128] [--only steps|memory]

Steps: the library's two repairs in turn, ``--rounds`` times in one process with one thread, at the same batch on the
same pairs. A step's time lies between two ticks of the progress; the first of a repair and looks at held-out pairs are
left out. The ratio of a round is that of its two median steps; the median over rounds counts. Captions of Flickr8k are
so many that PAR embeds them by the suspect in every step; those from templates it embeds once.
Memory: a process for each batch size makes two PAR steps, in chunks of 256 pairs. Before, it reads its resident memory
with the model, the libraries and the pairs in it, and resets the peak (/proc/self/clear_refs); the peak less that is
what training takes. The ratio of those is claimed, that of whole peaks, which is smaller, stands beside it.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from unpoison.attacks.prompts import TEMPLATES
from unpoison.data.pairs import ImageTextPairs, open_pairs, pairs_of_labels
from unpoison.data.sources import open_images
from unpoison.defenses.baselines.fine_tuning import FineTuningConfig, repair_with_fine_tuning
from unpoison.defenses.par import PARConfig, repair_with_par
from unpoison.models.clip_transformers import load_clip
from unpoison.results import write_atomically
from unpoison.runs import Run, Silent

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/par_cost.json"
CHUNK, BATCHES = 256, (256, 2048)


class Ticks(Silent):
    """Seconds between the steps of a training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[T]:
        if unit != "pairs":  # decoding
            yield from items
            return
        for item in items:
            begun = time.perf_counter()
            yield item
            self.seconds.append(time.perf_counter() - begun)


def step_seconds(repair: Callable[..., Any], pairs: ImageTextPairs, config: Any) -> float:
    """Median of a repair's steps but for the first, which warms up, and the last, which ends with a look."""
    ticks = Ticks()
    repair(load_clip("tiny"), pairs, config, run=Run(progress=ticks))
    return statistics.median(ticks.seconds[1:-1])


def step_ratio(pairs: ImageTextPairs, args: argparse.Namespace) -> dict[str, Any]:
    few: dict[str, Any] = {"steps": args.steps, "batch_size": args.batch, "learning_rate": 1e-6}
    few |= {"check_every": args.steps, "held_out_pairs": 16}
    rounds = []
    for _ in range(args.rounds):
        plain = step_seconds(repair_with_fine_tuning, pairs, FineTuningConfig(**few))
        rounds.append((plain, step_seconds(repair_with_par, pairs, PARConfig(**few))))
    return {
        "pairs": pairs.name.rpartition("/data/")[2],
        "batch": args.batch,
        "plain_seconds": [plain for plain, _ in rounds],
        "par_seconds": [par for _, par in rounds],
        "ratio": statistics.median(par / plain for plain, par in rounds),
    }


def resident(field: str) -> float:
    """MiB: VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


def train_and_measure(batch: int) -> None:
    """In a process of its own: print what two steps took."""
    torch.set_num_threads(1)
    clip, pairs = load_clip("tiny"), open_pairs(f"shapes:{max(BATCHES) + 400}:1")
    config = PARConfig(steps=2, batch_size=batch, chunk_size=CHUNK, check_every=2, held_out_pairs=100)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    repair = repair_with_par(clip, pairs, config, run=Run())
    peak = resident("VmHWM")
    print(json.dumps({"batch": repair.batch_size, "before_mib": before, "peak_mib": peak}))


def memory(rounds: int) -> dict[str, Any]:
    found: dict[int, list[dict[str, float]]] = {batch: [] for batch in BATCHES}
    for _ in range(rounds):
        for batch in BATCHES:
            command = [sys.executable, __file__, "--measure", str(batch)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[batch].append(json.loads(output.splitlines()[-1]))

    def middle(batch: int, less: float) -> float:
        return statistics.median(row["peak_mib"] - less * row["before_mib"] for row in found[batch])

    small, large = BATCHES
    return {
        "chunk": CHUNK,
        "measured": {str(batch): rows for batch, rows in found.items()},
        "ratio": middle(large, 1) / middle(small, 1),
        "ratio_of_whole_peaks": middle(large, 0) / middle(small, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", choices=["steps", "memory"])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        train_and_measure(args.measure)
        return
    torch.set_num_threads(1)
    result = json.loads(args.result.read_bytes()) if args.result.exists() else {}
    result["machine"] = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    if args.only != "memory":
        data = args.shared / "data"
        rows = 4 * args.batch
        captioned = open_pairs(data / "flickr8k/train.parquet", limit=rows)
        labelled = pairs_of_labels(open_images(data / "cifar10/train.parquet", limit=rows), TEMPLATES)
        result["steps"] = {"captions": step_ratio(captioned, args), "templates": step_ratio(labelled, args)}
    if args.only != "steps":
        result["memory"] = memory(args.memory_rounds)
    args.result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.result, json.dumps(result, indent=1).encode() + b"\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
