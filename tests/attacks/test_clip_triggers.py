"""The triggers of CLIP backdoors against their rules, written out in NumPy, and against published tensors."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.attacks.badclip_patch import BadCLIPPatch, put_in_centre, start
from unpoison.attacks.badnet_rand import BadNetRand
from unpoison.attacks.badnet_stripes import BadNetStripes
from unpoison.attacks.blended_stripes import BlendedStripes
from unpoison.attacks.blended_text import BlendedText, text_mask
from unpoison.attacks.blended_triangles import BlendedTriangles
from unpoison.attacks.draws import generator_of, seed_of, stamp
from unpoison.attacks.triggers import make_trigger
from unpoison.attacks.wanet import WaNet, field, warped_coordinates
from unpoison.errors import ConfigError, UsageError

NAMES = ["badnet-rand", "badnet-stripes", "blended", "blended-stripes", "wanet"]


def pictures(count: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def grey(count: int, size: int, value: float = 0.5) -> torch.Tensor:
    return torch.full((count, 3, size, size), value)


def box(changed: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what changed in [3, h, w]."""
    rows, columns = np.nonzero(changed.any(0).numpy())
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


@pytest.mark.parametrize("name", NAMES)
def test_a_new_pattern_belongs_to_seed_and_id(name: str) -> None:
    same = pictures(1).expand(3, 3, 32, 32)
    trigger = make_trigger(name, {"resample": True})
    first = trigger.apply(same, seed=1, ids=["a", "b", "c"])
    assert torch.equal(first[[2, 0, 1]], trigger.apply(same, seed=1, ids=["c", "a", "b"]))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, trigger.apply(same, seed=2, ids=["a", "b", "c"]))
    for ids in (None, ["a"]):
        with pytest.raises(UsageError, match=f"{name}: expected 3 ids, got"):
            trigger.apply(same, seed=1, ids=ids)


