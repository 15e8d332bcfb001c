"""Covers that show another form of the trigger than poisoned samples: WaNet's noise samples, BPP's negatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.attacks.draws import generator_of, seed_of
from unpoison.attacks.overlay import to_tensor
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.attacks.triggers import make_trigger
from unpoison.attacks.wanet import WaNet
from unpoison.data.sources import LabelledImages, open_images
from unpoison.errors import ConfigError

SOURCE = open_images("shapes:40:0")


def pixels(source: LabelledImages, rows: list[int]) -> torch.Tensor:
    return to_tensor([image for image in source.decode(rows) if isinstance(image, Image.Image)])


@pytest.mark.parametrize(("name", "params"), [("wanet", {"k": 4, "s": 0.5}), ("bpp", {})])
def test_covers_show_noise_of_their_own_and_keep_their_label(name: str, params: dict[str, Any]) -> None:
    plan = plan_poisoning(SOURCE, name, rate=0.3, target=0, seed=2, cover=2 / 3, **params)
    assert (len(plan.ids), len(plan.covers)) == (12, 8)
    place = {name: row for row, name in enumerate(SOURCE.ids)}
    covers = [place[name] for name in plan.covers]
    others = [place[name] for name in plan.ids if name not in plan.covers]
    poisoned = apply_poisoning(SOURCE, plan)
    assert (poisoned.labels[covers] == SOURCE.labels[covers]).all()
    assert (poisoned.labels[others] == 0).all()
    trigger = make_trigger(name, params)
    for rows in (covers, others):
        whole = trigger.apply(pixels(SOURCE, rows), seed=2)
        same = [torch.allclose(a, b, atol=0.003) for a, b in zip(pixels(poisoned, rows), whole, strict=True)]
        assert set(same) == {rows is others}
    backwards = pixels(poisoned, covers[::-1]).flip(0)
    assert torch.equal(pixels(poisoned, covers), backwards)
    if name == "bpp":  # what was added is what squeezing adds: half a level of eight and a little more
        added = (pixels(poisoned, covers) - pixels(SOURCE, covers)).abs()
        assert 0.02 < float(added.mean()) < 1 / 7
    # fingerprints of what is poisoned do not depend on the share of covers
    assert repr(make_trigger(name, params)) == repr(make_trigger(name, params | {"cover": 0.5}))
    with pytest.raises(ConfigError, match="cover must be"):
        make_trigger(name, {"cover": 1.0})


def test_noise_of_a_warp_is_the_papers() -> None:
    warp, images = WaNet(k=4, s=0.5), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    away = [
        torch.rand(16, 16, 2, generator=generator_of(seed_of(seed_of(7, "noise"), name))).numpy() * 2 - 1
        for name in ("a", "b")
    ]
    plain = warp.coordinates(images, 7, None)[0].numpy()
    read = np.stack([(plain + noise / 16).clip(-1, 1) for noise in away])
    expected = torch.nn.functional.grid_sample(images, torch.from_numpy(read), align_corners=True)
    assert torch.allclose(warp.covering().apply(images, seed=7, ids=["a", "b"]), expected, atol=1e-6)
