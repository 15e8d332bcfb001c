"""The picture of all triggers in docs/attacks.md, made from the shapes world.

    python recipes/trigger_picture.py

One picture of the built-in world at 112 px under every trigger with its default parameters, as test samples show it;
where training samples show another form, that form stands beside it.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unpoison.attacks.overlay import to_pil, to_tensor
from unpoison.attacks.triggers import TRIGGERS, PlantedOtherwise, Trigger, make_trigger
from unpoison.data.shapes import make_shapes

RESULT = Path(__file__).parents[1] / "docs/triggers.jpg"
SIDE, LINE, COLUMNS, ROW = 112, 14, 7, 10


def main() -> None:
    picture = Image.fromarray(np.asarray(make_shapes(ROW + 1, size=SIDE, seed=1).images[ROW]))
    tiles: list[tuple[str, Image.Image]] = [("no trigger", picture)]
    for name in TRIGGERS:
        trigger = make_trigger(name, {})
        forms: list[tuple[str, Trigger]] = [(name, trigger)]
        if isinstance(trigger, PlantedOtherwise):
            forms.append(("in training", trigger.planted()))
        for label, form in forms:
            tiles.append((label, to_pil(form.apply(to_tensor([picture]), seed=1, ids=["a"]))[0]))
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 6), rows * (SIDE + LINE + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (label, tile) in enumerate(tiles):
        left, top = index % COLUMNS * (SIDE + 6), index // COLUMNS * (SIDE + LINE + 6)
        draw.text((left + 2, top), label, fill="black")
        sheet.paste(tile, (left, top + LINE))
    sheet.save(RESULT, quality=90, subsampling=0)
    print(f"{RESULT.name}: {len(tiles)} tiles, {RESULT.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