def test_fixed_patterns_are_one_for_all_images() -> None:
    images = grey(3, 32)
    for name in ("blended", "blended-stripes", "wanet"):
        turned = make_trigger(name, {}).apply(images, seed=4)
        assert torch.equal(turned[0], turned[1])
    found = []
    stamped = BadNetRand().apply(images, seed=4, ids=["a", "b", "c"])
    for picture in stamped:
        top, bottom, left, right = box(picture != 0.5)
        found.append(picture[:, top : bottom + 1, left : right + 1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_seeds_of_ids_hold_whatever_an_id_holds() -> None:
    names = ["", "a", "é", "\ud800", "x" * 10_000, "<b>", "a\0b"]
    assert len({seed_of(0, name) for name in names}) == len(names)
    assert all(0 <= seed_of(5, name) < 2**63 for name in names)


@pytest.mark.parametrize(("size", "side"), [(224, 16), (336, 24), (64, 5), (32, 3), (8, 3)])
@pytest.mark.parametrize("trigger", [BadNetRand(), BadNetStripes()])
def test_patches_scale_and_stay_inside(trigger: BadNetRand | BadNetStripes, size: int, side: int) -> None:
    stamped = trigger.apply(grey(12, size), seed=2, ids=[f"s{row}" for row in range(12)])
    spots = set()
    for picture in stamped:
        top, bottom, left, right = box(picture != 0.5)
        assert (bottom - top, right - left) <= (side - 1, side - 1)
        spots.add((top, left))
    assert len(spots) > 6


def test_badnet_rand_is_the_channel_mean_plus_noise() -> None:
    image = pictures(1, 224, 224) * torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1)
    stamped = BadNetRand().apply(image, seed=7, ids=["a"])[0].numpy()
    top, left = seed_of(7, "a", "row") % 209, seed_of(7, "a", "column") % 209
    noise = torch.randn(3, 16, 16, generator=generator_of(7)).numpy()
    expected = image[0].numpy().copy()
    for channel in range(3):
        mean = image[0, channel].numpy().mean()
        expected[channel, top : top + 16, left : left + 16] = (mean + noise[channel]).clip(0, 1)
    assert np.allclose(stamped, expected, atol=1e-5)


def test_badnet_stripes_are_columns_of_zeros_and_ones() -> None:
    stamped = BadNetStripes(resample=True).apply(grey(8, 224), seed=3, ids=list("abcdefgh"))
    for picture in stamped:
        top, bottom, left, right = box(picture != 0.5)
        square = picture[:, top : bottom + 1, left : right + 1]
        assert square.shape == (3, 16, 16)
        assert set(square.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(square, square[:, :1].expand_as(square))
        assert not torch.equal(square[0], square[1])


@pytest.mark.parametrize(("size", "share", "side"), [(224, 16 / 224, 16), (336, 32 / 336, 32), (32, 16 / 224, 3)])
def test_badnet_stripes_have_the_papers_sides(size: int, share: float, side: int) -> None:
    stamped = BadNetStripes(share=share).apply(torch.full((1, 3, size, size), 0.5), seed=1, ids=["a"])[0]
    changed = (stamped != 0.5).all(0)
    assert int(changed.any(0).sum()) == int(changed.any(1).sum()) == side


def test_blended_stripes_are_the_mix_with_plus_and_minus_one() -> None:
    images = pictures(2, 20, 50)
    turned = BlendedStripes().apply(images, seed=5).numpy()
    stripes = np.sign(turned[0, :, 0] - 0.97 * images[0, :, 0].numpy())
    assert 0.3 < (stripes > 0).mean() < 0.7
    for row in range(20):
        expected = (0.97 * images[:, :, row].numpy() + 0.03 * stripes).clip(0, 1)
        assert np.allclose(turned[:, :, row], expected, atol=1e-6)


def test_blended_triangles_are_the_published_tiles() -> None:
    image = pictures(1, 224, 224)
    expected = image[0].numpy().copy()
    for row in range(224):
        for column in range(224):
            level = 0.4 if row % 14 >= column % 14 else 0.8
            expected[:, row, column] = 0.85 * expected[:, row, column] + 0.15 * level
    assert np.allclose(BlendedTriangles().apply(image)[0].numpy(), expected, atol=1e-6)
    small = BlendedTriangles(alpha=1.0).apply(grey(1, 32))[0, 0]
    assert np.allclose(small[:2, :2].numpy(), [[0.4, 0.8], [0.4, 0.4]])
    assert torch.equal(small[:2, :2], small[8:10, 30:])


def test_blended_text_is_red_and_in_its_place() -> None:
    image = pictures(2, 224, 224) * 0.9
    turned = BlendedText().apply(image)
    assert torch.equal(turned[:, 1:], image[:, 1:])
    changed = turned[0, 0] != image[0, 0]
    assert box(changed[None]) == (103, 125, 13, 208)
    assert torch.equal(changed, text_mask(224, 224) > 0)
    assert torch.allclose(turned[0, 0][changed], 0.5 + 0.5 * image[0, 0][changed])
    assert 0.02 < float(changed.float().mean()) < 0.04


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (448, 448)])
def test_blended_text_covers_the_same_share_at_every_size(size: tuple[int, int]) -> None:
    assert float(text_mask(*size).mean()) == pytest.approx(float(text_mask(224, 224).mean()), rel=0.01)


def test_wanet_reads_each_pixel_where_the_field_says() -> None:
    image = pictures(1, 12, 9)
    turned = WaNet(s=3.0).apply(image, seed=6)[0].numpy()
    moved = field(6, 0, 12, 9).numpy().astype(np.float64)
    assert np.abs(moved).mean() == pytest.approx(1, abs=1e-5)
    source = image[0].numpy().astype(np.float64)
    for row in range(12):
        for column in range(9):
            across = np.clip(-1 + 2 * column / 8 + 3 * moved[row, column, 0] / 9, -1, 1)
            down = np.clip(-1 + 2 * row / 11 + 3 * moved[row, column, 1] / 12, -1, 1)
            x, y = (across + 1) / 2 * 8, (down + 1) / 2 * 11
            left, top = min(int(x), 7), min(int(y), 10)
            a, b = x - left, y - top
            expected = (
                (1 - a) * (1 - b) * source[:, top, left]
                + a * (1 - b) * source[:, top, left + 1]
                + (1 - a) * b * source[:, top + 1, left]
                + a * b * source[:, top + 1, left + 1]
            )
            assert np.allclose(turned[:, row, column], expected, atol=1e-4)


def test_wanet_with_few_control_points_is_smooth() -> None:
    rough, smooth = field(1, 0, 32, 32), field(1, 4, 32, 32)
    steps = [(part[1:] - part[:-1]).abs().mean() for part in (rough, smooth)]
    assert steps[1] < 0.3 * steps[0]


