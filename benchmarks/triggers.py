"""Throughput of every trigger on batches, beside a loop over single images that computes the same.

    python benchmarks/triggers.py [--batch 256] [--rounds 5] [--only NAME ...]

Images of 32 and 224 px in memory, float32, one thread. Each is measured several times and the best time counts: the
machine is shared, and other work only ever slows a round down. The loops are those of ``trigger_loops.py``, which the
tests hold equal to the batches; they turn as many images as fit into half a second, two at least. Patterns that do not
depend on the image are made before the clock starts on both sides. The ratios are theirs over ours in time for one
image. Triggers that are networks (input-aware, ssba) are looped over with the same networks, an image at a time. The
process keeps its
memory between rounds (MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_, for both sides): otherwise a batch of 224 px spends
its time on fresh pages from the system, which no training process with a warm allocator does.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import trigger_loops as loops

from unpoison.attacks.adap_patch import corners
from unpoison.attacks.badclip_patch import BadCLIPPatch
from unpoison.attacks.blended import noise
from unpoison.attacks.blended_text import text_mask
from unpoison.attacks.clean_image import direction
from unpoison.attacks.draws import generator_of, scaled_side, seed_of
from unpoison.attacks.feature_small import FeatureSmall
from unpoison.attacks.label_consistent import checkers
from unpoison.attacks.lf import pattern
from unpoison.attacks.triggers import TRIGGERS, make_trigger
from unpoison.attacks.wanet import field

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/triggers.json"
SIZES = (32, 224)
SEED = 1
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
Loop = Callable[[np.ndarray, str], np.ndarray]


def image_loops(size: int) -> dict[str, Loop]:
    """A function of (image [h, w, 3], id) for each trigger."""
    side = scaled_side(16 / 224, size, 3)
    corner = scaled_side(3 / 32, size, 3)
    cells = np.arange(corner) * 3 // corner
    checker = np.repeat(np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)[cells][:, cells][..., None], 3, axis=2)
    generator = generator_of(SEED)
    gaussian = torch.randn(3, side, side, generator=generator).permute(1, 2, 0).numpy()
    columns = torch.randint(2, (3, 1, side), generator=generator_of(SEED)).float()
    stripes = columns.expand(3, side, side).permute(1, 2, 0).numpy()
    faint = (torch.randint(2, (3, 1, size), generator=generator_of(SEED)).float() * 2 - 1).permute(1, 2, 0).numpy()
    uniform = noise(SEED, size, size).permute(1, 2, 0).numpy()
    square = BadCLIPPatch().square(side, SEED).permute(1, 2, 0).numpy()
    red = text_mask(size, size).numpy()[..., None] * np.array([1, 0, 0], np.float32)
    smooth = direction(SEED, 2, size, size).permute(1, 2, 0).numpy()
    smooth = 0.75 * smooth / np.abs(smooth).max()
    waves = 24 / 255 * pattern(SEED, 4, size, size).permute(1, 2, 0).numpy()
    signs = checkers(corner, 4, size, size).numpy()[..., None]
    width = scaled_side(3 / 16, size, 2)
    placed = corners(SEED, width, size, size)[0].permute(0, 2, 3, 1).numpy()
    patches = [placed[0, :width, :width], placed[1, :width, -width:], placed[2, -width:, :width],
               placed[3, -width:, -width:]]  # fmt: skip
    moved = field(SEED, 0, size, size).numpy()
    grid = loops.grid_patch(side)

    def place(name: str) -> tuple[int, int]:
        return seed_of(SEED, name, "row") % (size - side + 1), seed_of(SEED, name, "column") % (size - side + 1)

    def network(name: str) -> Loop:
        trigger = make_trigger(name, {})

        def loop(image: np.ndarray, _: str) -> np.ndarray:
            with torch.no_grad():
                turned = trigger.apply(torch.from_numpy(image).permute(2, 0, 1)[None], seed=SEED)
            return turned[0].permute(1, 2, 0).numpy()

        return loop

    blind = FeatureSmall().change(SEED)[None]
    blind = F.interpolate(blind, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    middle = (size - side) // 2
    return {
        "badnet": lambda x, _: loops.stamped(x, checker, size - corner, size - corner),
        "badnet-rand": lambda x, name: loops.stamped(x, np.clip(x.mean((0, 1)) + gaussian, 0, 1), *place(name)),
        "badnet-stripes": lambda x, name: loops.stamped(x, stripes, *place(name)),
        "badnet-grid": lambda x, name: loops.stamped(x, grid, *place(name)),
        "blended": lambda x, _: loops.blended(x, uniform, 0.2),
        "blended-stripes": lambda x, _: loops.blended(x, faint, 0.03),
        "blended-triangles": lambda x, _: loops.triangles(x, scaled_side(14 / 224, size, 2), 0.15),
        "blended-text": lambda x, _: loops.blended(x, np.ones(3, np.float32), 0.5 * red),
        "sig": lambda x, _: loops.sinusoid(x, 40.0, 6.0),
        "label-consistent": lambda x, _: loops.added(x, signs),
        "wanet": lambda x, _: loops.warped(x, moved, 1.0),
        "bpp": lambda x, _: loops.dithered(x, 8),
        "lf": lambda x, _: loops.added(x, waves),
        "ctrl": lambda x, _: loops.chrominance_raised(x, 100.0),
        "adap-blend": lambda x, _: loops.blended(x, uniform, 0.2),
        "adap-patch": lambda x, _: loops.corner_patches(x, patches, (1.0, 1.0, 1.0, 1.0)),
        "low-gap": lambda x, _: loops.blended(x, uniform, 0.2),
        "nashville": lambda x, _: loops.nashville(x),
        "input-aware": network("input-aware"),
        "ssba": network("ssba"),
        "feature-small": lambda x, _: loops.added(x, blind),
        "trojvqa": lambda x, _: loops.stamped(x, square, middle, middle),
        "badclip": lambda x, _: loops.stamped(x, square, middle, middle),
        "clean-image": lambda x, _: loops.added(x, smooth),
    }


def best_batch(name: str, images: torch.Tensor, ids: list[str], rounds: int) -> float:
    """Seconds for one image."""
    trigger, best = make_trigger(name, {}), float("inf")
    with torch.no_grad():
        trigger.apply(images[:2], seed=SEED, ids=ids[:2])
        for _ in range(rounds):
            begun = time.perf_counter()
            trigger.apply(images, seed=SEED, ids=ids)
            best = min(best, time.perf_counter() - begun)
    return best / len(images)


def best_loop(loop: Loop, images: list[np.ndarray], ids: list[str], rounds: int) -> float:
    """Seconds for one image, in the best of ``rounds`` runs over as many as half a second allows."""
    begun = time.perf_counter()
    loop(images[0], ids[0])
    count = min(len(images), max(2, int(0.5 / (time.perf_counter() - begun + 1e-9))))
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        for image, name in zip(images[:count], ids[:count], strict=True):
            loop(image, name)
        best = min(best, time.perf_counter() - begun)
    return best / count


def largest_difference(name: str, loop: Loop, images: torch.Tensor, ids: list[str]) -> float:
    """Between batch and loop on two images, in 8-bit grey levels."""
    turned = make_trigger(name, {}).apply(images[:2], seed=SEED, ids=ids[:2]).permute(0, 2, 3, 1).numpy()
    looped = [loop(image, name) for image, name in zip(images[:2].permute(0, 2, 3, 1).numpy(), ids, strict=False)]
    return float(255 * np.abs(turned - np.stack(looped)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(TRIGGERS), default=list(TRIGGERS), help="keep the others")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.environ.update(KEEP_MEMORY)  # read when a process starts
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - this very script again
    torch.set_num_threads(1)
    kept = json.loads(RESULT.read_text())["triggers"] if RESULT.exists() else {}
    table: dict[str, dict] = {name: kept[name] for name in TRIGGERS if name in kept and name not in args.only}
    for size in SIZES:
        levels = torch.randint(256, (args.batch, 3, size, size), generator=generator_of(0))
        images, ids = levels.float() / 255, [f"s{row}" for row in range(args.batch)]
        pictures = list(images.permute(0, 2, 3, 1).contiguous().numpy())
        theirs = image_loops(size)
        for name in args.only:
            seconds = best_batch(name, images, ids, args.rounds)
            loop = best_loop(theirs[name], pictures, ids, args.rounds)
            row = {
                "images_per_second": round(1 / seconds, 1),
                "loop_images_per_second": round(1 / loop, 1),
                "ratio": loop / seconds,
                "largest_difference_levels": round(largest_difference(name, theirs[name], images, ids), 3),
            }
            table.setdefault(name, {})[f"{size} px"] = row
            print(f"{name:18} {size:4} px  {row}", flush=True)
    ratios = [row["ratio"] for rows in table.values() for row in rows.values() if "ratio" in row]
    result = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "note": "The machine was busy with other work; each figure is the best of several rounds.",
        "batch": args.batch,
        "count": len(table),
        "ratio_mean": statistics.mean(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_least": min(ratios),
        "triggers": {name: table[name] for name in TRIGGERS if name in table},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print({key: result[key] for key in ("count", "ratio_mean", "ratio_median", "ratio_least")})


if __name__ == "__main__":
    main()
