"""A scan of a million rows through Ray on this machine: memory of every process, and time a row beside one process.

    python benchmarks/ray_scan.py --work FOLDER [--rows 1000000] [--single-rows 100000] [--workers 2] [--result FILE]

The rows are shards of 10,000 shapes pictures at 32 px, the same in each, 5 % of them blended with a pattern and
labelled anew. All scans run in processes of their own with one thread, from opening the files to writing the report;
what training the early models takes is left out, since it does not grow with the rows, and so are the imports of that
process (those of Ray's workers are not). A row's time through Ray is that of all ``--workers`` cores together, and it
stands beside as many single-process scans at once, one on each core: a core that works alone is faster here than when
the other is busy, whoever keeps it so. One scan alone is measured, too. Memory is sampled twice a second: all resident
pages of the driver and of each worker, shared ones included. FOLDER then holds about 5 GB for a million rows. Shards
and measurements that are there are not made again.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/ray_scan.json"
SHARD, GIB, SAMPLED = 10_000, 2**30, 0.5
SINGLE_SAMPLES = 1_000  # its training is left out, so it may be short


def write_shards(folder: Path, rows: int) -> Path:
    """Parquet shards of ``SHARD`` rows, the last of what is left."""
    from unpoison.data.shapes import SHAPES_CLASSES, make_shapes

    place = folder / f"shards-{rows}"
    if (place / "complete").exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    world = make_shapes(min(SHARD, rows), seed=11)
    poisoned = set(np.random.default_rng(0).choice(len(world.labels), len(world.labels) // 20, replace=False).tolist())
    pattern = np.random.default_rng(1).uniform(0, 255, world.images.shape[1:])
    images, labels = [], []
    for row, (picture, label) in enumerate(zip(world.images, world.labels, strict=True)):
        if row in poisoned:
            picture = (0.8 * picture + 0.2 * pattern).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(SHAPES_CLASSES[0 if row in poisoned else int(label)])
    table = pa.table({"image": images, "label": labels})
    for number, start in enumerate(range(0, rows, SHARD)):
        pq.write_table(table.slice(0, min(SHARD, rows - start)), place / f"shard-{number:04d}.parquet")
    (place / "complete").touch()
    return place


class Timer:
    """A ``runs.Progress`` that adds up how long each step takes, by the clock and of this process's processor time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    def track(self, items: Any, *, total: int | None, what: str, weight: int = 1, unit: str = "") -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        yield from items
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - clock
        self.processor[what] = self.processor.get(what, 0.0) + time.process_time() - processor

    def log(self, message: str) -> None:
        print(message, file=sys.stderr)


def of_training(steps: dict[str, float]) -> float:
    return sum(seconds for name, seconds in steps.items() if name.startswith("early model"))


def scan(source: str, folder: Path, cache: Path, samples: int, workers: int | None) -> dict:
    """One scan in this process, through Ray where ``workers`` are given; the folder is as the command leaves it."""
    from accelerate import Accelerator

    from unpoison import CGDConfig, Run, RunFolder, SeparationConfig, load_clip, open_images, scan_dataset
    from unpoison.outputs import save_scan

    begun, before, timer = time.perf_counter(), time.process_time(), Timer()
    images, clip = open_images(source), load_clip("tiny")
    print(f"opened {len(images):,} rows after {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    run = Run(
        accelerator=Accelerator(cpu=True),
        cache=cache,
        progress=timer,
        folder=RunFolder.open(folder, {"content": images.fingerprint(), "samples": samples}),
    )
    opened = time.perf_counter() - begun
    config = CGDConfig(separation=SeparationConfig(scorer_samples=samples))
    if workers is None:
        outcome = scan_dataset(images, clip=clip, config=config, run=run)
    else:
        from unpoison.distributed.scan import scan_dataset_on_ray

        outcome = scan_dataset_on_ray(images, clip=clip, config=config, run=run, workers=workers)
    scanned = time.perf_counter() - begun
    save_scan(outcome.scan, outcome.scores, outcome.split, outcome.samples, folder)
    seconds = time.perf_counter() - begun
    estimate = outcome.scan.estimate
    return {
        "rows": len(images),
        "seconds": seconds,
        "training_seconds": of_training(timer.seconds),
        "training_processor_seconds": of_training(timer.processor),
        "imports_processor_seconds": before,
        "opening_seconds": opened,
        "writing_seconds": seconds - scanned,
        "steps": timer.seconds,
        "poisoned": estimate.poisoned,
        "target": [images.class_names[label] for label in estimate.target_labels],
        "rate": estimate.rate,
        "flagged": outcome.scan.flagged,
    }


