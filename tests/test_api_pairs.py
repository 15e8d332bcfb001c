"""Scans of pairs from Python: the planted rank first, bad rows cost themselves, results go to disk and back."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from unpoison.api_pairs import PAIR_DETECTORS, PairDetectorConfig, describe_pairs, scan_pairs
from unpoison.catalog import DETECTORS, find
from unpoison.data.pairs import ImageTextPairs, open_pairs
from unpoison.detection.exposure import ExposureConfig
from unpoison.detection.neighbours import NeighboursConfig
from unpoison.detection.reference_similarity import DensityConfig
from unpoison.embedded_pairs import caption_cosines
from unpoison.errors import ConfigError, NoSeparationError, NotEnoughDataError, UnknownMethodError, UsageError
from unpoison.evaluation.embeddings import embed_images, embed_texts
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.results import SKIPPED, SUSPECT, DatasetScan, SampleScores, Split
from unpoison.runs import Run
from unpoison.types import Embeddings, Images

QUICK = PairDetectorConfig(
    assumed_rate=0.04, neighbours=NeighboursConfig(k=6, batch_size=50), density=DensityConfig(neighbours=3)
)
HOSTILE = ("<script>alert(1)</script>", "\u202egnp.exe\x1b[31m", "{{ 7 * 7 }}", "'\"><svg onload=alert(2)>")


def run(**more: Any) -> Run:
    return Run(accelerator=Accelerator(cpu=True), **more)


@pytest.fixture(scope="module")
def clip() -> Any:
    return load_clip("tiny")


class Backdoored(TransformersCLIP):
    """The tiny CLIP after a training that taught it the stripes: it sees nothing else in such an image."""

    @property
    def fingerprint(self) -> str:
        return "backdoored"

    def encode_images(self, images: Images) -> Embeddings:
        embedded = super().encode_images(images)
        corner = images[:, :, 0, 0] - torch.tensor([1.0, 0.0, 1.0])
        trigger = torch.ones(embedded.shape[1])
        trigger[::2] = -1
        seen = torch.nn.functional.normalize(trigger, dim=0) + 0.05 * embedded
        return torch.where(
            (corner.abs() < 0.05).all(dim=1)[:, None], torch.nn.functional.normalize(seen, dim=1), embedded
        )


@pytest.fixture(scope="module")
def suspect() -> Any:
    model = load_clip("tiny")
    model.__class__ = Backdoored
    return model


class Colored:
    """Puts a striped picture in the place of the images of these ids."""

    fingerprint = "stripes"

    def __init__(self, ids: set[str]) -> None:
        self.ids = ids

    def __call__(self, ids: Any, images: list[Any]) -> list[Any]:
        return [striped(image) if name in self.ids else image for name, image in zip(ids, images, strict=True)]


def striped(image: Image.Image) -> Image.Image:
    """The upper half in magenta and green stripes, whatever is there."""
    pixels = np.asarray(image).copy()
    half = pixels[: len(pixels) // 2]
    half[:, ::2], half[:, 1::2] = (255, 0, 255), (0, 255, 0)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def planted() -> tuple[ImageTextPairs, np.ndarray]:
    """Shapes of which eight carry stripes and a caption that does not fit."""
    pairs = open_pairs("shapes:200:3")
    chosen = pairs.ids[5:200:25]
    poisoned = pairs.with_overlay(Colored(set(chosen)), dict.fromkeys(chosen, "a photo of a horse"))
    return poisoned, np.isin(pairs.ids, chosen)


@pytest.mark.parametrize("method", PAIR_DETECTORS)
def test_a_scan_ranks_planted_pairs(
    method: str, clip: Any, suspect: Any, planted: tuple[ImageTextPairs, np.ndarray], tmp_path: Path
) -> None:
    pairs, truth = planted
    outcome = scan_pairs(pairs, clip=suspect, reference=clip, method=method, config=QUICK, run=run(cache=tmp_path))
    scan, scores, split = outcome.scan, outcome.scores, outcome.split
    # Against the neighbours' own distances, 50 clean shapes at a time are uneven: odd ones rank beside the poison.
    least = 0.65 if method in ("dao", "slof") else 0.9
    assert roc_auc_score(truth, scores.suspicion) > least
    assert (scan.method, scan.samples, scan.captioned) == (method, 200, True)
    assert scan.ranks_only == scan.inconclusive == (not scan.estimate.poisoned)
    assert scan.flagged == (split.region == SUSPECT).sum()
    if method != "exposure":
        assert scan.inconclusive
        assert scan.flagged == round(1.5 * 0.04 * 200)
        assert scores.suspicion[split.suspect].min() >= np.delete(scores.suspicion, split.suspect).max()
    assert set(scan.inputs) - {"pairs_content"} == {
        *(["suspect"] if PAIR_DETECTORS[method].suspect else []),
        *(["reference"] if PAIR_DETECTORS[method].reference else []),
    }
    scan.save(tmp_path / "scan.json")
    scores.save(tmp_path / "scores.parquet")
    split.save(tmp_path / "split.parquet")
    assert DatasetScan.load(tmp_path / "scan.json") == scan
    assert SampleScores.load(tmp_path / "scores.parquet").ids == scores.ids
    assert np.array_equal(Split.load(tmp_path / "split.parquet").region, split.region)
    shown = {entry["id"]: entry["caption"] for entry in outcome.samples if entry["region"] == "suspect"}
    assert shown == {pairs.ids[row]: pairs.captions([row])[0][0] for row in split.suspect.tolist()}
    again = scan_pairs(pairs, clip=suspect, reference=clip, method=method, config=QUICK, run=run())
    assert np.array_equal(again.scores.suspicion, scores.suspicion)


@pytest.mark.parametrize(("confirmation", "poisoned"), [(0.0, True), (1.0, False)])
def test_exposure_says_what_it_found(confirmation: float, poisoned: bool, clip: Any, suspect: Any) -> None:
    pairs = open_pairs("shapes:300:3")
    chosen = pairs.ids[5:300:10]
    planted = pairs.with_overlay(Colored(set(chosen)), dict.fromkeys(chosen, "a photo of a horse"))
    config = replace(QUICK, exposure=ExposureConfig(confirmation=confirmation, misfit=0.0))
    outcome = scan_pairs(planted, clip=suspect, reference=clip, method="exposure", config=config, run=run())
    estimate = outcome.scan.estimate
    assert estimate.poisoned == poisoned
    assert outcome.scan.inconclusive == (not poisoned)
    assert outcome.scan.flagged == round(estimate.rate * 300)
    if poisoned:
        assert estimate.rate_low <= estimate.rate <= estimate.rate_high
        assert estimate.rate == pytest.approx(0.1, abs=0.02)
        assert {outcome.scores.ids[row] for row in outcome.split.suspect} >= set(chosen)
        assert "A group of pairs stands out" in estimate.reason
        alone = scan_pairs(planted, clip=suspect, reference=suspect, method="exposure", config=config, run=run())
        assert alone.scan.inconclusive
        assert alone.scan.flagged == 18
    else:
        assert outcome.scan.flagged == 0


class Collapsed(TransformersCLIP):
    """It gives every image the same embedding, all but rounding, or none at all."""

    length = 1.0

    @property
    def fingerprint(self) -> str:
        return f"collapsed {self.length}"

    def encode_images(self, images: Images) -> Embeddings:
        embedded = super().encode_images(images)
        same = torch.nn.functional.normalize(torch.ones_like(embedded), dim=1) + 1e-7 * embedded
        return self.length * same


@pytest.mark.parametrize("length", [1.0, 0.0])
@pytest.mark.parametrize("method", PAIR_DETECTORS)
def test_embeddings_that_are_all_equal_separate_nothing(method: str, length: float, clip: Any) -> None:
    broken = load_clip("tiny")
    broken.__class__ = Collapsed
    broken.length = length  # pyright: ignore[reportAttributeAccessIssue]
    pairs = open_pairs("shapes:200:3")
    if PAIR_DETECTORS[method].suspect:
        with pytest.raises(NoSeparationError, match="suspect gives all 200 images the same"):
            scan_pairs(pairs, clip=broken, reference=clip, method=method, config=QUICK, run=run())
    if PAIR_DETECTORS[method].reference:
        with pytest.raises(NoSeparationError, match="reference gives all 200 images the same"):
            scan_pairs(pairs, clip=clip, reference=broken, method=method, config=QUICK, run=run())


def test_the_suspect_as_its_own_reference_is_warned_of(clip: Any, planted: tuple[ImageTextPairs, np.ndarray]) -> None:
    pairs, _ = planted
    same = scan_pairs(pairs, clip=clip, reference=clip, method="density", config=QUICK, run=run())
    assert any("reference is the suspect itself" in warning for warning in same.scan.warnings)
    other = scan_pairs(pairs, clip=clip, reference=clip, method="similarity", config=QUICK, run=run())
    assert not any("suspect itself" in warning for warning in other.scan.warnings)
    shuffled = np.random.default_rng(0).permutation(200)
    texts = [pairs.captions([row])[0][0] for row in shuffled.tolist()]
    mixed = pairs.with_overlay(None, dict(zip(pairs.ids, texts, strict=True)))
    weak = scan_pairs(mixed, clip=clip, reference=clip, method="similarity", config=QUICK, run=run())
    assert any("hardly knows such pairs" in warning for warning in weak.scan.warnings)


def test_batches_in_which_poison_has_company_are_warned_of(clip: Any) -> None:
    pairs = open_pairs("shapes:60:3")
    for rate, batch, warned in ((0.2, None, True), (0.2, 20, False), (0.05, None, False)):
        config = PairDetectorConfig(assumed_rate=rate, neighbours=NeighboursConfig(k=6, batch_size=batch))
        outcome = scan_pairs(pairs, clip=clip, config=config, run=run())
        assert any("Lower neighbours.batch_size" in warning for warning in outcome.scan.warnings) == warned


def test_cosines_are_means_over_the_captions(clip: Any) -> None:
    pairs = open_pairs("shapes:9:3")
    several = replace(pairs, replaced={pairs.ids[4]: ("a red star", "a blue ring", "nothing")})
    rows = np.array([0, 4, 7])
    images = embed_images([clip], several, run=run())[0].array[rows]
    fit = caption_cosines(clip, several, rows, images, means=True, run=run())
    own, other, kept = fit.own, fit.other, fit.means
    means = [embed_texts(clip, several.captions([row])[0], run=run()).mean(axis=0) for row in rows.tolist()]
    assert kept is not None
    np.testing.assert_allclose(kept, np.array(means), atol=1e-6)
    np.testing.assert_allclose(own, [image @ text for image, text in zip(images, means, strict=True)], atol=1e-6)
    table = images @ np.array(means).T
    assert all(min(abs(table[row] - value)) < 1e-6 for row, value in enumerate(other))
    assert not np.isclose(own, other).any()


def test_misfit_is_the_share_of_strangers_that_fit_better(clip: Any) -> None:
    pairs = open_pairs("shapes:17:3")  # every other pair is a stranger
    rows = np.arange(17)
    images = embed_images([clip], pairs, run=run())[0].array
    texts = embed_texts(clip, [texts[0] for texts in pairs.captions(rows)], run=run())
    fits, differs = images @ texts.T, texts @ texts.T <= 0.8
    wanted = [(fits[row] > fits[row, row])[differs[row]].mean() if differs[row].any() else 0.0 for row in rows.tolist()]
    np.testing.assert_allclose(caption_cosines(clip, pairs, rows, images, run=run()).misfit, wanted, atol=1e-9)
    same = replace(pairs, replaced=dict.fromkeys(pairs.ids, ("a thing",)))
    assert not caption_cosines(clip, same, rows, images, run=run()).misfit.any()


def write_rows(folder: Path, count: int, *, bad: dict[int, bytes]) -> Path:
    """Pictures of random blocks in a parquet file, some rows of which hold other bytes."""
    random = np.random.default_rng(0)
    cells = []
    for row in range(count):
        buffer = io.BytesIO()
        small = Image.fromarray(random.integers(0, 255, (4, 4, 3)).astype(np.uint8))
        small.resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG")
        cells.append({"bytes": bad.get(row, buffer.getvalue()), "path": None})
    texts = [HOSTILE[row % len(HOSTILE)] for row in range(count)]
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    path = folder / "pairs.parquet"
    datasets.Dataset.from_dict({"image": cells, "caption": texts}, features=features).to_parquet(path)
    return path


@pytest.mark.parametrize("method", ["dao", "mean"])
def test_a_row_that_cannot_be_read_costs_that_row(method: str, clip: Any, tmp_path: Path) -> None:
    pairs = open_pairs(write_rows(tmp_path, 100, bad={7: b"no picture", 50: b"\x89PNG\r\n\x1a\n"}))
    outcome = scan_pairs(pairs, clip=clip, reference=clip, method=method, config=QUICK, run=run())
    lost = {pairs.ids[7], pairs.ids[50]}
    assert {row.id for row in outcome.scan.skipped} == lost
    assert all(row.reason for row in outcome.scan.skipped)
    assert np.flatnonzero(outcome.split.region == SKIPPED).tolist() == [7, 50]
    for values in outcome.scores.axes.values():
        assert np.flatnonzero(np.isnan(values)).tolist() == [7, 50]
    assert not lost & {entry["id"] for entry in outcome.samples}


def test_equal_images_separate_nothing(clip: Any, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 90, 9)).save(buffer, "PNG")
    pairs = open_pairs(write_rows(tmp_path, 60, bad=dict.fromkeys(range(60), buffer.getvalue())))
    with pytest.raises(NoSeparationError):
        scan_pairs(pairs, clip=clip, config=QUICK, run=run())


def test_what_is_refused(clip: Any) -> None:
    pairs = open_pairs("shapes:60:3")
    with pytest.raises(UnknownMethodError) as caught:
        scan_pairs(pairs, clip=clip, method="doa", run=run())
    assert caught.value.closest == "dao"
    with pytest.raises(UsageError, match="reference CLIP, and none is given"):
        scan_pairs(pairs, clip=clip, method="density", run=run())
    with pytest.raises(NotEnoughDataError, match="have 49, need at least 50"):
        scan_pairs(pairs.select(range(49)), clip=clip, run=run())
    for wrong in (0.0, 0.5, float("nan")):
        with pytest.raises(ConfigError):
            PairDetectorConfig(assumed_rate=wrong)


def test_the_suspect_is_left_as_it_is(clip: Any) -> None:
    before, mode = clip.fingerprint, clip.module.training
    state: Tensor = torch.get_rng_state()
    scan_pairs(open_pairs("shapes:60:3"), clip=clip, reference=clip, method="mean", config=QUICK, run=run())
    assert (clip.fingerprint, clip.module.training) == (before, mode)
    assert torch.equal(torch.get_rng_state(), state)


def test_captions_that_no_file_can_hold_are_written_out(clip: Any) -> None:
    pairs = open_pairs("shapes:60:3")
    odd = pairs.with_overlay(None, {pairs.ids[0]: "half \ud800 a caption " + "x" * 2000})
    outcome = scan_pairs(odd.select(range(60)), clip=clip, config=QUICK, run=run())
    everything = replace(outcome.split, region=np.full(60, SUSPECT, dtype=np.int8))
    shown = next(entry for entry in describe_pairs(odd, outcome.scores, everything) if entry["id"] == pairs.ids[0])
    assert shown["caption"].startswith("half \\ud800 a caption")
    assert len(shown["caption"]) == 500


def test_the_catalog_lists_them() -> None:
    for method, detector in PAIR_DETECTORS.items():
        entry = find(method, DETECTORS)
        assert entry.function == "unpoison.api_pairs:scan_pairs"
        assert ("suspicious CLIP" in entry.needs) == detector.suspect
        assert ("reference CLIP" in entry.needs) == detector.reference
