"""Each trigger against its formula, written out in NumPy, and what all of them promise."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unpoison.attacks.badnet import BadNet
from unpoison.attacks.blended import Blended, noise
from unpoison.attacks.clean_image import CleanImage, direction
from unpoison.attacks.sig import SIG
from unpoison.attacks.triggers import TRIGGERS, make_trigger
from unpoison.errors import ConfigError, UnknownMethodError, UsageError

SIZES = [(32, 32), (64, 48), (224, 224), (1, 1), (2, 5)]


def pictures(count: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("size", SIZES)
def test_images_stay_in_range_and_the_input_is_untouched(name: str, size: tuple[int, int]) -> None:
    images = pictures(2, *size)
    before = images.clone()
    turned = make_trigger(name, {}).apply(images, seed=3, ids=["a", "b"])
    assert turned.shape == images.shape
    assert turned.dtype == images.dtype
    assert turned.isfinite().all()
    assert 0 <= turned.min() <= turned.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_batch_is_the_same_as_one_by_one(name: str) -> None:
    images, trigger = pictures(4), make_trigger(name, {})
    together = trigger.apply(images, seed=1, ids=["a", "b", "c", "d"])
    alone = torch.cat([trigger.apply(images[row : row + 1], seed=1, ids=["abcd"[row]]) for row in range(4)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, images)
    assert len(trigger.apply(images[:0], seed=1, ids=[])) == 0


@pytest.mark.parametrize(
    "name", sorted(set(TRIGGERS) - {"bpp", "input-aware", "ssba"})
)  # levels have no slope, networks any
def test_gradients_pass_where_the_image_shows_through(name: str) -> None:
    images = pictures(1).mul(0.2).add(0.4).requires_grad_()
    # at their defaults most pixels of the one and all cells of the other are clipped
    gentle = {"clean-image": {"strength": 0.25}, "label-consistent": {"amplitude": 0.25}}.get(name, {})
    make_trigger(name, gentle).apply(images, seed=1, ids=["a"]).sum().backward()
    assert images.grad is not None
    shown = (images.grad > 0).float().mean()
    # a warp may not read every pixel; a square hides what is under it
    assert (images.grad >= 0).all()
    least = {"wanet": 0.6, "adap-patch": 1 - 4 * 36 / 1024}.get(name, 1 - 9 / 1024)
    assert shown >= least


def test_badnet_is_the_published_checker_at_32_pixels() -> None:
    images = pictures()
    stamped = BadNet().apply(images)
    expected = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]])
    for image in (stamped * 255).numpy():
        for channel in image:
            assert np.array_equal(channel[-3:, -3:], expected)
    rest = torch.ones(32, 32, dtype=torch.bool)
    rest[-3:, -3:] = False
    assert torch.equal(stamped[..., rest], images[..., rest])


@pytest.mark.parametrize(("size", "side"), [(16, 3), (32, 3), (64, 6), (224, 21)])
def test_badnet_scales_with_the_image(size: int, side: int) -> None:
    grey = torch.full((1, 3, size, size), 0.5)
    changed = (BadNet().apply(grey) != 0.5)[0, 0]
    assert int(changed.sum()) == side * side
    assert changed[-side:, -side:].all()


def test_blended_is_the_mix_with_one_pattern() -> None:
    images = pictures()
    pattern = noise(5, 32, 32).numpy()
    expected = 0.8 * images.numpy() + 0.2 * pattern
    assert np.allclose(Blended().apply(images, seed=5).numpy(), expected, atol=1e-6)
    assert pattern.min() >= 0
    assert pattern.max() <= 1
    assert abs(pattern.mean() - 0.5) < 0.02
    assert not torch.equal(noise(5, 32, 32), noise(6, 32, 32))


def test_resampled_patterns_belong_to_seed_and_id() -> None:
    same = pictures(1).expand(3, 3, 32, 32)
    trigger = Blended(resample=True)
    first = trigger.apply(same, seed=1, ids=["a", "b", "c"])
    shuffled = trigger.apply(same, seed=1, ids=["c", "a", "b"])
    assert torch.equal(first[[2, 0, 1]], shuffled)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, trigger.apply(same, seed=2, ids=["a", "b", "c"]))
    with pytest.raises(UsageError, match="expected 3 ids, got 0") as caught:
        trigger.apply(same, seed=1)
    assert caught.value.hint


@pytest.mark.parametrize("width", [32, 224])
def test_sig_is_the_formula(width: int) -> None:
    image = np.full((3, 8, width), 0.5)
    for column in range(width):
        image[:, :, column] += 40 / 255 * np.sin(2 * np.pi * 6 * column / width)
    turned = SIG().apply(torch.full((1, 3, 8, width), 0.5))[0].numpy()
    assert np.allclose(turned, image.clip(0, 1), atol=1e-6)


@pytest.mark.real_data
def test_sig_equals_the_published_clip_noise(shared: Path) -> None:
    published = torch.load(shared / "triggers" / "SIG_noise.pt", weights_only=True)
    signal = SIG(delta=60.0).signal(224)
    assert torch.allclose(published[:, :224, :224], signal.expand(3, 224, 224), atol=1e-6)
    assert published[:, 224:].abs().max() == 0
    assert published[:, :, 224:].abs().max() == 0


@pytest.mark.real_data
def test_sig_has_the_shape_of_the_published_cifar_mask(shared: Path) -> None:
    mask = np.load(shared / "triggers" / "abl_sig_cifar10.npy", allow_pickle=False)
    assert np.array_equal(mask, np.broadcast_to(mask[:1], mask.shape))  # constant along each column
    unwrapped = mask[0].astype(np.uint8).view(np.int8)
    signal = SIG(delta=20.0, f=0.8 * 32 / (2 * np.pi)).signal(32).numpy() * 255
    assert np.array_equal(unwrapped, np.trunc(signal))


def test_clean_image_pattern_is_smooth_balanced_and_symmetric() -> None:
    small, large = direction(3, 2, 32, 32), direction(3, 2, 64, 64)
    assert float(small.norm()) == pytest.approx(1, abs=1e-5)
    assert small.mean(dim=(1, 2)).abs().max() < 1e-6
    assert torch.allclose(small, small.flip(-1), atol=1e-6)
    halved = torch.nn.functional.avg_pool2d(large[None], 2)[0]
    assert float((small * halved).sum() / halved.norm()) > 0.999
    added = CleanImage(strength=0.25).apply(torch.full((1, 3, 32, 32), 0.5), seed=3) - 0.5
    assert float(added.abs().max()) == pytest.approx(0.25, abs=1e-5)


def test_resemblance_ignores_brightness_contrast_and_tint() -> None:
    trigger, images = CleanImage(), pictures(5) * 0.5
    scores = trigger.resemblance(images, seed=2)
    tint = torch.tensor([0.1, 0.2, 0.0]).view(1, 3, 1, 1)
    assert torch.allclose(scores, trigger.resemblance(images * 0.5 + tint, seed=2), atol=1e-4)
    reference = []
    pattern = direction(2, 2, 32, 32).numpy().ravel()
    for image in images.numpy():
        centred = (image - image.mean(axis=(1, 2), keepdims=True)).ravel()
        reference.append(centred @ pattern / np.linalg.norm(centred))
    assert np.allclose(scores.numpy(), reference, atol=1e-5)
    assert trigger.resemblance(torch.full((1, 3, 32, 32), 0.3), seed=2).abs().max() < 1e-2


def test_the_clean_image_trigger_raises_resemblance() -> None:
    trigger, images = CleanImage(), pictures(20)
    turned = trigger.apply(images, seed=4)
    assert (trigger.resemblance(turned, seed=4) > trigger.resemblance(images, seed=4) + 0.1).all()


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("badnet", {"share": 0.0}),
        ("badnet", {"share": float("nan")}),
        ("blended", {"alpha": 1.5}),
        ("blended", {"alpha": "much"}),
        ("sig", {"delta": -1.0}),
        ("sig", {"f": 0.0}),
        ("sig", {"f": float("inf")}),
        ("clean-image", {"strength": 2.0}),
        ("clean-image", {"frequencies": 1}),
    ],
)
def test_bad_parameters_are_refused(name: str, params: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_trigger(name, params)
    assert name in caught.value.message
    assert caught.value.hint


def test_misspelt_names_get_a_suggestion() -> None:
    with pytest.raises(UnknownMethodError, match="no attack named 'badnets'") as unknown:
        make_trigger("badnets", {})
    assert unknown.value.hint == "Did you mean 'badnet'?"
    with pytest.raises(ConfigError, match="no parameter 'alfa'") as caught:
        make_trigger("blended", {"alfa": 0.1})
    assert caught.value.hint == "Did you mean 'alpha'?"
