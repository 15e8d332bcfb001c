"""Time and peak memory of DAO on 50,000 embeddings of 512 dimensions, and what the approximate search costs in AUROC.

    python benchmarks/dao.py [--rows 50000] [--threads 1]

Synthetic unit vectors: 20 Gaussian clusters of uneven width, and a tight cluster of 0.2 % beside one of them (poison).
Neighbours are looked for in random batches of 2,048, as the method says, and over all rows at once, where more than k
poisoned rows are neighbours enough of each other; each with an exact and an approximate search. Every cell is a process
of its own, whose memory's high-water mark is read (Linux); seconds are of the scores alone, without imports and data.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import numpy as np
from scipy.stats import spearmanr

from unpoison.detection.neighbours import FORMULAS, NeighboursConfig, score_neighbourhoods
from unpoison.evaluation.metrics import auroc

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/dao.json"
WIDTH, CLUSTERS, RATE = 512, 20, 0.002
CELLS = {
    "batches_exact": NeighboursConfig(),
    "batches_approximate": NeighboursConfig(index="approximate"),
    "all_exact": NeighboursConfig(batch_size=None),
    "all_approximate": NeighboursConfig(batch_size=None, index="approximate"),
}


def embeddings(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, 512] in float32, and which rows are planted."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((CLUSTERS + 1, WIDTH), dtype=np.float32)
    centers[-1] = 0.8 * centers[0] + 0.6 * centers[-1]
    spread = random.uniform(0.4, 1.0, CLUSTERS + 1).astype(np.float32)
    spread[-1] = 0.4
    truth = np.zeros(rows, dtype=bool)
    truth[random.choice(rows, round(RATE * rows), replace=False)] = True
    which = np.where(truth, CLUSTERS, random.integers(0, CLUSTERS, rows))
    points = centers[which] + spread[which, None] * random.standard_normal((rows, WIDTH), dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True), truth


def peak_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def measure(cell: str, rows: int, scores: Path) -> None:
    """One cell, in this process; prints its figures and keeps its scores."""
    points, truth = embeddings(rows)
    before = peak_gib()
    begun, worked = perf_counter(), process_time()
    found = score_neighbourhoods(points, {"dao": FORMULAS["dao"]}, CELLS[cell])["dao"]
    seconds, cpu = perf_counter() - begun, process_time() - worked
    np.save(scores, found)
    rates = {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak_gib(), "peak_gib_before": before}
    print(json.dumps(rates | {"auroc": auroc(found, truth)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    parser.add_argument("--scores", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        measure(args.cell, args.rows, args.scores)
        return
    result: dict = {
        "machine": f"{platform.machine()}, {args.threads} threads, faiss {version('faiss-cpu')}",
        "load_before": os.getloadavg()[0],
        "rows": args.rows,
        "width": WIDTH,
        "planted": round(RATE * args.rows),
        "k": NeighboursConfig().k,
        "batch_size": NeighboursConfig().batch_size,
        "probes": NeighboursConfig().probes,
    }
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(args.threads))
    with TemporaryDirectory() as folder:
        for cell in CELLS:
            kept = Path(folder, f"{cell}.npy")
            command = [sys.executable, __file__, "--cell", cell, "--rows", str(args.rows), "--scores", str(kept)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
            result[cell] = json.loads(done.stdout.splitlines()[-1])
            print(cell, result[cell], flush=True)
        for kind in ("batches", "all"):
            exact, rough = (np.load(Path(folder, f"{kind}_{search}.npy")) for search in ("exact", "approximate"))
            result[f"{kind}_loss"] = {
                "auroc": result[f"{kind}_exact"]["auroc"] - result[f"{kind}_approximate"]["auroc"],
                "spearman": float(spearmanr(exact, rough)[0]),  # pyright: ignore[reportArgumentType]
            }
    result["load_after"] = os.getloadavg()[0]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
