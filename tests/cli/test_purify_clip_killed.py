"""``purify par`` killed wherever it may be, and on several processes: the weights are those of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from unpoison.clip_results import ClipPurification
from unpoison.detection.trigger_search import STEP

ANY = "held_out_pairs = 1\n"  # which is always found: a random model that learns so little is not judged
ADVERSARY = f"{ANY}check_every = 2\nadversary_share = 0.5\nadversary_values = 0.05\nadversary_start = 0.5\n"
"""It moves alone in the first half of the steps: a kill falls between."""
SHORT = (
    "--pairs",
    "shapes:120:4",
    "--steps",
    "8",
    "--batch-size",
    "8",
    "--bound",
    "100",
    "--learning-rate",
    "1e-4",
    "-q",
)
FILES = {"run.json", "steps", "model", "card.md", "purification.json", "report.html", "finished.json"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(small_folder: Path) -> str:
    return str(small_folder)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def outcome(folder: Path) -> tuple[bytes, Any, Any]:
    """The weights as they are stored, the looks on the way, and what was found before."""
    found = ClipPurification.load(folder / "purification.json")
    return (folder / "model" / "model.safetensors").read_bytes(), found.history, found.search


def changed(folder: Path, model: str) -> bool:
    given = load_file(Path(model) / "model.safetensors")
    return any(not value.equal(given[name]) for name, value in load_file(folder / "model/model.safetensors").items())


def test_a_repair_that_was_killed_ends_with_the_same_weights(
    here: Callable[..., Any], kill_at: Callable[..., None], model: str, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(ADVERSARY)
    words = ("purify", "par", model, "--always", *SHORT, "--config", "own.toml")
    assert here(*words, "-o", "whole", "--cache", "cache-whole").code == 0
    whole = outcome(tmp_path / "whole")
    assert len(whole[1]) == 5
    assert changed(tmp_path / "whole", model)
    for number, (place, time, stored) in enumerate(
        (
            ("unpoison.data.pixels:fit", 50, set()),  # while images are decoded
            ("unpoison.runs:Run.step", 2, {"par-000000.safetensors"}),  # while the adversary moves alone
            ("unpoison.runs:RunFolder.finish", 1, {"par-000004.safetensors", "par-000006.safetensors"}),
        )
    ):
        folder, again = tmp_path / f"out-{number}", (*words, "-o", f"out-{number}", "--cache", f"cache-{number}")
        kill_at(place, time, *again)
        assert stored <= names(folder / "steps")
        assert (folder / "model" / "model.safetensors").exists() == (place == "unpoison.runs:RunFolder.finish")
        assert not (folder / "finished.json").exists()
        assert any((tmp_path / f"cache-{number}").glob("*.npy")) == (place != "unpoison.data.pixels:fit")
        result = here(*again)
        assert result.code == 0, result.err
        assert outcome(folder) == whole
        assert names(folder) == FILES
        assert names(folder / "steps") == set()


def test_a_search_for_a_trigger_that_was_killed_finds_the_same(
    here: Callable[..., Any], kill_at: Callable[..., None], model: str, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(f"{ANY}search_concepts = 8\ncheck_every = 4\n")
    words = ("purify", "par", model, *SHORT, "--config", "own.toml", "--cache", "cache")
    assert here(*words, "-o", "whole").code == 0
    whole = outcome(tmp_path / "whole")
    assert whole[2].suspected
    assert changed(tmp_path / "whole", model)
    kill_at("unpoison.runs:Run.step", 6, *words, "-o", "out")
    kept = names(tmp_path / "out" / "steps")
    assert len(kept) > 2
    assert not [name for name in kept if not name.startswith(STEP)]
    result = here(*words, "-o", "out")
    assert result.code == 0, result.err
    assert outcome(tmp_path / "out") == whole


def test_two_processes_repair_as_one(here: Callable[..., Any], model: str, tmp_path: Path) -> None:
    import torch

    (tmp_path / "own.toml").write_text(
        f"{ANY}epsilon = 1e-3\n"
    )  # Adam would make steps of rounding where a gradient is zero
    words = ("purify", "par", model, "--always", *SHORT, "--config", "own.toml", "--test", "shapes:24:5", "--json")
    one = here(*words, "-o", "one")
    assert one.code == 0, one.err
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch, "-m", "unpoison", *words, "-o", "two"],
        cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), json.loads(one.out)  # the first process alone answers
    assert found["after"]["c_acc"]["n"] == expected["after"]["c_acc"]["n"] == 24
    assert found["batch_size"] == expected["batch_size"]
    assert names(tmp_path / "two") == FILES
    assert names(tmp_path / "two" / "steps") == set()
    two, weights = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(two, weights, atol=2e-5, rtol=1e-3)
