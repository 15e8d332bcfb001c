"""Which images CBPT learns from, searches on and is judged by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from unpoison import api_zero_shot
from unpoison.api_zero_shot import purify_with_cbpt
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses import cbpt, dummies, shots
from unpoison.defenses.cbpt import CBPTConfig
from unpoison.defenses.shots import Shots, accuracy, choose_shots
from unpoison.detection import confirmed_search
from unpoison.detection.inversion import InversionConfig
from unpoison.detection.trigger_search import TriggerSearchConfig, search_triggers
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.runs import Run

QUICK = CBPTConfig(
    shots=4,
    views=2,
    steps=5,
    loud_steps=2,
    inversion=InversionConfig(steps=2, batch_size=8),
    search=TriggerSearchConfig(inversion=InversionConfig(steps=1, batch_size=8)),
)


@pytest.fixture
def clip(small_folder: Path) -> TransformersCLIP:
    return load_clip(small_folder)


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    found = open_images("shapes:400:3")
    kept = np.flatnonzero(found.labels < 4)
    return replace(found.select(kept), class_names=found.class_names[:4])


@pytest.fixture
def run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


def test_shots_and_judges_share_no_image(images: LabelledImages, run: Run) -> None:
    chosen = choose_shots(images, 4, 16, run=run)
    assert torch.bincount(chosen.learnt.labels).tolist() == [4, 4, 4, 4]
    assert not set(chosen.learnt.rows.tolist()) & set(chosen.judging.rows.tolist())
    assert len(chosen.judging) > 0
    assert len(chosen.spare) == 0  # nothing is looked for: all the others judge
    few = choose_shots(images, 1000, 16, run=run)
    assert few.fewest < 1000
    assert not set(few.learnt.rows.tolist()) & set(few.judging.rows.tolist())


def test_a_search_gets_images_that_do_not_judge(images: LabelledImages, run: Run) -> None:
    plain, chosen = choose_shots(images, 4, 16, run=run), choose_shots(images, 4, 16, searched=60, run=run)
    parts = [set(part.rows.tolist()) for part in (chosen.learnt, chosen.judging, chosen.spare)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(images)
    assert chosen.learnt.rows.tolist() == plain.learnt.rows.tolist()
    for label in range(4):
        others = int((images.labels == label).sum()) - 4
        assert int((chosen.spare.labels == label).sum()) == min(others // 2, 60 // 4 - 4)
    plain, enough = choose_shots(images, 8, 16, run=run), choose_shots(images, 8, 16, searched=32, run=run)
    assert enough.judging.rows.tolist() == plain.judging.rows.tolist()


def test_the_search_sees_the_shots_and_others_only_where_these_are_too_few(
    clip: TransformersCLIP, images: LabelledImages, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[torch.Tensor] = []

    def search(answers: Any, batch: torch.Tensor, *given: Any, **more: Any) -> Any:
        searched.append(batch)
        return search_triggers(answers, batch, *given, **more)

    monkeypatch.setattr(confirmed_search, "search_triggers", search)
    never = replace(QUICK, shots=16, search=replace(QUICK.search, success=100.0, index=99.0, index_apart=99.0))
    enough = purify_with_cbpt(clip, images, config=replace(never, search_images=64), run=run).purification
    learnt = choose_shots(images, 16, 16, run=run).learnt.images().flatten(1)
    assert len(searched[0]) == len(learnt) == enough.learnt == 64
    assert sorted(searched[0].flatten(1).tolist()) == sorted(learnt.tolist())
    assert not any("beside the" in warning for warning in enough.warnings)
    few = purify_with_cbpt(clip, images, config=replace(never, search_images=72), run=run).purification
    assert len(searched[1]) == 72
    assert any("looked at 8 images beside the 64 that are learnt from" in warning for warning in few.warnings)


def test_no_image_that_judges_is_seen_by_the_search(
    clip: TransformersCLIP, images: LabelledImages, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[torch.Tensor] = []
    judging: list[torch.Tensor] = []

    def search(answers: Any, batch: torch.Tensor, *given: Any, **more: Any) -> Any:
        searched.append(batch)
        return search_triggers(answers, batch, *given, **more)

    def judged(clip: Any, shots: Shots, classes: torch.Tensor, **more: Any) -> float:
        judging.append(shots.images())
        return accuracy(clip, shots, classes, **more)

    monkeypatch.setattr(confirmed_search, "search_triggers", search)
    monkeypatch.setattr(api_zero_shot, "accuracy", judged)
    purify_with_cbpt(clip, images, config=QUICK, run=run)
    seen, kept = searched[0].flatten(1), judging[0].flatten(1)
    assert len(seen) + len(kept) == len(images)
    assert float(torch.cdist(seen, kept).min()) > 0


def test_fewer_shots_than_asked_are_said(clip: TransformersCLIP, images: LabelledImages, run: Run) -> None:
    config = replace(QUICK, shots=1000)
    result = purify_with_cbpt(clip, images, target=images.class_names[0], config=config, run=run).purification
    assert any("Fewer than 1000 images to learn from" in warning for warning in result.warnings)


def test_images_that_judge_are_embedded_once_without_a_trigger(
    clip: TransformersCLIP, images: LabelledImages, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    embed = shots.embed

    def counted(clip: Any, given: Shots, *change: Any) -> torch.Tensor:
        if not change:
            seen.append(tuple(given.rows.tolist()))
        return embed(clip, given, *change)

    for module in (api_zero_shot, cbpt, dummies, shots):
        monkeypatch.setattr(module, "embed", counted)
    found = purify_with_cbpt(clip, images, target=images.class_names[0], config=QUICK, run=run).purification
    judging = choose_shots(images, 4, 16, run=run).judging
    assert seen.count(tuple(judging.rows.tolist())) == 1
    assert not [rows for rows in seen if set(rows) < set(judging.rows.tolist())]
    assert len(found.dummies) > 1
