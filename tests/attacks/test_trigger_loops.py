"""Every trigger against a loop over single images, and what holds for all of them at any size and dtype."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from unpoison.attacks.adap_blend import AdapBlend
from unpoison.attacks.adap_patch import AdapPatch, corners
from unpoison.attacks.badnet_grid import BadNetGrid
from unpoison.attacks.blended import noise
from unpoison.attacks.bpp import BPP
from unpoison.attacks.ctrl import CTRL, chrominance
from unpoison.attacks.dct import cosines
from unpoison.attacks.draws import generator_of, seed_of
from unpoison.attacks.label_consistent import LabelConsistent
from unpoison.attacks.lf import LF, pattern
from unpoison.attacks.nashville import Nashville
from unpoison.attacks.triggers import TRIGGERS, as_planted, make_trigger
from unpoison.errors import ConfigError, UsageError

NAMES = sorted(TRIGGERS)
SIZES = [(32, 32), (8, 11), (40, 64)]


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks/trigger_loops.py"
    spec = importlib.util.spec_from_file_location("trigger_loops", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(count: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    levels = torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def spectrum_of(values: np.ndarray) -> np.ndarray:
    return np.asarray(dctn(values, axes=(-2, -1), norm="ortho"))


def rows(images: torch.Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).numpy())


def names_of(count: int) -> list[str]:
    return [f"s{row}" for row in range(count)]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    count=st.integers(0, 3),
    seed=st.integers(0, 2**62),
    planted=st.booleans(),
)
def test_any_size_any_seed(name: str, height: int, width: int, count: int, seed: int, planted: bool) -> None:
    images, ids = pictures(count, height, width), names_of(count)
    trigger = make_trigger(name, {})
    trigger = as_planted(trigger) if planted else trigger
    before = images.clone()
    turned = trigger.apply(images, seed=seed, ids=ids)
    assert turned.shape == images.shape
    assert turned.isfinite().all()
    assert torch.equal(images, before)
    assert torch.equal(turned, trigger.apply(images, seed=seed, ids=ids))
    if count:
        assert 0 <= turned.min() <= turned.max() <= 1
        assert torch.equal(turned[-1:], trigger.apply(images[-1:], seed=seed, ids=ids[-1:]))
        assert not torch.equal(turned, images)


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_and_devices(name: str, planted: bool) -> None:
    trigger = make_trigger(name, {})
    trigger = as_planted(trigger) if planted else trigger
    images, ids = pictures(2), names_of(2)
    expected = trigger.apply(images, seed=1, ids=ids)
    for dtype, error in ((torch.float64, 1e-5), (torch.bfloat16, 0.04)):
        turned = trigger.apply(images.to(dtype), seed=1, ids=ids)
        assert turned.dtype == dtype
        off = (turned.float() - expected).abs()
        # a rounding of the input may end in another of the eight levels
        assert float(off.mean()) < (0.2 if name == "bpp" and dtype == torch.bfloat16 else error)
    # the device without memory: what stays on the CPU beside the images is refused there
    away = trigger.apply(images.to("meta"), seed=1, ids=ids)
    assert (away.device.type, away.shape) == ("meta", images.shape)


@pytest.mark.parametrize("size", SIZES)
def test_the_grid_is_pasted(loops: ModuleType, size: tuple[int, int]) -> None:
    images, ids = pictures(4, *size), names_of(4)
    side = max(3, round(16 / 224 * min(size)))
    for name, image, turned in zip(ids, rows(images), rows(BadNetGrid().apply(images, seed=5, ids=ids)), strict=True):
        top, left = (
            seed_of(5, name, what) % (extent - side + 1) for what, extent in zip(("row", "column"), size, strict=True)
        )
        assert np.array_equal(turned, loops.stamped(image, loops.grid_patch(side), top, left))


def test_the_grid_at_224_pixels_is_eight_by_eight_dots() -> None:
    stamped = BadNetGrid().apply(torch.full((1, 3, 224, 224), 0.5), seed=0, ids=["a"])[0]
    changed = stamped[0] != 0.5
    assert int(changed.sum()) == 256
    assert int((stamped[0] == 1).sum()) == 64


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (2, 9)])
@pytest.mark.parametrize("levels", [2, 8, 256])
def test_dithering_is_the_raster_loop_to_the_last_bit(loops: ModuleType, size: tuple[int, int], levels: int) -> None:
    images = torch.rand(2, 3, *size, generator=generator_of(1))
    for image, turned in zip(rows(images), rows(BPP(levels=levels).apply(images)), strict=True):
        assert np.array_equal(turned, loops.dithered(image, levels).astype(np.float32))


def test_dithering_keeps_the_mean_and_has_the_levels() -> None:
    grey = torch.full((1, 3, 64, 64), 0.4)
    turned = BPP().apply(grey)
    assert float(turned.mean()) == pytest.approx(0.4, abs=0.003)
    assert set((turned * 7).round(decimals=4).unique().tolist()) == {2.0, 3.0}
    assert torch.equal(BPP(dither=False).apply(grey), torch.full_like(grey, 3) / 7)


@pytest.mark.parametrize("size", [*SIZES, (224, 224), (32, 33)])
def test_ctrl_raises_two_coefficients_of_the_chrominance(loops: ModuleType, size: tuple[int, int]) -> None:
    images = pictures(2, *size)
    for image, turned in zip(rows(images), rows(CTRL().apply(images)), strict=True):
        assert np.allclose(turned, loops.chrominance_raised(image, 100.0), atol=2e-3)  # the matrices' three digits
    weak = CTRL().planted().apply(images)
    assert weak.sub(images).abs().max() < 0.6 * CTRL().apply(images).sub(images).abs().max()


def test_ctrl_leaves_the_luminance() -> None:
    added = CTRL().apply(torch.full((1, 3, 32, 32), 0.5))[0].double() - 0.5
    luma = 0.299 * added[0] + 0.587 * added[1] + 0.114 * added[2]
    assert float(luma.abs().max()) < 1e-3 * float(added.abs().max())
    spectrum = spectrum_of(added[2].numpy() * 255 / 2.032)
    assert spectrum[15, 15] == pytest.approx(100, rel=1e-4)
    assert spectrum[31, 31] == pytest.approx(100, rel=1e-4)
    spectrum[[15, 31], [15, 31]] = 0
    assert np.abs(spectrum).max() < 1e-3


def test_the_cosines_are_scipys_and_orthonormal() -> None:
    square = torch.rand(12, 12, dtype=torch.float64, generator=generator_of(0))
    basis = cosines(12, 12)
    assert np.allclose(basis @ square @ basis.T, spectrum_of(square.numpy()))
    assert torch.allclose(basis @ basis.T, torch.eye(12, dtype=torch.float64))
    assert torch.equal(cosines(12, 3), basis[:3])


@pytest.mark.parametrize("size", SIZES)
def test_low_frequencies_are_a_sum_of_cosines(loops: ModuleType, size: tuple[int, int]) -> None:
    images = pictures(2, *size)
    weights = torch.randn(3, 4, 4, generator=generator_of(9), dtype=torch.float64).numpy()
    weights[:, 0, 0] = 0
    for image, turned in zip(rows(images), rows(LF().apply(images, seed=9)), strict=True):
        assert np.allclose(turned, loops.low_frequencies(image, weights, 24.0), atol=1e-5)


def test_low_frequencies_end_at_the_cutoff_and_hold_at_every_size() -> None:
    waves = pattern(3, 5, 32, 32)
    spectrum = np.abs(spectrum_of(waves.numpy()))
    assert spectrum[:, :5, :5].max() > 1
    spectrum[:, :5, :5] = 0
    assert spectrum.max() < 1e-4
    assert float(waves.abs().max()) == pytest.approx(1)
    halved = torch.nn.functional.avg_pool2d(pattern(3, 5, 64, 64)[None], 2)[0]
    assert float(torch.nn.functional.cosine_similarity(waves.flatten(), halved.flatten(), dim=0)) > 0.995
    assert not torch.equal(waves, pattern(4, 5, 32, 32))


@pytest.mark.parametrize("name", ["lf"])
def test_a_new_pattern_belongs_to_seed_and_id(name: str) -> None:
    same = pictures(1).expand(3, 3, 32, 32)
    trigger = make_trigger(name, {"resample": True})
    first = trigger.apply(same, seed=1, ids=["a", "b", "c"])
    assert torch.equal(first[[2, 0, 1]], trigger.apply(same, seed=1, ids=["c", "a", "b"]))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, trigger.apply(same, seed=2, ids=["a", "b", "c"]))
    with pytest.raises(UsageError, match=f"{name}: expected 3 ids, got 0"):
        trigger.apply(same, seed=1)


def test_nashville_is_the_css_filter(loops: ModuleType) -> None:
    images = pictures(2)
    for image, turned in zip(rows(images), rows(Nashville().apply(images)), strict=True):
        assert np.allclose(turned, loops.nashville(image), atol=1e-5)
    half = Nashville(strength=0.5).apply(images)
    assert torch.allclose(half, (images + Nashville().apply(images)) / 2, atol=1e-6)
    black = Nashville().apply(torch.zeros(1, 3, 1, 1)).flatten()
    assert black[2] > black[0]  # lifted toward blue
    assert black[2] > 0.15


@pytest.mark.parametrize(("size", "side"), [((32, 32), 3), ((64, 70), 6), ((16, 12), 3)])
def test_checkers_are_in_four_corners(loops: ModuleType, size: tuple[int, int], side: int) -> None:
    images = pictures(2, *size)
    for image, turned in zip(rows(images), rows(LabelConsistent(amplitude=0.3).apply(images)), strict=True):
        assert np.allclose(turned, loops.corner_checkers(image, side, 0.3), atol=1e-6)
    one = LabelConsistent(corners=1).apply(images)
    assert torch.equal(one[:, :, :-side], images[:, :, :-side])
    if size == (32, 32):
        assert torch.equal(one[..., -3:, -3:], make_trigger("badnet", {}).apply(images)[..., -3:, -3:])


@pytest.mark.parametrize("size", SIZES)
def test_pieces_in_training_and_the_whole_at_test_time(loops: ModuleType, size: tuple[int, int]) -> None:
    images, ids = pictures(5, *size), names_of(5)
    trigger, drawn = AdapBlend(), noise(4, *size).permute(1, 2, 0).numpy()
    for image, turned in zip(rows(images), rows(trigger.apply(images, seed=4)), strict=True):
        assert np.allclose(turned, loops.blended(image, drawn, 0.2), atol=1e-6)
    seen = set()
    for name, image, turned in zip(
        ids, rows(images), rows(trigger.planted().apply(images, seed=4, ids=ids)), strict=True
    ):
        order = torch.randperm(16, generator=generator_of(seed_of(seed_of(4, "pieces"), name))).numpy()
        shown = (order < 8).reshape(4, 4)
        assert np.allclose(turned, loops.some_pieces(image, drawn, shown, 0.15), atol=1e-6)
        seen.add(shown.tobytes())
    assert len(seen) == 5
    with pytest.raises(UsageError, match="adap-blend: expected 5 ids"):
        trigger.planted().apply(images, seed=4)


@pytest.mark.parametrize(("size", "side"), [((32, 32), 6), ((40, 64), 8)])
def test_one_faint_patch_in_training_and_all_at_test_time(loops: ModuleType, size: tuple[int, int], side: int) -> None:
    images, ids = pictures(12, *size), names_of(12)
    placed = corners(7, side, *size)[0].permute(0, 2, 3, 1).numpy()
    squares = [placed[0, :side, :side], placed[1, :side, -side:], placed[2, -side:, :side], placed[3, -side:, -side:]]
    assert all(set(np.unique(square)) == {0.0, 1.0} for square in squares)
    for image, turned in zip(rows(images), rows(AdapPatch().apply(images, seed=7)), strict=True):
        assert np.allclose(turned, loops.corner_patches(image, squares, (1, 1, 1, 1)), atol=1e-6)
    planted = AdapPatch().planted().apply(images, seed=7, ids=ids)
    which = [seed_of(7, name, "patch") % 4 for name in ids]
    assert set(which) == {0, 1, 2, 3}
    for corner, image, turned in zip(which, rows(images), rows(planted), strict=True):
        alphas = [opacity if corner == place else 0 for place, opacity in enumerate((0.5, 0.2, 0.5, 0.3))]
        assert np.allclose(turned, loops.corner_patches(image, squares, alphas), atol=1e-6)


def test_the_older_triggers_are_their_loops_too(loops: ModuleType) -> None:
    images = pictures(2)
    field = importlib.import_module("unpoison.attacks.wanet").field(3, 4, 32, 32).numpy()
    cases = {
        "blended": lambda image: loops.blended(image, noise(3, 32, 32).permute(1, 2, 0).numpy(), 0.2),
        "blended-triangles": lambda image: loops.triangles(image, 2, 0.15),
        "sig": lambda image: loops.sinusoid(image, 40.0, 6.0),
        "wanet": lambda image: loops.warped(image, field, 0.5),
    }
    for name, loop in cases.items():
        params = {"k": 4, "s": 0.5} if name == "wanet" else {}
        for image, turned in zip(rows(images), rows(make_trigger(name, params).apply(images, seed=3)), strict=True):
            assert np.allclose(turned, loop(image), atol=2e-5), name


@pytest.mark.parametrize("size", [32, 48])
def test_the_benchmark_has_a_loop_for_each_trigger(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("triggers")
    loops_of_size = benchmark.image_loops(size)
    assert set(loops_of_size) == set(TRIGGERS)
    images = pictures(2, size, size)
    for name in ("low-gap", "feature-small", "input-aware", "ssba"):
        assert benchmark.largest_difference(name, loops_of_size[name], images, names_of(2)) < 0.05, name


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("badnet-grid", {"share": 0.0}),
        ("bpp", {"levels": 1}),
        ("lf", {"delta": float("nan")}),
        ("lf", {"cutoff": 1}),
        ("ctrl", {"magnitude": 0.0}),
        ("ctrl", {"high": 32}),
        ("nashville", {"strength": -1.0}),
        ("label-consistent", {"amplitude": 2.0}),
        ("label-consistent", {"corners": 3}),
        ("adap-blend", {"cover": 1.0}),
        ("adap-blend", {"shown": 0.0}),
        ("adap-blend", {"pieces": 0}),
        ("adap-patch", {"planted_alphas": [0.5, 0.2, 0.5]}),
        ("adap-patch", {"planted_alphas": [0.5, 0.2, 0.5, float("nan")]}),
    ],
)
def test_bad_parameters_are_refused(name: str, params: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_trigger(name, params)
    assert name in caught.value.message
    assert caught.value.hint


def test_the_pattern_of_magnitude_one_is_what_the_docs_say() -> None:
    waves = chrominance(15, 31, 32, 32)
    assert torch.allclose(waves[2] / waves[0], torch.full((32, 32), 2.032 / 1.140), atol=1e-3)