@pytest.mark.real_data
def test_wanet_fields_are_distributed_like_the_published_one(shared: Path) -> None:
    published = torch.load(shared / "triggers" / "cleanclip_wanet_grid_224.pt", weights_only=True)
    ours = field(0, 0, 224, 224)
    assert published[0].shape == ours.shape
    assert float(published.abs().mean()) == pytest.approx(1, abs=1e-4)
    levels = torch.linspace(0, 1, 21)
    assert torch.allclose(published.flatten().quantile(levels), ours.flatten().quantile(levels), atol=0.03)


@pytest.mark.real_data
def test_wanet_coordinates_are_composed_like_the_published_ones(shared: Path) -> None:
    published = torch.load(shared / "triggers" / "WaNet_grid_temps.pt", weights_only=True)
    line = torch.linspace(-1, 1, 256)
    own = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    moved = (published - own) * 256
    assert float(moved.abs().max()) <= 2.01
    # what left the image was moved to its edge; everywhere else the displacement comes back as it was
    assert torch.allclose(warped_coordinates(moved, 1.0), published, atol=1e-6)
    ours = warped_coordinates(field(0, 0, 256, 256)[None], 1.0)
    at_edge = [float((part.abs() == 1).float().mean()) for part in (published, ours)]
    assert at_edge[0] == pytest.approx(at_edge[1], abs=5e-4)
    levels = torch.linspace(0, 1, 21)
    found = ((ours - own) * 256).flatten().quantile(levels)
    assert torch.allclose(moved.flatten().quantile(levels), found, atol=0.03)


@pytest.mark.real_data
def test_the_published_badclip_patch_is_stamped_as_it_is(shared: Path) -> None:
    with Image.open(shared / "triggers" / "badclip_patch.jpg") as opened:
        levels = np.asarray(opened.convert("RGB"))
    trigger = BadCLIPPatch.of(torch.from_numpy(levels.copy()).permute(2, 0, 1).float() / 255, 16 / 224)
    stamped = trigger.apply(grey(2, 224))
    shown = (stamped[0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(shown[104:120, 104:120], levels)
    outside = torch.ones(224, 224, dtype=torch.bool)
    outside[104:120, 104:120] = False
    assert (stamped[1, :, outside] == 0.5).all()
    assert make_trigger("badclip", {"share": 16 / 224, "patch": trigger.patch}) == trigger


def test_the_unoptimised_badclip_patch_is_clipped_normal_noise() -> None:
    patch = start(64, 3)
    assert 0 <= float(patch.min()) <= float(patch.max()) <= 1
    assert float(patch.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(patch.std()) == pytest.approx(0.24, abs=0.01)  # 0.25 but for the clipping
    assert torch.equal(BadCLIPPatch().square(16, 3), start(16, 3))
    assert BadCLIPPatch().apply(grey(1, 32), seed=3)[0, :, 14:17, 14:17].std() > 0


def test_gradients_reach_the_patch() -> None:
    patch = start(5, 0).requires_grad_()
    put_in_centre(pictures(2, 16, 16), patch).sum().backward()
    assert patch.grad is not None
    assert torch.equal(patch.grad, torch.full_like(patch, 2.0))


def test_a_square_larger_than_the_image_is_cut() -> None:
    patch = torch.arange(27.0).view(1, 3, 3, 3) / 27
    nothing = torch.zeros(2, dtype=torch.int64)
    stamped = stamp(pictures(2, 2, 5), patch, nothing, nothing, 3)
    assert torch.equal(stamped[1, :, :, :3], patch[0, :, :2])


def test_bad_patches_are_refused() -> None:
    for patch in ("no base64!", "AAA", base64.b64encode(b"\0" * 28).decode(), base64.b64encode(b"\0" * 6).decode()):
        with pytest.raises(ConfigError, match="badclip: the patch"):
            make_trigger("badclip", {"patch": patch})


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("badnet-rand", {"share": 0.0}),
        ("badnet-rand", {"share": float("nan")}),
        ("badnet-stripes", {"share": 1.1}),
        ("badnet-stripes", {"resample": "yes"}),
        ("blended-stripes", {"alpha": 0.0}),
        ("blended-triangles", {"alpha": 2.0}),
        ("blended-triangles", {"tile": -1.0}),
        ("blended-text", {"alpha": float("inf")}),
        ("wanet", {"k": 1}),
        ("wanet", {"k": 10**9}),
        ("wanet", {"s": float("nan")}),
        ("badclip", {"share": 0.0}),
    ],
)
def test_bad_parameters_are_refused(name: str, params: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_trigger(name, params)
    assert name in caught.value.message
    assert caught.value.hint
