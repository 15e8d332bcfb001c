"""A training that is killed ends with the same weights; two processes train what one trains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from unpoison.api_clip import judge
from unpoison.clip_loop import train_steps
from unpoison.clip_training import ClipRepair, PairTrainingConfig, frozen_copy, open_training, trainable
from unpoison.defenses.par import PARConfig, repair_with_par
from unpoison.errors import ConfigError
from unpoison.runs import Run, RunFolder

SCRIPT = Path(__file__).with_name("small_clip.py")
SETTINGS: dict[str, Any] = {"batch_size": 12, "steps": 6, "check_every": 2, "learning_rate": 1e-3}


def run_script(folder: Path, weights: Path, settings: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(weights), "shapes:48:3", json.dumps(settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors


def state_of(repair: ClipRepair) -> dict[str, Tensor]:
    return dict(repair.model.module.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_two_processes_train_what_one_trains(small_folder: Path, clip: Any, pairs: Any, tmp_path: Path) -> None:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    # Six pairs a process: two chunks. Adam would make steps of rounding where a gradient is zero: a large epsilon.
    settings = SETTINGS | {"steps": 3, "chunk_size": 4, "epsilon": 1e-3}
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        run_script(small_folder, tmp_path / "two.safetensors", settings, RANK=str(rank), LOCAL_RANK=str(rank), **world)
        for rank in range(2)
    ]
    try:
        one = repair_with_par(clip, pairs, PARConfig(**settings), run=Run(accelerator=Accelerator(cpu=True)))
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    torch.testing.assert_close(load_file(tmp_path / "two.safetensors"), state_of(one), atol=2e-5, rtol=1e-3)
    history = json.loads((tmp_path / "two.json").read_text())
    for found, expected in zip(history, one.history, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


SEARCH = """
import sys, types
from accelerate import Accelerator
import torch
from unpoison import api_clip
from unpoison.data.pairs import open_pairs
from unpoison.defenses.par import PARConfig
from unpoison.detection.inversion import InvertedTrigger
from unpoison.detection.trigger_search import TriggerSearch
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run

