"""Run folders: begun, continued, refused with the difference; steps computed once; streams of random numbers."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from unpoison.errors import ResultError, RunFolderMismatchError, UsageError
from unpoison.runs import Progress, Run, RunFolder, Silent

INPUTS = {"command": "scan dataset", "seed": 0, "config": {"steps": 400, "schedule": "linear"}, "source": Path("a")}


class Recorder(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


class Counted:
    """A step's computation that knows how often it was asked."""

    def __init__(self, value: float = 1.0) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        return {"weight": torch.full((2, 3), self.value).T, "count": torch.tensor(4)}


def make_run(folder: RunFolder | None = None, **changes: Any) -> Run:
    return Run(accelerator=Accelerator(cpu=True), folder=folder, **changes)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_folder_is_begun_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    first = RunFolder.open(path, INPUTS)
    assert names(path) == ["run.json", "steps"]
    assert not first.finished
    written = (path / "run.json").read_bytes()
    (path / "scores.parquet").write_bytes(b"of the first run")
    again = RunFolder.open(path, dict(reversed(INPUTS.items())))
    assert again == first
    assert (path / "run.json").read_bytes() == written
    again.finish()
    assert RunFolder.open(path, INPUTS).finished
    assert (path / "scores.parquet").read_bytes() == b"of the first run"


def test_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, INPUTS)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunFolderMismatchError) as caught:
        RunFolder.open(tmp_path, INPUTS | {"seed": 3, "limit": 100})
    assert caught.value.difference == ("limit: None there, 100 now", "seed: 0 there, 3 now")
    assert str(tmp_path) in caught.value.message
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_folder_with_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        RunFolder.open(tmp_path, INPUTS)
    assert names(tmp_path) == ["thesis.tex"]


def test_what_a_kill_left_before_the_first_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".run.json.123.partial").write_bytes(b"{")
    RunFolder.open(tmp_path, INPUTS)
    assert (tmp_path / "run.json").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_way(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="cannot be written") as caught:
        RunFolder.open(tmp_path / place, INPUTS)
    assert caught.value.hint
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_the_file_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        RunFolder.open(tmp_path / ("x" * 300), INPUTS)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written"):
        RunFolder.open(tmp_path / "out", INPUTS)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_list_of_inputs(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ResultError, match=r"run\.json is damaged"):
        RunFolder.open(tmp_path, INPUTS)
    assert (tmp_path / "run.json").read_bytes() == content


def test_a_step_is_computed_once(tmp_path: Path) -> None:
    progress, compute = Recorder(), Counted()
    run = make_run(RunFolder.open(tmp_path, INPUTS), progress=progress)
    first = run.step("repair-00000", compute)
    again = make_run(RunFolder.open(tmp_path, INPUTS), progress=progress).step("repair-00000", compute)
    assert compute.calls == 1
    assert {name: value.tolist() for name, value in first.items()} == {
        name: value.tolist() for name, value in again.items()
    }
    assert again["weight"].shape == (3, 2)
    assert progress.lines == ["repair-00000: continued from repair-00000.safetensors"]
    assert names(tmp_path / "steps") == ["repair-00000.safetensors"]
    run.step("repair-00050", compute)
    assert compute.calls == 2


def test_without_a_folder_nothing_is_kept() -> None:
    compute = Counted()
    for _ in range(2):
        make_run().step("a", compute)
    assert compute.calls == 2


@pytest.mark.parametrize("kept", [0, 7, 50, -1])
def test_a_damaged_step_is_computed_again(kept: int, tmp_path: Path) -> None:
    progress = Recorder()
    run = make_run(RunFolder.open(tmp_path, INPUTS), progress=progress)
    run.step("scorer-0", Counted(1.0))
    path = tmp_path / "steps" / "scorer-0.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    compute = Counted(2.0)
    assert run.step("scorer-0", compute)["weight"].unique().tolist() == [2.0]
    assert compute.calls == 1
    assert "damaged" in progress.lines[0]
    assert run.step("scorer-0", Counted(3.0))["weight"].unique().tolist() == [2.0]


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    run = make_run(RunFolder.open(tmp_path, INPUTS))

    def fail() -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step("scorer-0", fail)
    assert names(tmp_path / "steps") == []


def test_streams_do_not_depend_on_the_order_of_their_use() -> None:
    def draw(run: Run, *stream: object) -> list[float]:
        return torch.rand(3, generator=run.generator(*stream)).tolist()

    run = make_run(seed=5)
    forward = {name: draw(run, *name) for name in (("train", 0), ("train", 1), ("repair", 0))}
    backward = {name: draw(make_run(seed=5), *name) for name in reversed(forward)}
    assert forward == backward
    assert len({tuple(values) for values in forward.values()}) == 3
    assert draw(make_run(seed=6), "train", 0) != forward["train", 0]
    assert 0 <= run.seed_of("train") < 2**63
    assert run.seed_of("train", 11) != run.seed_of("train1", 1)


def test_the_global_random_state_is_seeded_inside_and_untouched_outside() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    run = make_run(seed=2)
    with run.seeded("train", 0):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with make_run(seed=2).seeded("train", 0):
        assert torch.equal(torch.rand(2), inside)
    with run.seeded("train", 1):
        assert not torch.equal(torch.rand(2), inside)


def test_stored_steps_can_be_asked_for_and_forgotten(tmp_path: Path) -> None:
    run = make_run(RunFolder.open(tmp_path / "run", INPUTS))
    assert run.stored("first") is None
    assert make_run().stored("first") is None
    for name in ("first", "second"):
        run.step(name, Counted(2.0))
    stored = run.stored("first")
    assert stored is not None
    assert torch.equal(stored["weight"], torch.full((3, 2), 2.0))
    run.forget(["first", "never"])
    make_run().forget(["second"])
    assert run.stored("first") is None
    assert run.stored("second") is not None
    (tmp_path / "run" / "steps" / "second.safetensors").write_bytes(b"damaged")
    assert run.stored("second") is None


def test_a_step_that_another_process_forgets_meanwhile_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(RunFolder.open(tmp_path / "run", INPUTS))
    monkeypatch.setattr(Path, "exists", lambda path: True)  # as it was when it was asked for
    assert run.stored("gone") is None


def test_a_full_disk_is_said_and_leaves_the_step_open(tmp_path: Path) -> None:
    run = make_run(RunFolder.open(tmp_path / "run", INPUTS))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as good as full: longer files are refused
    try:
        with pytest.raises(UsageError, match="could not be written") as caught:
            run.step("large", lambda: {"weight": torch.zeros(2**18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "1 MiB" in caught.value.hint
    assert not list((tmp_path / "run" / "steps").iterdir())
    assert run.step("large", Counted())["count"] == 4


def test_a_disk_that_is_full_at_the_very_end_is_said_as_well(tmp_path: Path) -> None:
    run = make_run(RunFolder.open(tmp_path / "run", INPUTS))
    assert run.folder is not None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"finished\.json could not be written"):
            run.folder.finish()
        with pytest.raises(UsageError, match=r"words\.json could not be written"):
            run.kept("words", list, lambda: ["a", "b"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not run.folder.finished
    run.folder.finish()
    assert run.folder.finished


def test_silent_progress_yields_everything() -> None:
    assert isinstance(Silent(), Progress)
    assert list(Silent().track(range(3), total=3, what="work", weight=2, unit="images")) == [0, 1, 2]
