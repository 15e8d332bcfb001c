"""Scan throughput against a bare forward loop, peak memory, and the second scan's cache.

    python benchmarks/scan.py [--only memory] [--rows-large 640] [--rows-tiny 5000] [--rows-memory 50000]

Every figure is a ratio within one process on one machine: the same CLIP, the same batch size, the same precision. The
bare loop runs over tensors that are ready in memory. ViT-B/32's size has random weights and gets 224 px JPEGs.
Both loops run in turn, ``--rounds`` times; the median of the ratios is what counts. ``--only`` measures those parts
again and keeps the others' figures.
"""

import argparse
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from unpoison.data.shapes import SHAPES_CLASSES, make_shapes
from unpoison.data.sources import LabelledImages, open_images
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.models.zero_shot import zero_shot_logits
from unpoison.runs import Run

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/scan.json"
PARTS = ("help", "tiny", "memory", "large")


def write_jpegs(file: Path, rows: int, size: int) -> Path:
    """Shapes pictures as JPEG rows in the layout of Hugging Face datasets; over 5,000 they repeat under new ids."""
    world = make_shapes(min(rows, 5_000), size=size, seed=3)
    noise = np.random.default_rng(0)

    def encode(row: int) -> dict:
        picture = world.images[row % len(world.images)]
        if row >= len(world.images):  # other bytes, so that no cache can serve them
            picture = np.clip(picture.astype(np.int16) + noise.integers(-9, 9, picture.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=90)
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list(SHAPES_CLASSES))}
    )
    table = {
        "image": [encode(row) for row in range(rows)],
        "label": [int(world.labels[r % 5_000]) for r in range(rows)],
    }
    datasets.Dataset.from_dict(table, features=features).to_parquet(file)
    return file


def large_clip(folder: Path) -> TransformersCLIP:
    """Random weights of ViT-B/32's image tower; the tiny CLIP's tokenizer."""
    text = json.loads((ROOT / "src/unpoison/assets/tiny_clip/config.json").read_text())["text_config"]
    torch.manual_seed(0)
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPConfig(
        text_config=text, vision_config=vision | {"image_size": 224, "patch_size": 32}, projection_dim=512
    )
    CLIPModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "src/unpoison/assets/tiny_clip" / name).read_bytes())
    processor = json.loads((ROOT / "src/unpoison/assets/tiny_clip/preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return load_clip(folder)


@torch.no_grad()
def bare_loop(clip: TransformersCLIP, images: torch.Tensor, batch: int) -> float:
    begun = time.perf_counter()
    for start in range(0, len(images), batch):
        clip.encode_images(images[start : start + batch])
    return len(images) / (time.perf_counter() - begun)


def scan_loop(clip: TransformersCLIP, source: LabelledImages, batch: int, cache: Path | None) -> float:
    begun = time.perf_counter()
    zero_shot_logits(clip, source, run=Run(cache=cache), batch_size=batch)
    return len(source) / (time.perf_counter() - begun)


def throughput(clip: TransformersCLIP, file: Path, batch: int, rounds: int) -> dict:
    source = open_images(file)
    pictures = [image for image in source.decode(np.arange(len(source))) if isinstance(image, Image.Image)]
    images = clip.preprocess(pictures)
    bare_loop(clip, images[: 2 * batch], batch)
    scan_loop(clip, source.select(np.arange(2 * batch)), batch, None)
    pairs = []
    for _ in range(rounds):  # each scan fills an empty cache, as a user's first one does
        with tempfile.TemporaryDirectory() as cache:
            pairs.append((bare_loop(clip, images, batch), scan_loop(clip, source, batch, Path(cache))))
    return {
        "images": len(images),
        "batch": batch,
        "image_size": clip.image_size,
        "bare_images_per_second": [round(bare, 2) for bare, _ in pairs],
        "scan_images_per_second": [round(scan, 2) for _, scan in pairs],
        "ratio": statistics.median(scan / bare for bare, scan in pairs),
    }


def memory(file: Path) -> dict:
    """A process of its own scans the rows twice: peak resident memory, and the second scan's time from the cache.

    Linux's high-water mark is read: ``ru_maxrss`` of a child starts from its parent's.
    """
    code = (
        "import sys, time, json\n"
        "from pathlib import Path\n"
        "from unpoison.data.sources import open_images\n"
        "from unpoison.models.clip_transformers import load_clip\n"
        "from unpoison.models.zero_shot import zero_shot_logits\n"
        "from unpoison.runs import Run\n"
        "source, clip, run = open_images(sys.argv[1]), load_clip('tiny'), Run(cache=Path(sys.argv[2]))\n"
        "seconds = []\n"
        "for _ in range(2):\n"
        "    begun = time.perf_counter(); zero_shot_logits(clip, source, run=run)\n"
        "    seconds.append(time.perf_counter() - begun)\n"
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "peak = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2**20\n"
        "print(json.dumps({'images': len(source), 'peak_gib': peak, 'first_seconds': seconds[0],"
        " 'second_seconds': seconds[1], 'second_over_first': seconds[1] / seconds[0]}))\n"
    )
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", code, str(file), cache]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def help_seconds(rounds: int = 9) -> dict:
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        subprocess.run([str(Path(sys.executable).with_name("unpoison")), "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(times[1:]), "all": times[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-large", type=int, default=640)
    parser.add_argument("--rows-tiny", type=int, default=5_000)
    parser.add_argument("--rows-memory", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    result: dict = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    tiny = load_clip("tiny")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in args.only:
            if part == "help":
                result[part] = help_seconds()
            elif part == "memory":
                result[part] = memory(write_jpegs(folder / "memory.parquet", args.rows_memory, 32))
            elif part == "tiny":
                result[part] = throughput(
                    tiny, write_jpegs(folder / "tiny.parquet", args.rows_tiny, 32), 256, args.rounds
                )
            else:
                file = write_jpegs(folder / "large.parquet", args.rows_large, 224)
                result[part] = throughput(large_clip(folder / "clip"), file, 32, args.rounds)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
