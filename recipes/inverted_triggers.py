"""The picture of true and inverted triggers for docs/methods/cbpt.md: docs/inverted_triggers.jpg.

    unpoison bench run grids/cpu.toml -o runs/bench-cpu       # first: the victims
    python recipes/inverted_triggers.py [--attack badclip ...] [--bench runs/bench-cpu] [--seed 0] [--shared FOLDER]

For each attack: an image, the same with the true trigger, what that adds, and what the dummies of ``unpoison purify
cbpt`` add, a quiet one and the loudest, stretched to full contrast on grey. The method sees the model and clean images,
never the trigger, and looks for the target itself: above each row stand the classes that it suspected and the true
target. About a minute and a half for each attack.
"""

import argparse
import base64
import io
from pathlib import Path

import numpy as np
import torch
from grid_clips import BENCH, GRID, GridClip, find_clip
from PIL import Image, ImageDraw

from unpoison.api_zero_shot import purify_with_cbpt
from unpoison.attacks.overlay import to_pil, to_tensor
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.benchmark.grid import read_grid
from unpoison.data.sources import open_images
from unpoison.errors import UsageError
from unpoison.models.clip_files import load_any_clip
from unpoison.runs import Run
from unpoison.zero_shot_results import DummyTrigger

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs/inverted_triggers.jpg"
SIDE, LINE, GAP = 96, 14, 6
COLUMNS = ("clean image", "true trigger on", "what it adds", "inverted, quiet", "inverted, loud")
ATTACKS = ("badnet-rand", "badnet-stripes", "blended-rand", "sig-clip", "wanet-strong", "blended-text", "badclip")


def added(change: torch.Tensor) -> Image.Image:
    """A change [3, h, w] on grey, stretched to full contrast."""
    shown = 0.5 + change / (2 * change.abs().max().clamp_min(1e-8))
    return Image.fromarray((255 * shown).round().to(torch.uint8).permute(1, 2, 0).numpy())


def opened(dummy: DummyTrigger) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(dummy.picture)))


def row_of(name: str, victim: GridClip, shared: Path, row: int) -> tuple[str, list[Image.Image]]:
    """What stands above the row, and its tiles; two fewer where the method found nothing."""
    images = open_images(f"{shared}/data/cifar10/train.parquet[30000:31000]")
    poisoning = victim.poisoning
    assert isinstance(poisoning, PairPoisoning)  # noqa: S101 # one backdoor each
    found = purify_with_cbpt(load_any_clip(victim.model), images, run=Run(seed=victim.cell.names.seed)).purification
    picture = images.decode([row])[0]
    assert isinstance(picture, Image.Image)  # noqa: S101 # the data set's own image
    worn = to_pil(poisoning.make_trigger().apply(to_tensor([picture]), seed=poisoning.seed, ids=["a"]))[0]
    difference = torch.from_numpy(np.asarray(worn, dtype=np.float32) - np.asarray(picture, dtype=np.float32))
    fitted = [dummy for dummy in found.dummies if not dummy.aside and dummy.target == found.targets[0]]
    chosen = [fitted[0], fitted[-1]] if fitted else []  # the search's own, and the loudest
    suspected = ", ".join(found.targets) or "nothing"
    title = f"{name}: suspected {suspected}; true target {poisoning.target_name}"
    return title, [picture, worn, added(difference.permute(2, 0, 1)), *map(opened, chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", nargs="+", default=list(ATTACKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", type=int, default=7)
    parser.add_argument("--bench", type=Path, default=BENCH)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    grid, rows = read_grid(GRID), []
    for attack in args.attack:
        try:
            clip = find_clip(grid, args.bench, attack, args.seed)
        except UsageError as error:
            print(f"{attack}: left out, {error.message} {error.hint}", flush=True)
            continue
        rows.append(row_of(attack, clip, args.shared, args.row))
        print(rows[-1][0], flush=True)
    sheet = Image.new("RGB", (len(COLUMNS) * (SIDE + GAP), LINE + len(rows) * (SIDE + LINE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        draw.text((column * (SIDE + GAP) + 2, 0), name, fill="black")
    for place, (title, tiles) in enumerate(rows):
        top = LINE + place * (SIDE + LINE + GAP)
        draw.text((2, top), title, fill="black")
        for column, tile in enumerate(tiles):
            sheet.paste(tile.resize((SIDE, SIDE), Image.Resampling.NEAREST), (column * (SIDE + GAP), top + LINE))
    sheet.save(args.result, quality=90, subsampling=0)
    print(f"{args.result.name}: {len(rows)} rows, {args.result.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