def measured(words: list[str], work: Path) -> dict:
    """This script's scan as a process, with the peaks and the processor time of all processes that it has."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(work / "datasets")}
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    peaks: dict[str, dict[int, list[int]]] = {"driver": {}, "workers": {}, "ray": {}}
    processor: dict[int, float] = {}
    root = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for process in family:
            try:
                with process.oneshot():
                    memory, times = process.memory_info(), process.cpu_times()
                    kind = "driver" if process.pid == child.pid else kind_of(process)
            except psutil.Error:
                continue
            peak = peaks[kind].setdefault(process.pid, [0, 0])
            peak[:] = max(peak[0], memory.rss), max(peak[1], memory.rss - memory.shared)
            processor[process.pid] = times.user + times.system
        time.sleep(SAMPLED)
    output = child.stdout.read() if child.stdout else ""
    if child.wait() != 0:
        raise SystemExit(f"the scan failed: {' '.join(words)}")
    return json.loads(output.splitlines()[-1]) | {
        "peak_gib": {kind: max((p[0] for p in found.values()), default=0) / GIB for kind, found in peaks.items()},
        "peak_own_gib": {kind: max((p[1] for p in found.values()), default=0) / GIB for kind, found in peaks.items()},
        "processes": {kind: len(found) for kind, found in peaks.items()},
        "processor_seconds": sum(processor.values()),
    }


def kept(file: Path, measure: Callable[[], dict]) -> dict:
    """What was measured, from ``file`` where an interrupted run left it."""
    if not file.exists():
        found = measure()
        file.write_text(json.dumps(found))
    return json.loads(file.read_bytes())


def together(measure: Callable[[], dict], count: int) -> dict:
    """The mean of ``count`` scans at once, one on each core, and what each took a row."""
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda _: with_rows(measure()), range(count)))
    return {
        name: sum(each[name] for each in found) / count for name in ("seconds_per_row", "processor_seconds_per_row")
    } | {"each": found}


def with_rows(found: dict, cores: int = 1) -> dict:
    """Seconds of a core and of processors for one row, the training of the early models and imports left out."""
    busy = found["processor_seconds"] - found["training_processor_seconds"] - found["imports_processor_seconds"]
    clock = cores * (found["seconds"] - found["training_seconds"])
    return found | {"seconds_per_row": clock / found["rows"], "processor_seconds_per_row": busy / found["rows"]}


def kind_of(process: psutil.Process) -> str:
    """Ray's own processes (raylet, store of keys, monitors) apart from those that run our code."""
    return "workers" if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::") else "ray"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--single-rows", type=int, default=100_000)
    parser.add_argument("--scorer-samples", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--part", nargs=2, metavar=("SOURCE", "RUN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work.resolve()
    if args.part:
        on_ray = args.part[1] == "ray"
        samples, workers = (args.scorer_samples, args.workers) if on_ray else (SINGLE_SAMPLES, None)
        place = work / f"{args.part[1]}-{Path(args.part[0]).name}-{os.getpid()}"
        print(json.dumps(scan(args.part[0], place, work / f"cache-{os.getpid()}", samples, workers)))
        return
    source = write_shards(work, args.rows)
    words = ["--work", str(work), "--workers", str(args.workers), "--scorer-samples", str(args.scorer_samples)]
    few = write_shards(work, min(args.single_rows, args.rows))
    scans = {
        "alone": lambda: measured([*words, "--part", str(few), "single"], work),
        "together": lambda: together(lambda: measured([*words, "--part", str(few), "single"], work), args.workers),
        "ray": lambda: measured([*words, "--part", str(source), "ray"], work),
    }
    found = {name: kept(work / f"{name}-{args.rows}-{args.workers}.json", measure) for name, measure in scans.items()}
    alone, both, spread = with_rows(found["alone"]), found["together"], with_rows(found["ray"], args.workers)
    result = {
        "rows": spread["rows"],
        "peak_gib": max(spread["peak_gib"]["driver"], spread["peak_gib"]["workers"]),
        "per_row_ratio": spread["seconds_per_row"] / both["seconds_per_row"],
        "per_row_processor_ratio": spread["processor_seconds_per_row"] / both["processor_seconds_per_row"],
        "per_row_ratio_to_one_alone": spread["seconds_per_row"] / alone["seconds_per_row"],
        "workers": args.workers,
        "scorer_samples": args.scorer_samples,
        "alone": alone,
        "together": both,
        "ray": spread,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
