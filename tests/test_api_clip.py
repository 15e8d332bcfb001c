"""The verbs for CLIP: what they say of a training that went through, and of one that did not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from unpoison.api_clip import judge, purify_with_clean_clip, purify_with_fine_tuning, purify_with_par
from unpoison.catalog import DEFENSES, find, resolve
from unpoison.clip_results import ClipPurification
from unpoison.clip_training import ClipRepair
from unpoison.defenses.baselines.clean_clip import CleanClipConfig
from unpoison.defenses.baselines.fine_tuning import FineTuningConfig
from unpoison.defenses.par import PARConfig
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run

QUICK = {"batch_size": 12, "steps": 2, "check_every": 1, "learning_rate": 1e-4, "bound": 100.0}
VERBS: dict[str, tuple[Any, Any]] = {
    "par": (purify_with_par, PARConfig(**QUICK)),
    "clean-clip": (purify_with_clean_clip, CleanClipConfig(**QUICK)),
    "fine-tuning": (purify_with_fine_tuning, FineTuningConfig(**QUICK)),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = Path(__file__).parent / "defenses" / "small_clip.py"
    spec = importlib.util.spec_from_file_location("small_clip", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return load_clip(module.make_folder(tmp_path_factory.mktemp("clip") / "model"))


@pytest.fixture(scope="module")
def pairs() -> Any:
    from unpoison.data.pairs import open_pairs

    return open_pairs("shapes:40:3")


def test_the_catalog_lists_them() -> None:
    listed = {entry.name: entry for entry in DEFENSES if "suspicious CLIP" in entry.needs}
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
    assert result.protects == find(method, DEFENSES).protects
    assert any("tokenizer cuts off" in warning for warning in result.warnings)
    result.save(tmp_path / "purification.json")
    assert ClipPurification.load(tmp_path / "purification.json") == replace(
        result, config=ClipPurification.load(tmp_path / "purification.json").config
    )


def repair(clip: Any, *, after: float, stopped: str = "") -> ClipRepair:
    looks = [
        {"step": float(step), "held_out_accuracy": accuracy, "chance": 1.0, "image_cosine": 0.1, "text_cosine": 0.9}
        for step, accuracy in ((0, 80.0), (5, after))
    ]
    return ClipRepair(
        model=clip, history=looks, steps=5, planned=5, batch_size=2, trained_pairs=9, held_out_pairs=9, stopped=stopped
    )


def test_what_is_accepted(clip: Any) -> None:
    config = PARConfig()
    assert judge(repair(clip, after=70.0), config)[0]
    accepted, reason = judge(repair(clip, after=69.9), config)
    assert not accepted
    assert "69.9" in reason
    assert "80.0" in reason
    assert judge(repair(clip, after=80.0, stopped="diverged at step 3"), config) == (False, "diverged at step 3")