run = Run(accelerator=Accelerator(cpu=True))
trigger = InvertedTrigger(
    form="additive", target=0, mask=torch.ones(1, 16, 16), pattern=torch.zeros(3, 16, 16), size=0.1, success=90.0
)
suspects = (0,) if run.accelerator.process_index == int(sys.argv[2]) else ()  # one process rounds the other way
search = TriggerSearch(triggers=(trigger,), index=(3.0,), suspects=suspects, reason="Planted.")
api_clip.search_concepts = lambda *_, **__: (search, ("a star",))
config = PARConfig(batch_size=8, steps=2, check_every=1, search_concepts=8, bound=100.0)
outcome = api_clip.purify_with_par(load_clip(sys.argv[1]), open_pairs("shapes:40:3"), config=config, run=run)
print("steps", outcome.purification.steps)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(("suspecting", "steps"), [(0, 2), (1, 0)])
def test_processes_that_find_different_things_do_what_the_first_one_found(
    suspecting: int, steps: int, small_folder: Path
) -> None:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEARCH, str(small_folder), str(suspecting)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)} | world,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            out, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
            assert f"steps {steps}" in out
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_batch_smaller_than_the_number_of_processes_is_refused(
    clip: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(accelerator=Accelerator(cpu=True))
    monkeypatch.setattr(Accelerator, "num_processes", 8)
    with pytest.raises(ConfigError, match="a batch of 7 cannot be shared by 8 processes") as caught:
        open_training(clip, pairs, PairTrainingConfig(batch_size=7, steps=1), run=run)
    assert "8 or more" in caught.value.hint
    assert open_training(clip, pairs, PairTrainingConfig(batch_size=8, steps=1), run=run).batch_size == 8


@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_ends_with_the_same_weights(
    small_folder: Path, clip: Any, pairs: Any, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = SETTINGS | {"adversary_share": 0.5}  # whose pattern and patch are part of the state
    whole = repair_with_par(clip, pairs, PARConfig(**chosen), run=Run(accelerator=Accelerator(cpu=True)))
    settings = chosen | {"folder": str(tmp_path / "run")}
    process = run_script(small_folder, tmp_path / "killed.safetensors", settings)
    steps = tmp_path / "run" / "steps"
    try:
        while process.poll() is None and not any(steps.glob("par-*.safetensors")):
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    stored = sorted(file.name for file in steps.glob("par-*.safetensors"))
    assert stored
    again = Run(accelerator=Accelerator(cpu=True), folder=RunFolder.open(tmp_path / "run", {}))
    repeated = repair_with_par(clip, pairs, PARConfig(**chosen), run=again)
    assert_same(state_of(repeated), state_of(whole))
    assert repeated.history == whole.history
    # from every state that a kill can leave: each of the stored ones as the newest, and a damaged one
    left = sorted(steps.glob("par-*.safetensors"))
    assert [file.name for file in left] == ["par-000002.safetensors", "par-000004.safetensors"]
    left[1].write_bytes(left[1].read_bytes()[:100])
    assert_same(state_of(repair_with_par(clip, pairs, PARConfig(**chosen), run=again)), state_of(whole))
    left[1].unlink()
    assert_same(state_of(repair_with_par(clip, pairs, PARConfig(**chosen), run=again)), state_of(whole))
    shutil.rmtree(steps)
    steps.mkdir()
    assert_same(state_of(repair_with_par(clip, pairs, PARConfig(**chosen), run=again)), state_of(whole))


Change = Callable[[Any, int], None]


def train_with(change: Change, clip: Any, pairs: Any, folder: Path | None = None, **settings: Any) -> ClipRepair:
    """The loop around a step that changes the weights by hand."""
    chosen: dict[str, Any] = {"batch_size": 8, "steps": 10, "check_every": 2} | settings
    config = PairTrainingConfig(**chosen)
    opened = None if folder is None else RunFolder.open(folder, {})
    run = Run(accelerator=Accelerator(cpu=True), folder=opened)
    data = open_training(clip, pairs, config, run=run)
    with trainable(clip, run) as trained:
        optimiser = torch.optim.AdamW(trained.module.parameters(), 1e-3)

        def one_step(step: int, looks: list[dict[str, float]]) -> dict[str, Tensor]:
            change(trained, step)
            return {"loss": torch.tensor(1.0 if step < 7 else float("nan"))}

        return train_steps(trained, frozen_copy(clip, run), optimiser, one_step, data, config, name="hand", run=run)


def test_a_loss_that_leaves_the_numbers_keeps_the_look_before(clip: Any, pairs: Any, tmp_path: Path) -> None:
    def nudge(trained: Any, step: int) -> None:
        trained.module.visual_projection.weight.data.add_(1e-3)

    repair = train_with(nudge, clip, pairs, tmp_path / "run")
    assert "diverged at step 7" in repair.stopped
    assert repair.steps == 6
    assert [look["step"] for look in repair.history] == [0, 2, 4, 6]
    name = "visual_projection.weight"
    expected = clip.module.get_parameter(name) + 6e-3
    torch.testing.assert_close(repair.model.module.get_parameter(name), expected)
    again = train_with(nudge, clip, pairs, tmp_path / "run")
    assert_same(state_of(again), state_of(repair))
    assert again.stopped == repair.stopped


def test_a_training_that_forgets_the_pairs_is_stopped(
    clip: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fitted = fit(clip, pairs)

    def forget(trained: Any, step: int) -> None:
        if step >= 3:
            trained.module.visual_projection.weight.data.mul_(-1 if step == 3 else 1)

    repair = train_with(forget, fitted, pairs, tmp_path / "run", held_out=0.9, held_out_pairs=40)
    assert repair.held_out_before > repair.history[0]["chance"] + 10
    assert "forgot the pairs by step 6" in repair.stopped
    assert repair.steps == 2
    assert_same(state_of(repair), dict(fitted.module.state_dict()))
    assert_same(
        state_of(train_with(forget, fitted, pairs, tmp_path / "run", held_out=0.9, held_out_pairs=40)),
        dict(fitted.module.state_dict()),
    )


@pytest.mark.parametrize(("check_every", "kept"), [(2, 4), (10, 0)])
def test_a_training_whose_last_look_alone_has_forgotten_the_pairs_is_not_accepted(
    check_every: int, kept: int, clip: Any, pairs: Any
) -> None:
    fitted = fit(clip, pairs)

    def forget(trained: Any, step: int) -> None:
        if step == 5:
            trained.module.visual_projection.weight.data.mul_(-1)

    settings: dict[str, Any] = {"steps": 6, "check_every": check_every, "held_out": 0.9, "held_out_pairs": 40}
    repair = train_with(forget, fitted, pairs, **settings)
    assert repair.stopped == f"The last look, step 6, had forgotten the pairs; the weights of step {kept} were kept."
    assert (repair.steps, repair.planned) == (kept, 6)
    assert_same(state_of(repair), dict(fitted.module.state_dict()))
    assert judge(repair, 10.0) == (False, repair.stopped)


def fit(clip: Any, pairs: Any) -> Any:
    """A copy whose two projections were fitted to these very pairs by least squares."""
    fitted = clip.copy()
    rows = list(range(len(pairs)))
    with torch.no_grad():
        vision = fitted.module.vision_model(pixel_values=normalised(fitted, pairs, rows)).pooler_output
        texts = fitted.encode_texts([pairs.captions([row])[0][0] for row in rows]).float()
        solution = torch.linalg.lstsq(vision, texts, driver="gelsd").solution
        fitted.module.visual_projection.weight.copy_(solution.T)
    return fitted


def normalised(clip: Any, pairs: Any, rows: list[int]) -> Tensor:
    images = clip.preprocess(pairs.decode(rows))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (clip.image_mean, clip.image_std))
    return (images - mean) / std


def test_nothing_is_learnt_from_a_loss_alone(clip: Any, pairs: Any) -> None:
    """A step that changes nothing gives back the very weights, and looks that say so."""
    repair = train_with(lambda trained, step: None, clip, pairs)
    assert_same(state_of(repair), dict(clip.module.state_dict()))
    assert repair.kept["image_cosine"] == pytest.approx(1, abs=1e-2)
    assert repair.kept["held_out_accuracy"] == repair.held_out_before
