"""Shared steps: made once, found by what they depend on, gone on with after a kill."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from unpoison.benchmark.shared import is_waiting, shared
from unpoison.runs import Run, RunFolder


def test_a_step_is_made_once_for_equal_inputs(tmp_path: Path) -> None:
    made = []

    def make(place: RunFolder) -> None:
        made.append(place.path.name)
        (place.path / "result.txt").write_text("here")

    first = shared(tmp_path, "victim", {"seed": 0, "params": {"a": 1.0}}, make)
    assert shared(tmp_path, "victim", {"params": {"a": 1.0}, "seed": 0}, make) == first
    assert (first.path / "result.txt").read_text() == "here"
    other = shared(tmp_path, "victim", {"seed": 1, "params": {"a": 1.0}}, make)
    assert other.key != first.key
    assert made == [first.path.name, other.path.name]


def test_a_killed_step_goes_on_and_leaves_no_steps(tmp_path: Path) -> None:
    computed = []

    def make(place: RunFolder) -> None:
        run = Run(folder=place)
        for name in ("a", "b"):

            def compute(name: str = name) -> dict[str, torch.Tensor]:
                computed.append(name)
                if computed == ["a", "b"]:
                    raise KeyboardInterrupt
                return {"x": torch.zeros(1)}

            run.step(name, compute)

    with pytest.raises(KeyboardInterrupt):
        shared(tmp_path, "scores", {"seed": 0}, make)
    step = shared(tmp_path, "scores", {"seed": 0}, make)
    assert computed == ["a", "b", "b"]
    assert step.resumed  # its seconds are those of the rest
    assert shared(tmp_path, "scores", {"seed": 0}, make) == step
    assert not shared(tmp_path, "scores", {"seed": 1}, lambda place: None).resumed
    assert list((step.path / "steps").iterdir()) == []


def test_who_waits_for_a_step_says_so_until_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unpoison.benchmark.shared._POLL", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    def make(place: RunFolder) -> None:
        begun.set()
        assert go_on.wait(60)

    def need() -> None:
        shared(tmp_path, "victim", {"seed": 0}, make)

    first, second = threading.Thread(target=need), threading.Thread(target=need)
    first.start()
    assert begun.wait(60)
    assert not is_waiting(tmp_path, os.getpid())
    second.start()
    deadline = time.monotonic() + 60
    while not is_waiting(tmp_path, os.getpid()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    go_on.set()
    first.join(60)
    second.join(60)
    assert not is_waiting(tmp_path, os.getpid())
    assert not list(tmp_path.glob("waiting-*"))
