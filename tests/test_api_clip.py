"""The verbs for CLIP: what they say of a training that went through, and of one that did not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from unpoison import api_clip
from unpoison.api_clip import (
    judge,
    largest_fall,
    look_for_trigger,
    purify_with_clean_clip,
    purify_with_fine_tuning,
    purify_with_par,
)
from unpoison.catalog import DEFENSES, resolve
from unpoison.clip_results import ClipPurification
from unpoison.clip_training import ClipRepair
from unpoison.data.pairs import open_pairs
from unpoison.defenses.baselines.clean_clip import CleanClipConfig
from unpoison.defenses.baselines.fine_tuning import FineTuningConfig
from unpoison.defenses.par import PARConfig
from unpoison.detection.inversion import InvertedTrigger
from unpoison.detection.trigger_search import TriggerSearch
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run, RunFolder

QUICK: dict[str, Any] = {"batch_size": 12, "steps": 2, "check_every": 1, "learning_rate": 1e-4, "bound": 100.0}
VERBS: dict[str, tuple[Any, Any]] = {
    "par": (purify_with_par, PARConfig(**QUICK)),
    "clean-clip": (purify_with_clean_clip, CleanClipConfig(**QUICK)),
    "fine-tuning": (purify_with_fine_tuning, FineTuningConfig(**QUICK)),
}


@pytest.fixture(scope="module")
def clip(small_folder: Path) -> Any:
    return load_clip(small_folder)


@pytest.fixture(scope="module")
def pairs() -> Any:
    return open_pairs("shapes:40:3")


def test_the_catalog_lists_them() -> None:
    listed = {entry.name: entry for entry in DEFENSES if {"suspicious CLIP", "clean pairs"} <= set(entry.needs)}
    assert {name: resolve(entry.function) for name, entry in listed.items()} == {
        name: verb for name, (verb, _) in VERBS.items()
    }
    for name, entry in listed.items():
        assert type(VERBS[name][1]) is resolve(entry.config)


@pytest.mark.parametrize("method", VERBS)
def test_a_purification_is_on_record(method: str, clip: Any, pairs: Any, tmp_path: Path) -> None:
    purify, config = VERBS[method]
    before, fingerprint = hash_weights(dict(clip.module.state_dict())), clip.fingerprint
    outcome = purify(clip, pairs, config=config, run=Run(accelerator=Accelerator(cpu=True), seed=4))
    result = outcome.purification
    assert hash_weights(dict(clip.module.state_dict())) == before
    assert hash_weights(dict(outcome.clip.module.state_dict())) != before
    assert (result.method, result.accepted, result.steps, result.seed) == (method, True, 2, 4)
    assert result.inputs["model"] == fingerprint
    assert result.config["batch_size"] == 12
    assert result.trained_pairs + result.held_out_pairs == 40
    assert result.not_covered
    assert result.protects == "both towers' weights"
    assert not any("text tower" in line for line in result.not_covered)
    assert any("tokenizer cuts off" in warning for warning in result.warnings)
    result.save(tmp_path / "purification.json")
    assert ClipPurification.load(tmp_path / "purification.json") == replace(
        result, config=ClipPurification.load(tmp_path / "purification.json").config
    )


def test_a_text_tower_that_was_left_as_it_is_is_not_said_to_be_protected(clip: Any, pairs: Any) -> None:
    config = PARConfig(**QUICK, text_tower="frozen")
    result = purify_with_par(clip, pairs, config=config, run=Run(accelerator=Accelerator(cpu=True))).purification
    assert result.protects == "the image tower's weights; the text tower is as it came"
    assert any("texts set off" in line for line in result.not_covered)


def found_triggers(*suspects: int) -> Any:
    triggers = tuple(
        InvertedTrigger(
            form="additive",
            target=target,
            mask=torch.ones(1, 16, 16),
            pattern=torch.full((3, 16, 16), 0.01 * (target + 1)),
            size=0.01 * (target + 1),
            success=90.0,
        )
        for target in range(3)
    )
    search = TriggerSearch(triggers=triggers, index=(3.0, 0.0, -1.0), suspects=suspects, reason="As planted.")
    return lambda *_, **__: (search, ("a red star", "a <b>blue</b> dot", "no text"))


@pytest.mark.parametrize("suspects", [(), (0,)])
def test_a_model_is_repaired_where_a_trigger_was_found(
    suspects: tuple[int, ...], clip: Any, pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_clip, "search_concepts", found_triggers(*suspects))
    run = Run(accelerator=Accelerator(cpu=True), folder=RunFolder.open(tmp_path / "run", {}))
    outcome = purify_with_par(clip, pairs, config=PARConfig(**QUICK, search_concepts=8), run=run)
    result = outcome.purification
    same = hash_weights(dict(outcome.clip.module.state_dict())) == hash_weights(dict(clip.module.state_dict()))
    assert result.left_alone == same == (not suspects)
    assert result.search is not None
    assert [entry.caption for entry in result.search.suspected] == (["a red star"] if suspects else [])
    assert result.steps == (2 if suspects else 0)
    assert result.truncated_captions > 1
    assert any(f"cuts off {result.truncated_captions} different captions" in line for line in result.warnings)
    assert result.accepted
    assert ("As planted." in result.reason) == (not suspects)
    assert ("as it came" in result.protects) == (not suspects)
    assert any("trigger in texts" in line.lower() for line in result.not_covered) == (not suspects)
    assert outcome.clip is not clip
    result.save(tmp_path / "purification.json")
    assert ClipPurification.load(tmp_path / "purification.json").search == result.search
    monkeypatch.setattr(api_clip, "search_concepts", None)  # a run that is continued does not search again
    assert look_for_trigger(clip, pairs, run=run) == result.search


@pytest.mark.parametrize("suspects", [(), (0,)])
def test_images_are_decoded_once(
    suspects: tuple[int, ...], clip: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = type(pairs).decode

    def counting(self: Any, indices: Any) -> Any:
        decoded.extend(int(index) for index in indices)
        return decode(self, indices)

    def searching(clip: Any, pairs: Any, config: Any, *, run: Run, pixels: Any) -> Any:
        assert len(pixels.array) == len(pairs)
        return found_triggers(*suspects)()

    monkeypatch.setattr(type(pairs), "decode", counting)
    monkeypatch.setattr(api_clip, "search_concepts", searching)
    purify_with_par(clip, pairs, config=PARConfig(**QUICK, search_concepts=8), run=Run())
    assert sorted(decoded) == list(range(len(pairs)))


def test_pairs_that_are_too_few_to_search_are_said_to_be(clip: Any) -> None:
    few = open_pairs("shapes:20:3")
    result = purify_with_par(clip, few, config=PARConfig(**QUICK, search_concepts=25), run=Run()).purification
    assert result.search is None
    assert not result.left_alone
    assert any("No trigger was looked for before the repair: " in warning for warning in result.warnings)


def repair(clip: Any, *, after: float, before: float = 80.0, stopped: str = "") -> ClipRepair:
    looks = [
        {"step": float(step), "held_out_accuracy": accuracy, "chance": 1.0, "image_cosine": 0.1, "text_cosine": 0.9}
        for step, accuracy in ((0, before), (5, after))
    ]
    return ClipRepair(
        model=clip, history=looks, steps=5, planned=5, batch_size=2, trained_pairs=9, held_out_pairs=9, stopped=stopped
    )


def test_what_is_accepted(clip: Any) -> None:
    assert judge(repair(clip, after=70.0), 10.0)[0]
    accepted, reason = judge(repair(clip, after=69.9), 10.0)
    assert not accepted
    assert "69.9" in reason
    assert "80.0" in reason
    assert judge(repair(clip, after=80.0, stopped="diverged at step 3"), 10.0) == (False, "diverged at step 3")


def test_no_model_may_lose_more_than_half_of_what_it_knows(clip: Any) -> None:
    config = PARConfig(bound=10.0)
    assert largest_fall(repair(clip, after=0.0), config) == 10.0
    assert largest_fall(repair(clip, before=11.0, after=0.0), config) == 5.0
    assert largest_fall(repair(clip, before=3.0, after=0.0), config) == 10.0  # which the result warns of
