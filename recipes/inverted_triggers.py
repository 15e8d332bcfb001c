"""The picture of true and inverted triggers in docs/methods/cbpt.md.

    unpoison bench run grids/cpu.toml -o runs/bench-cpu       # first: the victims
    python recipes/inverted_triggers.py [--bench runs/bench-cpu] [--seed 0] [--shared FOLDER]

For each attack: an image, the same with the true trigger, what that adds, and what the quiet and the loud dummies add,
stretched to full contrast on grey. The inversion sees the model and clean images, never the trigger.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from grid_clips import BENCH, GRID, GridClip, find_clip
from PIL import Image, ImageDraw

from unpoison.attacks.overlay import to_pil, to_tensor
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.benchmark.grid import read_grid
from unpoison.data.sources import open_images
from unpoison.defenses.cbpt import CBPTConfig
from unpoison.defenses.dummies import invert, loud, quiet
from unpoison.defenses.shots import choose_shots
from unpoison.evaluation.embeddings import ready
from unpoison.models.clip_files import load_any_clip
from unpoison.models.zero_shot import TEMPLATES, class_embeddings
from unpoison.runs import Run

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs/inverted_triggers.jpg"
SIDE, LINE, GAP = 96, 14, 6
COLUMNS = ("clean image", "true trigger on", "what it adds", "inverted, quiet", "inverted, loud")


def added(change: torch.Tensor) -> Image.Image:
    """A change [3, h, w] on grey, stretched to full contrast."""
    shown = 0.5 + change / (2 * change.abs().max().clamp_min(1e-8))
    return Image.fromarray((255 * shown).round().to(torch.uint8).permute(1, 2, 0).numpy())


def row_of(victim: GridClip, shared: Path, row: int) -> list[Image.Image]:
    images = open_images(f"{shared}/data/cifar10/train.parquet[30000:31000]")
    poisoning, clip = victim.poisoning, load_any_clip(victim.model)
    assert isinstance(poisoning, PairPoisoning)  # noqa: S101 # one backdoor each
    target, run, config = images.class_names.index(poisoning.target_name), Run(), CBPTConfig()
    with ready(clip, run):
        clip.module.requires_grad_(False)
        shots = choose_shots(images, config.shots, clip.image_size, run=run).learnt
        classes = class_embeddings(clip, images.class_names, TEMPLATES).float()
        forms = (quiet(config.inversion), loud(config.inversion, config.loud[-1], config.loud_steps))
        dummies = [invert(clip, shots, classes, target, how, stream=how.keep, run=run) for how in forms]
    picture = images.decode([row])[0]
    assert isinstance(picture, Image.Image)  # noqa: S101 # the data set's own image
    worn = to_pil(poisoning.make_trigger().apply(to_tensor([picture]), seed=poisoning.seed, ids=["a"]))[0]
    difference = torch.from_numpy(np.asarray(worn, dtype=np.float32) - np.asarray(picture, dtype=np.float32))
    return [picture, worn, added(difference.permute(2, 0, 1)), *(added(dummy.pattern) for dummy in dummies)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", nargs="+", default=["badnet-stripes", "blended-text", "badclip"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", type=int, default=7)
    parser.add_argument("--bench", type=Path, default=BENCH)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    args = parser.parse_args()
    torch.set_num_threads(1)
    grid = read_grid(GRID)
    clips = {attack: find_clip(grid, args.bench, attack, args.seed) for attack in args.attack}
    rows = [(attack, row_of(clip, args.shared, args.row)) for attack, clip in clips.items()]
    sheet = Image.new("RGB", (len(COLUMNS) * (SIDE + GAP), LINE + len(rows) * (SIDE + LINE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        draw.text((column * (SIDE + GAP) + 2, 0), name, fill="black")
    for place, (attack, tiles) in enumerate(rows):
        top = LINE + place * (SIDE + LINE + GAP)
        draw.text((2, top), attack, fill="black")
        for column, tile in enumerate(tiles):
            sheet.paste(tile.resize((SIDE, SIDE), Image.Resampling.NEAREST), (column * (SIDE + GAP), top + LINE))
    sheet.save(RESULT, quality=90, subsampling=0)
    print(f"{RESULT.name}: {len(rows)} rows, {RESULT.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
