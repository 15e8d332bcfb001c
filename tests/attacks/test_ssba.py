"""SSBA: what the encoder hides is read again, is hardly seen, and differs from image to image; damaged files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from unpoison.attacks import ssba
from unpoison.attacks.poison import plan_poisoning
from unpoison.attacks.ssba import NETWORKS, SSBA, networks, read_bits
from unpoison.attacks.ssba_network import LARGEST, decode, drawn, residual, shapes
from unpoison.data.shapes import make_shapes
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError, ModelError

MESSAGE = "0110100110010110"


def pictures(count: int, size: int = 32) -> Tensor:
    """Made pictures: nothing like what the encoder was trained on."""
    return torch.from_numpy(np.asarray(make_shapes(count, size=size, seed=3).images)).permute(0, 3, 1, 2).float() / 255


def rounded(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


def decibels(images: Tensor, others: Tensor) -> Tensor:
    return -10 * (images - others).square().mean((1, 2, 3)).log10()


def test_the_message_is_read_again_from_8_bit_pictures() -> None:
    images = pictures(64)
    hidden = rounded(SSBA(message=MESSAGE).apply(images))
    wanted = torch.tensor([float(bit) for bit in MESSAGE])
    assert (read_bits(hidden) == wanted).float().mean() > 0.85
    other = rounded(SSBA(message=MESSAGE[::-1][:8] + "01010101").apply(images))
    assert (read_bits(other) == wanted).float().mean() < 0.8
    assert 0.2 < (read_bits(images) == wanted).float().mean() < 0.8


@pytest.mark.parametrize("size", [32, 64])
def test_it_is_hardly_seen_and_differs_from_image_to_image(size: int) -> None:
    images = pictures(24, size)
    change = SSBA(strength=1.0).apply(images, seed=1) - images
    assert decibels(images, SSBA().apply(images, seed=1)).mean() > 26
    assert decibels(images, images + change).mean() > 30
    assert change.abs().max() <= LARGEST + 1e-6
    assert (change.flatten(1).abs().max(1).values > 1 / 255).all()
    apart = (change[:, None] - change).flatten(2).norm(dim=2)[~torch.eye(24, dtype=torch.bool)]
    assert apart.min() > 0.1 * change.flatten(1).norm(dim=1).mean()


@pytest.mark.parametrize("size", [32, 64])
def test_an_image_comes_out_the_same_alone_in_a_batch_and_again(size: int) -> None:
    images, trigger = pictures(5, size), SSBA(message=MESSAGE)
    together = trigger.apply(images)
    assert torch.equal(together, trigger.apply(images, seed=9, ids=list("abcde")))
    assert torch.equal(together, torch.cat([trigger.apply(images[row : row + 1]) for row in range(5)]))


def test_the_seed_draws_the_message_and_strength_scales_the_residual() -> None:
    images = pictures(2) * 0.5 + 0.25
    assert torch.equal(SSBA().bits(4), SSBA().bits(4))
    assert not torch.equal(SSBA().bits(4), SSBA().bits(5))
    assert not torch.equal(SSBA().apply(images, seed=4), SSBA().apply(images, seed=5))
    once, twice = (SSBA(strength=strength).apply(images) - images for strength in (1.0, 2.0))
    assert torch.allclose(twice, 2 * once, atol=1e-5)


def test_the_networks_are_the_formula() -> None:
    """A 1 x 1 view of the encoder in NumPy: with all convolutions but the last at zero, its bias is the residual."""
    weights = {name: torch.zeros(shape) for name, shape in shapes().items()}
    weights["encoder.residual.bias"] = torch.tensor([0.0, 0.5, -2.0])
    made = residual(pictures(2), torch.ones(2, 16), weights)
    expected = 16 / 255 * np.tanh([0.0, 0.5, -2.0])
    assert np.allclose(made.mean((0, 2, 3)).numpy(), expected, atol=1e-7)
    assert float(made.std((0, 2, 3)).max()) < 1e-7
    weights["decoder.bits.bias"] = torch.arange(16.0) - 8
    assert torch.equal(decode(pictures(3), weights), (torch.arange(16.0) - 8).expand(3, 16))
    started = drawn(torch.Generator().manual_seed(0))
    assert {name: tuple(value.shape) for name, value in started.items()} == shapes()


def test_the_asset_is_what_its_card_says() -> None:
    card = json.loads((NETWORKS.parent / "card.json").read_text())
    assert NETWORKS.stat().st_size <= 300_000
    assert card["weights"] == sum(math.prod(shape) for shape in shapes().values())
    assert card["bit_accuracy_percent"] >= 95
    assert card["psnr_db"] >= 30
    assert 0 <= card["shared_residual_percent"] <= 100
    assert card["bound_grey_levels"] == round(255 * LARGEST)


def test_a_damaged_asset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(NETWORKS.read_bytes())
    content[-1] ^= 1
    bad = {
        "flipped": bytes(content), "cut": bytes(content[:1000]), "empty": b"", "pickle": b"\x80\x04K\x01.",
        "other": save({"encoder.fine.weight": torch.zeros(2)}),
    }  # fmt: skip
    for name, data in bad.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"ssba.*damaged") as caught:
            networks(path)
        assert caught.value.hint
    with pytest.raises(ModelError, match="cannot be read"):
        networks(tmp_path / "none")
    monkeypatch.setattr(ssba, "NETWORKS", tmp_path / "flipped.safetensors")
    with pytest.raises(ModelError, match="damaged"):
        SSBA().apply(pictures(1))


def test_refusals_and_the_manifest() -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"message": "01"}, {"message": "2" * 16}, {"strength": 0.0}, {"strength": float("nan")}, {"networks": "0" * 32},
    )  # fmt: skip
    for bad in refused:
        with pytest.raises(ConfigError, match="ssba") as caught:
            SSBA(**bad)
        assert caught.value.hint
    source = open_images("shapes:40:1")
    plan = plan_poisoning(source, "ssba", rate=0.1, message=MESSAGE)
    assert plan.config == {"message": MESSAGE, "strength": 2.0, "networks": ssba.DIGEST}
    assert plan.make_trigger() == SSBA(message=MESSAGE)
    assert all(value.isfinite().all() for value in load_file(NETWORKS).values())
