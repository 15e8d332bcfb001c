"""``purify_with_ubt``: what it says where nothing stands out, where something does, and without a reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from unpoison import api_ubt
from unpoison.api_ubt import purify_with_abl_clip, purify_with_ubt
from unpoison.catalog import DEFENSES, find, resolve
from unpoison.clip_results import ClipPurification
from unpoison.data.pairs import open_pairs
from unpoison.defenses.ubt import UBTConfig
from unpoison.detection.exposure import ExposureConfig
from unpoison.detection.neighbours import NeighboursConfig
from unpoison.detection.similarity_gain import OverfitConfig
from unpoison.errors import ModelError, NoSeparationError, NotEnoughDataError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run, RunFolder

QUICK: dict[str, Any] = {
    "batch_size": 16, "steps": 2, "check_every": 1, "learning_rate": 1e-3, "bound": 100.0, "unlearn_share": 0.08,
    "margin": 2.0,
}  # fmt: skip
ANY = ExposureConfig(confirmation=0.0, misfit=0.0)
NONE = ExposureConfig(confirmation=1.0)


def new_run(**more: Any) -> Run:
    return Run(accelerator=Accelerator(cpu=True), seed=4, **more)


@pytest.fixture(scope="module")
def clip(small_folder: Path) -> Any:
    return load_clip(small_folder)


@pytest.fixture(scope="module")
def pairs() -> Any:
    return open_pairs("shapes:300:3")


def state(clip: Any) -> str:
    return hash_weights(dict(clip.module.state_dict()))


def test_the_catalog_lists_it() -> None:
    entry = find("ubt", DEFENSES)
    assert resolve(entry.function) is purify_with_ubt
    assert resolve(entry.config) is UBTConfig


@pytest.mark.parametrize("reference", [True, False])
def test_a_repair_is_on_record(reference: bool, clip: Any, pairs: Any, tmp_path: Path) -> None:
    before = state(clip)
    known = load_clip("tiny") if reference else None
    config = UBTConfig(**QUICK, exposure=ANY, always=not reference)
    outcome = purify_with_ubt(clip, pairs, reference=known, config=config, run=new_run())
    result = outcome.purification
    assert state(clip) == before
    assert state(outcome.clip) != before
    assert (result.method, result.accepted, result.steps, result.seed) == ("ubt", True, 2, 4)
    assert result.protects == find("ubt", DEFENSES).protects
    assert not result.left_alone
    exposure = result.exposure
    assert exposure is not None
    assert exposure.exposed == reference
    assert (exposure.misfit is None) != reference
    assert exposure.unlearnt == exposure.judges == 12
    assert exposure.level is not None
    assert "that were kept aside match their captions" in result.reason
    assert ("reference" in result.inputs) == reference
    listed = outcome.suspicious
    assert listed.scan.flagged == round(exposure.rate / 100 * len(pairs))
    estimate = listed.scan.estimate
    assert estimate.poisoned == reference
    assert listed.scan.inconclusive != reference
    assert estimate.rate_low <= estimate.rate <= estimate.rate_high
    assert estimate.rate == pytest.approx(exposure.rate / 100)
    assert any("is its own neighbours" in warning for warning in result.warnings) != reference
    assert np.isfinite(listed.scores.suspicion).all()
    assert listed.samples
    result.save(tmp_path / "purification.json")
    assert ClipPurification.load(tmp_path / "purification.json").exposure == exposure


@pytest.mark.parametrize("itself", [True, False])
def test_without_another_model_pairs_are_ranked_and_the_model_stays(itself: bool, clip: Any, pairs: Any) -> None:
    config = UBTConfig(**QUICK, exposure=ANY)
    outcome = purify_with_ubt(clip, pairs, reference=clip if itself else None, config=config, run=new_run())
    result = outcome.purification
    assert state(outcome.clip) == state(clip)
    assert (result.left_alone, result.accepted, result.undecided, result.steps) == (True, False, True, 0)
    assert result.reason.startswith("Pairs are ranked and nothing is decided")
    assert outcome.suspicious.scan.inconclusive
    assert outcome.suspicious.scan.flagged == 0
    assert np.isfinite(outcome.suspicious.scores.suspicion).all()
    few = replace(config, always=True, unlearn_share=0.01)
    refused = purify_with_ubt(clip, pairs, config=few, run=new_run()).purification
    assert (refused.left_alone, refused.accepted) == (True, False)
    assert "Only 3 pairs may be unlearnt" in refused.reason


def test_a_model_stays_as_it_is_where_nothing_stands_out(clip: Any, pairs: Any) -> None:
    outcome = purify_with_ubt(
        clip, pairs, reference=load_clip("tiny"), config=UBTConfig(**QUICK, exposure=NONE), run=new_run()
    )
    result = outcome.purification
    assert state(outcome.clip) == state(clip)
    assert outcome.clip is not clip
    assert (result.left_alone, result.accepted, result.steps) == (True, True, 0)
    assert result.reason.startswith("No group of pairs stands out")
    assert result.exposure is not None
    assert result.exposure.unlearnt == 0
    assert outcome.suspicious.scan.flagged == 0
    assert outcome.suspicious.scan.inconclusive
    assert np.isfinite(outcome.suspicious.scores.suspicion).all()


@pytest.mark.parametrize("over", [-0.01, 0.01])
def test_pairs_that_still_match_refuse_the_result(
    over: float, clip: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, repair = replace(UBTConfig(**QUICK, exposure=ANY), margin=0.02), api_ubt.repair_with_ubt

    def judged(*args: Any, **kwargs: Any) -> Any:
        found = repair(*args, **kwargs)
        return replace(found, judged_after=found.unlearning.level + 0.02 + over)

    monkeypatch.setattr(api_ubt, "repair_with_ubt", judged)
    result = purify_with_ubt(clip, pairs, reference=load_clip("tiny"), config=config, run=new_run()).purification
    assert result.accepted == (over < 0)


def test_exposing_is_not_repeated(clip: Any, pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = UBTConfig(**QUICK, exposure=ANY, always=True)
    run = new_run(folder=RunFolder.open(tmp_path / "run", {}))
    first = purify_with_ubt(clip, pairs, config=config, run=run)
    monkeypatch.setattr(api_ubt, "_expose", None)
    again = purify_with_ubt(clip, pairs, config=config, run=run)
    assert state(first.clip) == state(again.clip)
    assert first.purification.exposure == again.purification.exposure


def test_the_gain_ranks_as_published(clip: Any, pairs: Any) -> None:
    config = UBTConfig.as_published(**QUICK)
    outcome = purify_with_ubt(clip, pairs, reference=load_clip("tiny"), config=config, run=new_run())
    listed, exposure = outcome.suspicious, outcome.purification.exposure
    assert listed.scan.method == "gain"
    assert listed.scan.inconclusive
    assert listed.scan.flagged == 30
    assert exposure is not None
    assert 16 <= exposure.unlearnt + exposure.judges <= 24
    assert exposure.seeds >= exposure.unlearnt + exposure.judges
    assert "overfitted copy" in listed.scan.estimate.reason


def test_the_first_suspicion_alone_can_rank(clip: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_ubt, "similarity_gain", None)
    config = replace(UBTConfig.as_published(**QUICK), expose="similarity")
    outcome = purify_with_ubt(clip, pairs, reference=load_clip("tiny"), config=config, run=new_run())
    assert outcome.suspicious.scan.method == "similarity"
    assert outcome.suspicious.scan.flagged == 30
    assert "how little they match" in outcome.purification.reason
    assert outcome.purification.steps > 0


def test_overfitting_and_neighbours_can_be_set(clip: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(api_ubt, "similarity_gain", lambda *args, **_: seen.append(args[5]) or np.linspace(0, 1, 300))
    config = UBTConfig.as_published(**QUICK, overfit=OverfitConfig(epochs=1), neighbours=NeighboursConfig(k=5))
    result = purify_with_ubt(clip, pairs, config=config, run=new_run()).purification
    assert seen == [OverfitConfig(epochs=1)]
    assert any("poison of more than 1.7 percent is its own neighbours" in warning for warning in result.warnings)
    wide = UBTConfig(**QUICK, neighbours=NeighboursConfig(k=300))
    with pytest.raises(NotEnoughDataError, match="need at least 301"):
        purify_with_ubt(clip, pairs, config=wide, run=new_run())


def test_a_set_too_small_to_unlearn_from_still_gives_the_list(clip: Any, pairs: Any) -> None:
    config = replace(UBTConfig(**QUICK, exposure=ANY), unlearn_share=0.01)
    outcome = purify_with_ubt(clip, pairs, reference=load_clip("tiny"), config=config, run=new_run())
    result = outcome.purification
    assert (result.accepted, result.left_alone, result.steps) == (False, True, 0)
    assert "Only 3 pairs may be unlearnt, 16 are needed" in result.reason
    assert state(outcome.clip) == state(clip)
    assert outcome.suspicious.scan.estimate.poisoned
    assert outcome.suspicious.scan.flagged > 0


def test_a_set_too_small_to_rank_is_refused_before_anything_is_embedded(
    clip: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_ubt, "see_pairs", None)
    for config in (UBTConfig(**QUICK), UBTConfig.as_published(**QUICK)):
        with pytest.raises(NotEnoughDataError, match=f"have 100, need at least {config.fewest_pairs}"):
            purify_with_ubt(clip, pairs.select(range(100)), config=config, run=new_run())


def test_a_logit_scale_that_cannot_be_used_is_named(clip: Any, pairs: Any) -> None:
    odd = clip.copy()
    odd.module.get_parameter("logit_scale").data.fill_(1000.0)
    config = UBTConfig(**QUICK, exposure=ANY)
    result = purify_with_ubt(odd, pairs, reference=load_clip("tiny"), config=config, run=new_run()).purification
    assert result.steps == 2
    assert any("logit scale is inf; 100 was used" in warning for warning in result.warnings)


def test_a_model_in_half_precision_comes_back_in_it(clip: Any, pairs: Any) -> None:
    half = clip.copy()
    half.module.half()
    before = state(half)
    outcome = purify_with_ubt(
        half, pairs, reference=load_clip("tiny"), config=UBTConfig(**QUICK, exposure=ANY), run=new_run()
    )
    assert state(half) == before
    assert state(outcome.clip) != before
    assert {value.dtype for value in outcome.clip.module.parameters()} == {torch.float16}
    assert not outcome.clip.module.training


def test_weights_that_are_no_numbers_are_refused(clip: Any, pairs: Any) -> None:
    broken = clip.copy()
    broken.module.get_parameter("text_projection.weight").data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="1 tensors hold NaN"):
        purify_with_ubt(
            broken, pairs, reference=load_clip("tiny"), config=UBTConfig(**QUICK, exposure=ANY), run=new_run()
        )


@pytest.mark.parametrize("deaf", ["suspect", "reference"])
def test_a_model_that_tells_no_caption_from_another_is_refused(deaf: str, clip: Any, pairs: Any) -> None:
    models = {"suspect": clip.copy(), "reference": clip.copy()}
    models[deaf].module.get_parameter("text_projection.weight").data.zero_()
    for config in (UBTConfig(**QUICK), UBTConfig.as_published(**QUICK)):
        with pytest.raises(NoSeparationError, match=f"The {deaf} gives all captions"):
            purify_with_ubt(models["suspect"], pairs, reference=models["reference"], config=config, run=new_run())
    if deaf == "suspect":
        with pytest.raises(NoSeparationError, match="The model gives all captions"):
            purify_with_abl_clip(models["suspect"], pairs, run=new_run())


def test_pairs_that_are_all_alike_are_refused(clip: Any, pairs: Any) -> None:
    same = replace(pairs, replaced=dict.fromkeys(pairs.ids, ("a thing",)))
    for config in (UBTConfig(**QUICK), UBTConfig.as_published(**QUICK)):
        for reference in (load_clip("tiny"), None):
            with pytest.raises(NoSeparationError, match="have the same caption"):
                purify_with_ubt(clip, same, reference=reference, config=config, run=new_run())
    with pytest.raises(NoSeparationError, match="have the same caption"):
        purify_with_abl_clip(clip, same, run=new_run())
    alike = replace(
        pairs, replaced={name: ("A thing" if row % 2 else "a THING",) for row, name in enumerate(pairs.ids)}
    )
    with pytest.raises(NoSeparationError, match="The suspect gives all captions"):
        purify_with_ubt(clip, alike, config=UBTConfig(**QUICK), run=new_run())
    with pytest.raises(NotEnoughDataError):
        purify_with_ubt(clip, open_pairs("shapes:10:3"), config=UBTConfig(**QUICK), run=new_run())
