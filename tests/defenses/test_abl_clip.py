"""ABL for CLIP: who is flagged, what the loss is, and what a run of it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from unpoison.api_ubt import purify_with_abl_clip
from unpoison.catalog import DEFENSES, find, resolve
from unpoison.data.pairs import open_pairs
from unpoison.defenses.baselines.abl_clip import ABLClipConfig, flag, repair_with_abl_clip, unlearn_loss
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run, RunFolder

QUICK: dict[str, Any] = {
    "batch_size": 12, "steps": 4, "check_every": 2, "learning_rate": 2e-3, "bound": 100.0, "flagged_share": 0.1,
    "unlearn_batch": 8,
}  # fmt: skip


def new_run(**more: Any) -> Run:
    return Run(accelerator=Accelerator(cpu=True), seed=2, **more)


@pytest.fixture(scope="module")
def clip(small_folder: Path) -> Any:
    return load_clip(small_folder)


@pytest.fixture(scope="module")
def pairs() -> Any:
    return open_pairs("shapes:80:3")


def test_the_surest_pairs_are_flagged_and_unusable_ones_never() -> None:
    cosines = np.linspace(0.9, 0.1, 50)
    cosines[[0, 3]] = np.nan
    assert flag(cosines, 0.1).tolist() == [1, 2, 4, 5]  # 10 percent of the 48 that can be used
    with pytest.raises(NotEnoughDataError):
        flag(cosines, 0.02)


def test_the_loss_is_its_equation() -> None:
    images, texts = (F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    for opposite in (0.0, 1.0, -1.0):
        expected = np.mean([(float(images[i] @ texts[i]) + opposite) ** 2 for i in range(5)])
        assert float(unlearn_loss(images, texts, opposite)) == pytest.approx(expected, abs=1e-6)


def test_flagged_pairs_end_as_strangers(clip: Any, pairs: Any) -> None:
    before = hash_weights(dict(clip.module.state_dict()))
    cosines = np.zeros(80)
    cosines[:8] = 1.0
    config = ABLClipConfig(**QUICK | {"steps": 30, "check_every": 30, "unlearn_weight": 20.0})
    repair = repair_with_abl_clip(clip, pairs, cosines, config, run=new_run())
    assert hash_weights(dict(clip.module.state_dict())) == before
    images = clip.preprocess(pairs.decode(range(8)))
    texts = [captions[0] for captions in pairs.captions(range(8))]

    def apart(model: Any) -> float:
        with torch.no_grad():
            return float(unlearn_loss(model.encode_images(images), model.encode_texts(texts), 0.0))

    assert apart(repair.model) < 0.5 * apart(clip)
    assert repair.trained_pairs + repair.held_out_pairs == 72  # the flagged ones are repeated nowhere


def test_a_run_resumes_where_it_was(clip: Any, pairs: Any, tmp_path: Path) -> None:
    config = ABLClipConfig(**QUICK)
    once = purify_with_abl_clip(clip, pairs, config=config, run=new_run())
    folder = tmp_path / "run"
    purify_with_abl_clip(clip, pairs, config=config, run=new_run(folder=RunFolder.open(folder, {})))
    stored = sorted((folder / "steps").glob("*.safetensors"))
    assert any("cosines" in file.name for file in stored)
    stored[-1].unlink()
    again = purify_with_abl_clip(clip, pairs, config=config, run=new_run(folder=RunFolder.open(folder, {})))
    first, second = (hash_weights(dict(outcome.clip.module.state_dict())) for outcome in (once, again))
    assert first == second
    assert once.purification.method == "abl-clip"
    assert once.purification.accepted


def test_the_catalog_lists_it_and_odd_settings_are_refused() -> None:
    entry = find("abl-clip", DEFENSES)
    assert resolve(entry.function) is purify_with_abl_clip
    assert resolve(entry.config) is ABLClipConfig
    assert ABLClipConfig().flagged_share == 0.02
    assert ABLClipConfig().opposite == 0.0
    impossible: list[dict[str, Any]] = [
        {"flagged_share": 0.0}, {"opposite": 2.0}, {"unlearn_batch": 0}, {"unlearn_weight": -1.0}
    ]  # fmt: skip
    for wrong in impossible:
        with pytest.raises(ConfigError):
            ABLClipConfig(**wrong)
