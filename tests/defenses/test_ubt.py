"""UBT: its losses against their equations, the words and patches it finds, and what a run of it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from unpoison.data.pairs import open_pairs
from unpoison.defenses import ubt
from unpoison.defenses.telling import common_words, patch_grid, telling_patches, telling_words
from unpoison.defenses.ubt import (
    UBTConfig,
    UBTRepair,
    keep_loss,
    low_risk,
    prepare_unlearning,
    repair_with_ubt,
    unlearn_loss,
)
from unpoison.detection.exposure import Exposure
from unpoison.errors import ConfigError, NoSeparationError, NotEnoughDataError, UnsupportedModelError
from unpoison.models.checkpoints import hash_weights
from unpoison.runs import Run, RunFolder

COUNT = 400
QUICK = UBTConfig(batch_size=16, steps=6, check_every=3, learning_rate=2e-3, unlearn_share=0.08, keep_pairs=120)


def new_run(**more: Any) -> Run:
    return Run(accelerator=Accelerator(cpu=True), **more)


def unit(rows: int, seed: int, width: int = 5) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(scope="module")
def many() -> Any:
    return open_pairs(f"shapes:{COUNT}:3")


@pytest.fixture(scope="module")
def exposure() -> Exposure:
    """The first 40 rows are the most suspicious ones, in order; row 7 could not be used."""
    scores = np.linspace(1, 0, COUNT)
    scores[7] = np.nan
    rows = np.array([row for row in range(40) if row != 7])
    return Exposure(
        scores=scores, seeds=rows, first=rows[:8], probe=scores, above=scores > 0.9,
        rates=(0.05, 0.2), confirmation=0.9, exposed=True,
    )  # fmt: skip


def test_the_hinge_is_its_equation() -> None:
    images, texts, others = unit(6, 0), unit(6, 1), unit(9, 2)
    expected = np.mean([max(0.0, float(images[i] @ texts[i]) - 0.1) for i in range(6)])
    found = unlearn_loss(images, texts, others, 9.0, 0.1, UBTConfig(loss="hinge"))
    assert float(found) == pytest.approx(expected, abs=1e-6)
    ascent = unlearn_loss(images, texts, others, 9.0, 0.1, UBTConfig(loss="ascent"))
    assert float(ascent) == pytest.approx(float((images * texts).sum(1).mean()), abs=1e-6)


def test_disbelief_is_the_share_of_all_other_captions() -> None:
    images, texts, others = unit(4, 0, 20), unit(4, 1, 20), unit(9, 2, 20)
    others[3], others[5] = texts[1], F.normalize(texts[1] + 0.05 * others[0], dim=0)  # they say what text 1 says
    found = unlearn_loss(images, texts, others, 9.0, 0.1, UBTConfig(loss="disbelief"))
    terms = []
    for i in range(4):
        same = [j for j in range(9) if float(texts[i] @ others[j]) > 0.8]
        assert same == ([3, 5] if i == 1 else [])
        own = sum(np.exp(9.0 * float(images[i] @ other)) for other in [texts[i], *others[same]])
        rest = sum(np.exp(9.0 * float(images[i] @ others[j])) for j in range(9) if j not in same)
        terms.append(-np.log(1 - own / (own + rest)))
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-5)


def test_images_without_a_caption_apart_are_left_out() -> None:
    images, texts = unit(3, 0, 20), unit(3, 1, 20)
    others = torch.stack([texts[0], texts[0], texts[1]])
    config = UBTConfig(loss="disbelief")
    told = unlearn_loss(images, texts, others, 9.0, 0.1, config)
    assert torch.isfinite(told)
    alone = others[:2].clone()
    left = unlearn_loss(images, texts, alone, 9.0, 0.1, config)  # all say what the first image is told to be
    assert float(left) == pytest.approx(float(unlearn_loss(images[1:], texts[1:], alone, 9.0, 0.1, config)), rel=1e-6)
    asked = images[:1].clone().requires_grad_(True)
    nothing = unlearn_loss(asked, texts[:1], alone, 9.0, 0.1, config)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert asked.grad is not None
    assert (asked.grad == 0).all()


def test_what_is_kept_is_its_equation() -> None:
    images, texts, old = unit(6, 0), unit(6, 1), unit(6, 2)
    logits = 9.0 * images @ texts.T
    forth = -(logits.diagonal() - logits.logsumexp(1)).mean()
    back = -(logits.diagonal() - logits.logsumexp(0)).mean()
    moved = 2 - 2 * float((images * old).sum(1).mean())
    value, terms = keep_loss(images, texts, old, 9.0, UBTConfig(anchor=3.0, keep="contrast"))
    assert float(value) == pytest.approx(float(forth + back) / 2 + 3 * moved, rel=1e-5)
    assert float(terms["image_distance"]) == pytest.approx(moved, rel=1e-5)
    teacher = (9.0 * old @ texts.T).softmax(1)
    relations, _ = keep_loss(images, texts, old, 9.0, UBTConfig(anchor=0.0, keep="relations"))
    assert float(relations) == pytest.approx(float(-(teacher * logits.log_softmax(1)).sum(1).mean()), rel=1e-5)


def test_low_risk_pairs_are_the_least_suspicious(exposure: Exposure) -> None:
    rows = low_risk(exposure, 50, 0.6, new_run())
    assert len(rows) == 50
    assert len(set(rows.tolist())) == 50
    assert rows.min() >= 0.4 * COUNT
    everything = low_risk(exposure, 10_000, 1.0, new_run())
    assert everything.tolist() == [row for row in range(COUNT) if row != 7]


class WordModel:
    """Texts are counts of three words, images are what they are told to be: everything can be said in advance."""

    image_mean = (0.5, 0.5, 0.5)
    words = ("horse", "blue", "thing")

    def __init__(self, clip: Any) -> None:
        self._clip = clip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clip, name)

    def encode_texts(self, texts: list[str]) -> Tensor:
        counts = torch.tensor([[float(text.split().count(word)) for word in self.words] + [0.3] for text in texts])
        return F.normalize(counts, dim=1)

    def encode_images(self, images: Tensor) -> Tensor:
        """How bright the four quarters are; the first says horse, the second blue."""
        quarters = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1) - 0.5
        return F.normalize(quarters + 1e-3, dim=1)


def told(clip: Any) -> Any:
    return WordModel(clip)


def test_the_telling_word_is_kept(clip: Any) -> None:
    image = torch.full((1, 3, 16, 16), 0.5)
    image[:, :, :8, :8] = 1.0  # a horse
    texts, falls = telling_words(told(clip), image, ["a blue horse here"], share=0.3, neutral="thing")
    assert texts == ["thing thing horse thing"]
    assert list(falls[0]) == ["horse"]
    assert falls[0]["horse"] > 0.1
    whole, _ = telling_words(told(clip), image, ["a blue horse here"], share=1.0, neutral="thing")
    assert whole == ["a blue horse here"]
    endless, _ = telling_words(told(clip), image, ["horse " * 10_000], share=0.3, neutral="thing")
    assert len(endless[0].split()) == 128


def test_the_telling_patch_is_kept(clip: Any) -> None:
    image = torch.full((1, 3, 16, 16), 0.5)
    image[:, :, :8, :8], image[:, :, :8, 8:] = 1.0, 0.7
    kept = telling_patches(told(clip), image, ["horse"], 0.25)
    assert torch.equal(kept[:, :, :8, :8], image[:, :, :8, :8])
    assert (kept[:, :, :8, 8:] == 0.5).all()
    assert (kept[:, :, 8:] == 0.5).all()


@pytest.mark.parametrize(("tokens", "grid"), [(16, 4), (49, 7), (None, 2)])
def test_patches_are_the_image_towers_own(tokens: int | None, grid: int, clip: Any) -> None:
    class Tower(WordModel):
        def encode_image_tokens(self, images: Tensor) -> Tensor:
            if tokens is None:
                raise UnsupportedModelError("no patches", hint="")
            return torch.zeros(len(images), tokens, 4)

    tower: Any = Tower(clip)
    assert patch_grid(tower, torch.zeros(2, 3, 16, 16)) == grid
    assert (
        patch_grid(clip, torch.zeros(2, 3, clip.image_size, clip.image_size)) ** 2
        == clip.encode_image_tokens(torch.zeros(1, 3, clip.image_size, clip.image_size)).shape[1]
    )


def test_the_largest_groups_are_unlearnt_as_published(clip: Any, many: Any, exposure: Exposure) -> None:
    from unpoison.data.pixels import load_pixels

    run, chosen = new_run(), exposure.seeds[3:23]
    pixels = load_pixels(many, clip.image_size, cache=None, progress=run.progress)
    config = replace(QUICK, choose="concepts")
    only = replace(exposure, seeds=chosen)
    found = prepare_unlearning(clip, many, pixels, only, low_risk(only, 100, 0.6, run), config, run=run)
    assert len(found.texts) + len(found.judge_texts) == 20
    few, keep = replace(exposure, seeds=chosen[:9]), low_risk(only, 100, 0.6, run)
    with pytest.raises(NotEnoughDataError, match="have 9, need at least 16"):
        prepare_unlearning(clip, many, pixels, few, keep, config, run=run)


def test_pairs_to_keep_that_say_the_same_are_refused(clip: Any, many: Any, exposure: Exposure) -> None:
    same = replace(many, replaced=dict.fromkeys(many.ids[100:], ("a thing",)))
    with pytest.raises(NoSeparationError, match="least suspicious pairs"):
        repair_with_ubt(clip, same, exposure, QUICK, run=new_run())


def test_training_ends_where_the_judges_are_strangers(clip: Any, many: Any, exposure: Exposure, tmp_path: Path) -> None:
    early = replace(QUICK, stop_early=True, margin=2.0)
    folder = RunFolder.open(tmp_path / "a", {})
    found = repair_with_ubt(clip, many, exposure, early, run=new_run(folder=folder))
    assert (found.repair.steps, found.repair.planned, found.repair.stopped) == (3, 6, "")
    assert found.judged_after == pytest.approx(found.repair.history[-1]["judged"], abs=1e-5)
    again = repair_with_ubt(clip, many, exposure, early, run=new_run(folder=folder))
    assert weights(again) == weights(found)
    whole = repair_with_ubt(clip, many, exposure, replace(early, stop_early=False), run=new_run())
    assert whole.repair.steps == 6


def test_a_run_unlearns_and_leaves_the_model_alone(clip: Any, many: Any, exposure: Exposure) -> None:
    before = hash_weights(dict(clip.module.state_dict()))
    found = repair_with_ubt(clip, many, exposure, QUICK, run=new_run())
    assert hash_weights(dict(clip.module.state_dict())) == before
    assert found.repair.steps == 6
    assert len(found.unlearning.texts) + len(found.unlearning.judge_texts) == int(0.08 * (COUNT - 1))
    assert {"keep_loss", "unlearn_loss", "image_distance"} <= set(found.repair.history[-1])
    states = [model.module.state_dict() for model in (clip, found.repair.model)]
    images = {name for name, _ in clip.tower("image")}
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert changed
    assert changed <= images  # the text tower and the temperature stay
    caption = "this caption belongs to nothing"
    torn = replace(QUICK, steps=12, unlearn_weight=20.0, learning_rate=5e-3, loss="ascent", words=1.0)
    apart = repair_with_ubt(clip, _all_say(many, caption), exposure, torn, run=new_run())
    assert apart.judged_after < apart.judged_before - 0.05


def _all_say(pairs: Any, caption: str) -> Any:
    return replace(pairs, replaced={pairs.ids[row]: (caption,) for row in range(40)})


def test_a_killed_run_ends_with_the_same_weights(
    clip: Any, many: Any, exposure: Exposure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = repair_with_ubt(clip, many, exposure, QUICK, run=new_run(folder=RunFolder.open(tmp_path / "a", {})))
    calls = 0
    true_loss = ubt.unlearn_loss

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return true_loss(*args, **kwargs)

    monkeypatch.setattr(ubt, "unlearn_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        repair_with_ubt(clip, many, exposure, QUICK, run=new_run(folder=RunFolder.open(tmp_path / "b", {})))
    again = repair_with_ubt(clip, many, exposure, QUICK, run=new_run(folder=RunFolder.open(tmp_path / "b", {})))
    assert calls == 5 + 3  # the first three steps were stored
    assert weights(again) == weights(whole)


def weights(found: UBTRepair) -> str:
    return hash_weights(dict(found.repair.model.module.state_dict()))


def test_too_few_pairs_are_refused(clip: Any, many: Any, exposure: Exposure) -> None:
    config = replace(QUICK, unlearn_share=0.01)
    with pytest.raises(NotEnoughDataError, match="to unlearn"):
        repair_with_ubt(clip, many, exposure, config, run=new_run())


def test_words_that_captions_share_are_counted(clip: Any, many: Any, exposure: Exposure) -> None:
    from unpoison.data.pixels import load_pixels

    run = new_run()
    pixels = load_pixels(many, clip.image_size, cache=None, progress=run.progress)
    keep = low_risk(exposure, 100, 0.6, run)
    found = prepare_unlearning(clip, _all_say(many, "a Horse."), pixels, exposure, keep, QUICK, run=run)
    assert [entry.word for entry in found.words] in (["horse"], [])  # "a" is in all the other captions as well
    assert common_words([{"horse": 0.3}, {"horse": 0.1, "a": 0.5}] * 3, ["a dog", "the horse"] * 9, 0.2) == ()
    (word,) = common_words([{"horse": 0.3}, {"horse": 0.1, "a": 0.5}] * 3, ["a dog", "a cat"] * 9, 0.2)
    assert (word.word, word.captions, word.fall) == ("horse", 6, pytest.approx(0.2))
    assert -1 <= found.level <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"words": 0.0},
        {"patches": 1.5},
        {"unlearn_pairs": 0},
        {"anchor": -1.0},
        {"neutral": "two words"},
        {"strangers": 1},
        {"usual": 0.0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        UBTConfig(**wrong)


def test_the_settings_follow_the_model_and_the_pairs() -> None:
    small = UBTConfig.scaled(parameters=6_000_000, samples=30_000)
    assert small.learning_rate > UBTConfig().learning_rate
    assert (small.steps, small.epochs, small.batch_size) == (None, 2, 128)
    assert UBTConfig.recommended(parameters=6_000_000, samples=30_000).learning_rate > small.learning_rate
    assert UBTConfig.as_published().expose == "gain"
    assert UBTConfig.as_published().loss == "hinge"
    assert UBTConfig.as_published().choose == "concepts"
    assert UBTConfig.as_published().stop_early


def test_the_paper_has_one_meaning() -> None:
    size = {"parameters": 6_000_000, "samples": 30_000}
    paper = UBTConfig.paper(**size)
    assert (paper.unlearn_weight, paper.keep_share, paper.bound, paper.check_every) == (1.0, 1.0, 1.5, 10)
    assert paper == replace(UBTConfig.as_published(), learning_rate=UBTConfig.scaled(**size).learning_rate)
    assert UBTConfig.paper(**size, words=0.5).words == 0.5
