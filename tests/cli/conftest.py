"""Running the command line: as a process of its own, or here, where imports are already paid for."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from unpoison.cli import main
from unpoison.results import CLEAN, MIXED, SUSPECT, DatasetScan, PoisonEstimate, Split

KILLED = """
import functools, importlib, os, signal, sys

module, _, name = sys.argv[1].partition(":")
*owners, last = name.split(".")
owner = functools.reduce(getattr, owners, importlib.import_module(module))
called, calls = getattr(owner, last), iter(range(int(sys.argv[2]) - 1))

def call(*values, **named):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return called(*values, **named)

setattr(owner, last, call)
from unpoison.cli import main
sys.exit(main(sys.argv[3:]))
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def environment(folder: Path) -> dict[str, str]:
    """The tests' environment, with caches in ``folder`` and one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return kept | {
        "UNPOISON_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "unpoison", *words]


def finish(words: tuple[str, ...], folder: Path) -> Result:
    """Run ``unpoison WORDS`` in ``folder`` to its end."""
    done = subprocess.run(
        command(*words), cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=250, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Result]:
    """Run ``unpoison WORDS`` as a process in ``tmp_path``."""

    def run(*words: str) -> Result:
        return finish(words, tmp_path)

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``unpoison WORDS`` in this process, in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("UNPOISON_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> Result:
        code = main(words)
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    return run


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``unpoison WORDS`` as a process in ``tmp_path`` and do not wait for it."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str) -> subprocess.Popen[str]:
        running = subprocess.Popen(
            command(*words),
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(running)
        return running

    yield run
    for running in started:
        running.kill()
        running.communicate()


@pytest.fixture
def kill_once(begin: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> Callable[..., None]:
    """Start ``unpoison WORDS`` and kill it as soon as ``file``, a path in ``tmp_path``, is there."""

    def run(file: str, *words: str) -> None:
        running, limit = begin(*words), time.monotonic() + 200
        while not (tmp_path / file).exists():
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < limit
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.wait()

    return run


@pytest.fixture
def kill_at(tmp_path: Path) -> Callable[..., None]:
    """Run ``unpoison WORDS`` as a process that is killed as it calls ``place``, "module:name", for the given time."""

    def run(place: str, time: int, *words: str) -> None:
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, place, str(time), *words], cwd=tmp_path, env=environment(tmp_path),
            capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr

    return run


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run ``unpoison WORDS``, uninterrupted, in a folder of its own and return that folder: once for the same words."""

    @cache
    def run(*words: str) -> Path:
        folder = tmp_path_factory.mktemp("elsewhere")
        done = finish(words, folder)
        assert done.code in (0, 1, 3), done.err
        return folder

    return run


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted scan of shapes:300."""
    folder = tmp_path_factory.mktemp("scanned")
    done = finish(("scan", "dataset", "shapes:300", "--scorer-epochs", "1", "-o", "scan", "-q"), folder)
    assert done.code in (0, 1, 3), done.err
    return folder / "scan"


@pytest.fixture
def poisoned_scan(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scan with other findings: 30 suspects, 10 mixed, target star."""
    folder = tmp_path_factory.mktemp("found") / "scan"
    shutil.copytree(scanned, folder)
    split = Split.load(folder / "split.parquet")
    estimate = PoisonEstimate(
        poisoned=True, rate=0.1, rate_low=0.08, rate_high=0.12, target_labels=(9,), evidence={}, reason="Planted here."
    )
    region = np.full(len(split.ids), CLEAN, dtype=np.int8)
    region[:30], region[30:40] = SUSPECT, MIXED
    replace(split, region=region, estimate=estimate).save(folder / "split.parquet")
    scan = DatasetScan.load(folder / "scan.json")
    replace(scan, estimate=estimate, flagged=30).save(folder / "scan.json")
    return folder
