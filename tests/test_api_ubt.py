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
from unpoison.api_ubt import purify_with_ubt
from unpoison.catalog import DEFENSES, find, resolve
from unpoison.clip_results import ClipPurification
from unpoison.data.pairs import open_pairs
from unpoison.defenses.ubt import UBTConfig
from unpoison.detection.exposure import ExposureConfig
from unpoison.errors import ModelError, NoSeparationError, NotEnoughDataError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run, RunFolder

QUICK: dict[str, Any] = {
    "batch_size": 16, "steps": 2, "check_every": 1, "learning_rate": 1e-3, "bound": 100.0, "unlearn_share": 0.08,
    "margin": 2.0,
}  # fmt: skip
ANY = ExposureConfig(confirmation=0.0)
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
    outcome = purify_with_ubt(clip, pairs, reference=known, config=UBTConfig(**QUICK, exposure=ANY), run=new_run())
    result = outcome.purification
    assert state(clip) == before
    assert state(outcome.clip) != before
    assert (result.method, result.accepted, result.steps, result.seed) == ("ubt", True, 2, 4)
    assert result.protects == find("ubt", DEFENSES).protects
    assert not result.left_alone
    exposure = result.exposure
    assert exposure is not None
    assert exposure.exposed
    assert exposure.unlearnt == exposure.judges == 12
    assert exposure.level is not None
    assert "that were kept aside match their captions" in result.reason
    assert ("reference" in result.inputs) == reference
    listed = outcome.suspicious
    assert listed.scan.flagged == round(exposure.rate / 100 * len(pairs))
    assert np.isfinite(listed.scores.suspicion).all()
    assert listed.samples
    result.save(tmp_path / "purification.json")
    assert ClipPurification.load(tmp_path / "purification.json").exposure == exposure


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
    result = purify_with_ubt(clip, pairs, config=config, run=new_run()).purification
    assert result.accepted == (over < 0)


def test_exposing_is_not_repeated(clip: Any, pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = UBTConfig(**QUICK, exposure=ANY)
    run = new_run(folder=RunFolder.open(tmp_path / "run", {}))
    first = purify_with_ubt(clip, pairs, config=config, run=run)
    monkeypatch.setattr(api_ubt, "_expose", None)
    again = purify_with_ubt(clip, pairs, config=config, run=run)
    assert state(first.clip) == state(again.clip)
    assert first.purification.exposure == again.purification.exposure


def test_the_gain_ranks_as_published(clip: Any, pairs: Any) -> None:
    config = UBTConfig.as_published(**QUICK)
    outcome = purify_with_ubt(clip, pairs, reference=load_clip("tiny"), config=config, run=new_run())
    assert outcome.suspicious.scan.method == "gain"
    assert outcome.purification.exposure is not None
    assert outcome.purification.exposure.unlearnt == 12
    assert "overfitted copy" in outcome.suspicious.scan.estimate.reason


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


def test_pairs_that_are_all_alike_are_refused(clip: Any, pairs: Any) -> None:
    same = replace(pairs, replaced=dict.fromkeys(pairs.ids, ("a thing",)))
    with pytest.raises(NoSeparationError):
        purify_with_ubt(clip, same, reference=load_clip("tiny"), config=UBTConfig(**QUICK), run=new_run())
    with pytest.raises(NotEnoughDataError):
        purify_with_ubt(clip, open_pairs("shapes:10:3"), config=UBTConfig(**QUICK), run=new_run())
