"""Progress, log lines and JSON."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unpoison.cli import console as module
from unpoison.cli.console import Console, encode, printable
from unpoison.cli.options import Common, cache_folder, run_path, stem


@pytest.mark.parametrize(
    ("text", "shown"),
    [("café 猫", "café 猫"), ("a\x1b[2Jb", "a\\x1b[2Jb"), ("\u202etxt", "\\u202etxt"), ("two\nlines", "two\nlines")],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_json_has_no_nan() -> None:
    assert json.loads(encode({"value": float("nan"), "path": Path("a/b")})) == {"value": None, "path": "a/b"}


def test_lines_instead_of_bars_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(np.arange(0, 1000, 7.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with Console(Common()) as console:
        assert list(console.track(range(10), total=100, what="decoding", weight=10, unit="images")) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "decoding: 50 of 100 images, 1.4 images/s, 35 s left"
    assert lines[-1] == "decoding: 100 images in 77 s, 1.3 images/s"
    assert len(lines) == 3


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(Common(quiet=True, verbose=True)) as console:
        console.log("hello")
        assert list(console.track([1, 2], total=2, what="x")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_what_libraries_print_stays_out_of_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(Common(json=True)) as console:
        sys.stdout.write("a library says hello\n")
        console.answer({"x": 1}, lambda out: None)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"x": 1}
    assert "hello" in printed.err


@pytest.mark.parametrize("no_color", [False, True])
def test_colors_only_on_terminals_that_want_them(no_color: bool, tmp_path: Path) -> None:
    code = (
        "from unpoison.cli.console import Console; from unpoison.cli.options import Common\n"
        "with Console(Common()) as c: c.answer({}, lambda out: out.print('x', style='red'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment) as running:
        running.wait(timeout=120)
        os.close(follower)
        shown = os.read(leader, 1000)
    os.close(leader)
    assert b"x" in shown
    assert (b"\x1b[31m" in shown) is not no_color


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "unpoison", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.wait(timeout=120) == 141
    assert running.stderr.read() == ""
    running.stderr.close()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("shapes:300", "shapes-300"),
        ("a/b.parquet[0:10]", "b-0-10"),
        ("data/pets/", "pets"),
        ("me/set", "set"),
        ("..", "here"),
        ("m.pth", "m"),
    ],
)
def test_stem(source: str, name: str) -> None:
    assert stem(source) == name


def test_default_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_path(None, "scan", "a/pets") == Path("runs/scan-pets")
    assert run_path(Path("x"), "scan", "a/pets") == Path("x")
    monkeypatch.setenv("UNPOISON_CACHE", "/c")
    assert cache_folder(None) == Path("/c")
    assert cache_folder(Path("d")) == Path("d")
    monkeypatch.delenv("UNPOISON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder(None) == Path("/xdg/unpoison")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("quiet", [True, False])
def test_ctrl_c_inside_a_finaliser_is_not_lost(quiet: bool) -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            sum(range(1000))

    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Console(Common(quiet=quiet)) as console:
            for item in console.track(range(5), total=5, what="work"):
                seen.append(item)
                Finalised()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [0]
    assert signal.getsignal(signal.SIGINT) is before
