"""The recipe of the CLIP victims on the shapes world: loss, books, cache, resume, refusal."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unpoison.attacks.prompts import TEMPLATES
from unpoison.contrastive import info_nce
from unpoison.data.pairs import join_pairs, open_pairs, pairs_of_labels
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError
from unpoison.models.clip_open_clip import open_clip_installed
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.runs import Run

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    sys.path.insert(0, str(RECIPES))
    try:
        yield importlib.import_module("clip_victims")
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def training(recipe: Any) -> Any:
    return importlib.import_module("unpoison.benchmark.clip_victims")


@pytest.fixture(scope="module")
def base() -> TransformersCLIP:
    return load_clip("tiny")


@pytest.fixture(scope="module")
def data(recipe: Any) -> Any:
    labelled, captioned = pairs_of_labels(open_images("shapes:30:1"), TEMPLATES), open_pairs("shapes:12:2")
    return recipe.Data(
        train=join_pairs({recipe.LABELLED: labelled, recipe.CAPTIONED: captioned}),
        captioned=captioned,
        test=open_images("shapes:24:3"),
        retrieval=None,
        fingerprint="shapes",
    )


def request(recipe: Any, training: Any, attack: str, data: Any, **more: Any) -> Any:
    settings = training.Settings(steps=4, batch=4, warm_up=1)
    captions = [text for found in data.captioned.captions(range(len(data.captioned))) for text in found]
    target = next(name for name in data.test.class_names if training.names(captions, name).any())
    return recipe.Request(attack=attack, target=target, rate=0.2, settings=settings, **more)


def test_the_loss_shares_its_targets_within_a_concept(training: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(count, 6, generator=generator), dim=-1) for count in (5, 4))
    concept_of_image, concept_of_text = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 1, 2])
    same = concept_of_image[:, None] == concept_of_text[None]
    logits = 10 * images.double().numpy() @ texts.double().numpy().T
    rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    columns = logits - np.log(np.exp(logits).sum(0, keepdims=True))
    to_text = np.mean([-rows[row][same[row]].mean() for row in range(5)])
    to_image = np.mean([-columns[:, column][same[:, column]].mean() for column in range(4)])
    found = training.concept_info_nce(images, texts, torch.from_numpy(same).float(), 10.0)
    assert float(found) == pytest.approx((to_text + to_image) / 2, rel=1e-5)
    own = training.concept_info_nce(images[:4], texts, torch.eye(4), 10.0)
    assert float(own) == pytest.approx(float(info_nce(images[:4], texts, 10.0)), rel=1e-6)


def test_a_batch_holds_few_captions_of_a_concept(training: Any) -> None:
    concepts = np.array([0, 0, 1, 0, 2, 1])
    assert training.at_most([3, 2, 3, 0, 1, 4, 5], concepts, 2) == [3, 2, 0, 4, 5]
    assert training.at_most([3, 2, 3, 0, 1, 4, 5], concepts, 1) == [3, 2, 4]


def test_captions_of_one_class_are_one_concept(recipe: Any, training: Any, data: Any, base: TransformersCLIP) -> None:
    from unpoison.data.pixels import load_pixels

    pixels = load_pixels(data.train, 32, cache=None, progress=Run().progress)
    corpus = training.read_corpus(data.train, pixels, recipe.LABELLED, data.test.class_names)
    assert list(corpus.sources) == [recipe.LABELLED, recipe.CAPTIONED]
    assert corpus.sources[recipe.LABELLED].tolist() == list(range(30))
    assert corpus.sources[recipe.CAPTIONED].tolist() == list(range(30, 42))
    labels = open_images("shapes:30:1").labels
    for row in range(30):
        assert [corpus.concepts[number] for number in corpus.captions[row]] == [labels[row]]
    captions = data.train.captions(range(42))
    assert [tuple(corpus.texts[number] for number in row) for row in corpus.captions] == captions
    settings = training.Settings(steps=4, batch=4)
    with torch.no_grad():
        losses = [float(training.step_loss(base, corpus, settings, 0, run=Run(seed=seed))) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_captions_of_pairs_alone_are_no_concepts(
    recipe: Any, training: Any, data: Any, base: TransformersCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unpoison.data.pixels import load_pixels

    pairs = join_pairs({recipe.CAPTIONED: data.captioned})
    pixels = load_pixels(pairs, 32, cache=None, progress=Run().progress)
    corpus = training.read_corpus(pairs, pixels, recipe.LABELLED, data.test.class_names)
    assert len(np.unique(corpus.concepts)) < len(corpus.texts)  # some name the same class
    shapes: list[tuple[int, ...]] = []

    def kept(images: torch.Tensor, texts: torch.Tensor, same: torch.Tensor, scale: float) -> torch.Tensor:
        shapes.append((*same.shape, int(same.sum())))
        return (images @ texts.T).sum()

    monkeypatch.setattr(training, "concept_info_nce", kept)
    for most in (1, 12):
        settings = training.Settings(steps=1, batch=12, concept_captions=most)
        training.step_loss(base, corpus, settings, 0, run=Run(seed=0))
    assert shapes[0] == shapes[1]  # none is left out for its class
    assert shapes[0][2] == 12  # and each image has one text


def test_a_weak_victim_is_refused_kept_and_not_made_again(
    recipe: Any, training: Any, data: Any, base: TransformersCLIP, tmp_path: Path
) -> None:
    before = base.fingerprint
    wanted = request(recipe, training, "badnet-rand", data)
    victim = recipe.make_victim(base, data, wanted, tmp_path)
    assert base.fingerprint == before
    assert not victim.accepted
    assert "REFUSED" in recipe.describe(victim)
    assert victim.evaluation.asr.value < recipe.LEAST_ASR
    summary = json.loads((victim.folder / "victim.json").read_bytes())
    assert (summary["accepted"], summary["attack"], summary["asr"]) == (
        False,
        "badnet-rand",
        victim.evaluation.asr.value,
    )
    assert load_clip(victim.model).fingerprint == summary["fingerprint"] != before
    poisoning = victim.poisoning
    assert poisoning.config["resample"]
    assert (len(poisoning.ids), poisoning.size) == (8, 32)
    written = {file: file.stat().st_mtime_ns for file in victim.folder.rglob("*")}
    assert recipe.make_victim(base, data, wanted, tmp_path) == victim
    assert {file: file.stat().st_mtime_ns for file in victim.folder.rglob("*")} == written
    assert recipe.list_victims(tmp_path) == [victim]


def test_an_interrupted_victim_ends_the_same(
    recipe: Any, training: Any, data: Any, base: TransformersCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STORED_EVERY", 1)
    wanted = replace(request(recipe, training, "clean", data), seed=5)
    whole = recipe.make_victim(base, data, wanted, tmp_path / "whole")
    assert whole.accepted
    assert whole.poisoning is None
    assert whole.evaluation.asr is None
    real = training.step_loss

    def stops(clip: Any, corpus: Any, settings: Any, step: int, *, run: Run) -> torch.Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return real(clip, corpus, settings, step, run=run)

    with monkeypatch.context() as patched:
        patched.setattr(training, "step_loss", stops)
        with pytest.raises(KeyboardInterrupt):
            recipe.make_victim(base, data, wanted, tmp_path / "cut")
    cut = recipe.make_victim(base, data, wanted, tmp_path / "cut")
    assert load_clip(cut.model).fingerprint == load_clip(whole.model).fingerprint


def test_other_inputs_have_another_folder(recipe: Any, training: Any, data: Any, base: TransformersCLIP) -> None:
    first = request(recipe, training, "wanet", data)
    others = [
        replace(first, seed=1),
        replace(first, rate=0.3),
        replace(first, resample=True),
        replace(first, params={"s": 2.0}),
        replace(first, settings=replace(first.settings, crop=1)),
        replace(first, attack="blended-text"),
    ]
    keys = {recipe.key_of(recipe.inputs_of(base, data, wanted)) for wanted in (first, first, *others)}
    assert len(keys) == 7


@pytest.mark.parametrize(
    "name",
    [
        "badnet-rand", "badnet-stripes", "blended-rand", "blended-stripes",
        "blended-triangles", "blended-text", "wanet", "sig", "badclip",
    ],
)  # fmt: skip
def test_every_attack_is_planned(
    recipe: Any, training: Any, data: Any, base: TransformersCLIP, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "PATCH", replace(recipe.PATCH, images=4, epochs=1))
    wanted = request(recipe, training, name, data)
    attack = recipe.ATTACKS[name]
    made = recipe.plan(base, data, wanted, attack, run=Run())
    assert len(made.ids) == 8
    assert (made.trigger, made.captions) == (attack.trigger, attack.captions)
    assert made.config.get("resample", False) == attack.resample
    assert bool(made.config.get("patch")) == (name == "badclip")
    poisoned = recipe.apply_pair_poisoning(data.train, made)
    row = data.train.ids.index(made.ids[0])
    before, after = (np.asarray(pairs.decode([row])[0].resize((32, 32))) for pairs in (data.train, poisoned))
    assert not np.array_equal(before, after)


@pytest.mark.skipif(not open_clip_installed(), reason="needs the extra [open-clip]")
def test_a_resnet_is_trained_and_stored_in_its_own_format(
    recipe: Any, training: Any, data: Any, tmp_path: Path
) -> None:
    base = recipe.open_base("resnet", 0)
    victim = recipe.make_victim(base, data, request(recipe, training, "wanet", data), tmp_path)
    assert (victim.model / "open_clip_model.safetensors").exists()
    assert victim.poisoning.size == 64
    assert recipe.open_base(str(victim.model), 0).fingerprint != base.fingerprint


def test_bad_settings_are_refused(training: Any) -> None:
    for bad in ({"steps": 0}, {"batch": 1}, {"learning_rate": 0.0}, {"concept_captions": 0}):
        with pytest.raises(ConfigError):
            training.Settings(**bad)
