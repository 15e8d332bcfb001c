"""A logit scale that is huge or zero: answers and methods are those of the nearest one that can be worked with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from unpoison.data.pairs import open_pairs
from unpoison.data.pixels import load_pixels
from unpoison.defenses.ubt import UBTConfig, repair_with_ubt
from unpoison.detection import clip_triggers
from unpoison.detection.clip_triggers import ConceptSearchConfig, search_concepts
from unpoison.detection.exposure import Exposure
from unpoison.detection.similarity_gain import OverfitConfig, similarity_gain
from unpoison.models.any_model import AnyModel
from unpoison.models.clip_transformers import load_clip
from unpoison.models.logit_scale import scale_warning, usable_scale
from unpoison.models.zero_shot_classifier import ZeroShotClassifier
from unpoison.runs import Run

ODD = pytest.mark.parametrize(("logarithm", "nearest"), [(-1000.0, 1.0), (1000.0, 100.0)])


@pytest.fixture(scope="module")
def scaled(small_folder: Path) -> Callable[[float], Any]:
    def make(logarithm: float) -> Any:
        clip = load_clip(small_folder)
        clip.module.get_parameter("logit_scale").data.fill_(logarithm)
        return clip

    return make


@pytest.fixture(scope="module")
def pairs() -> Any:
    return open_pairs("shapes:200:3")


def new_run() -> Run:
    return Run(accelerator=Accelerator(cpu=True), seed=1)


@ODD
def test_it_is_held_to_a_range_and_named(logarithm: float, nearest: float, scaled: Callable[[float], Any]) -> None:
    assert usable_scale(scaled(logarithm)) == nearest
    assert usable_scale(scaled(float("nan"))) == 100
    (said,) = scale_warning(scaled(logarithm))
    assert f"{nearest:g} was used" in said
    usual = scaled(math.log(14))
    assert usable_scale(usual) == usual.logit_scale
    assert scale_warning(usual) == scale_warning(scaled(math.log(100))) == ()


@ODD
def test_it_decides_no_answer(logarithm: float, nearest: float, scaled: Callable[[float], Any], pairs: Any) -> None:
    classes = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    pictures = pairs.decode(range(40))

    def classifier(logarithm: float) -> ZeroShotClassifier:
        clip = scaled(logarithm)
        width = clip.encode_texts(["a"]).shape[1]
        wide = torch.nn.functional.normalize(classes.repeat(1, -(-width // 16))[:, :width], dim=1)
        return ZeroShotClassifier(clip=clip, class_names=tuple("abcd"), classes=wide, made_for="")

    odd, usual = classifier(logarithm), classifier(math.log(nearest))
    assert len(set(usual.predict(pictures))) > 1
    assert odd.predict(pictures) == usual.predict(pictures)
    torch.testing.assert_close(odd.logits(pictures), usual.logits(pictures))
    images = odd.clip.preprocess(pictures)
    with torch.no_grad():
        model = AnyModel(kind="CLIP", model=odd.clip, class_names=odd.class_names, classes=odd.classes)
        torch.testing.assert_close(model.logits(images), usual.logits(pictures), rtol=1e-4, atol=1e-4)


@ODD
def test_the_gain_is_that_of_the_nearest(
    logarithm: float, nearest: float, scaled: Callable[[float], Any], pairs: Any
) -> None:
    run, rows = new_run(), np.arange(200)
    cosines = np.random.default_rng(0).random(200)

    def gain(logarithm: float) -> np.ndarray:
        clip = scaled(logarithm)
        pixels = load_pixels(pairs, clip.image_size, cache=None, progress=run.progress)
        return similarity_gain(clip, pairs, pixels, rows, cosines, OverfitConfig(epochs=1, batch_size=16), run=run)

    assert np.array_equal(gain(logarithm), gain(math.log(nearest)))


@ODD
def test_concepts_are_searched_for_with_the_nearest(
    logarithm: float, nearest: float, scaled: Callable[[float], Any], pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def search(logits: Any, images: Any, *_: Any, **__: Any) -> Any:
        raise Seen(float(logits(images).abs().max()))

    monkeypatch.setattr(clip_triggers, "search_twice", search)
    with pytest.raises(Seen) as caught:
        search_concepts(scaled(logarithm), pairs, ConceptSearchConfig(concepts=8), run=new_run())
    assert 0 < caught.value.args[0] <= nearest + 1e-3


@ODD
def test_ubt_unlearns_as_with_the_nearest(
    logarithm: float, nearest: float, scaled: Callable[[float], Any], pairs: Any
) -> None:
    scores = np.linspace(1, 0, 200)
    first = np.arange(20)
    exposure = Exposure(
        scores=scores,
        seeds=first,
        first=first,
        probe=scores,
        above=scores > 0.9,
        rates=(0.05, 0.2),
        confirmation=0.9,
        exposed=True,
    )  # fmt: skip
    config = UBTConfig(batch_size=16, steps=2, check_every=2, learning_rate=1e-4, unlearn_share=0.1)
    clips = scaled(logarithm), scaled(math.log(nearest))
    odd, usual = (repair_with_ubt(clip, pairs, exposure, config, run=new_run()) for clip in clips)
    assert odd.repair.stopped == ""
    assert odd.repair.steps == 2
    assert odd.judged_after == pytest.approx(usual.judged_after, abs=1e-5)
    assert odd.judged_after != odd.judged_before
