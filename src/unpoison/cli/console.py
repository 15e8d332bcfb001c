"""Answers on stdout, progress and log on stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

from unpoison.cli.options import Common

if TYPE_CHECKING:
    import rich.console
    import rich.progress

T = TypeVar("T")
_QUIET_SECONDS = 30.0  # between two log lines of one step when there is no terminal
_SHORT_SECONDS = 1.0  # steps shorter than this are not worth a log line


class Console:
    """Where a verb talks to the user. Implements ``runs.Progress``; use as a context manager.

    Inside the context ``sys.stdout`` is stderr, so that nothing a library prints can get into the answer, and no Ctrl-C
    is lost: Python drops a KeyboardInterrupt that comes up inside a finaliser; the next item of a step raises it again.
    """

    def __init__(self, options: Common) -> None:
        self.options = options
        self._stdout: TextIO = sys.stdout
        self._bars: rich.progress.Progress | None = None
        self._stack = contextlib.ExitStack()
        self._interrupted = False

    def __enter__(self) -> Self:
        self._stdout = sys.stdout
        self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGINT, self._on_interrupt)
            self._stack.callback(signal.signal, signal.SIGINT, before or signal.SIG_DFL)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close_bars()
        self._stack.close()

    def answer(self, data: Any, show: Callable[[rich.console.Console], None]) -> None:
        """Print the answer: ``data`` as JSON with ``--json``, else what ``show`` draws."""
        self._close_bars()
        if self.options.json:
            self._stdout.write(encode(data) + "\n")
        else:
            show(_rich(self._stdout))
        self._stdout.flush()

    def log(self, message: str) -> None:
        """One line on stderr, unless quiet."""
        if self.options.quiet:
            return
        text = printable(message)
        if self._bars is not None:
            self._bars.console.print(text, style="dim")
        else:
            print(text, file=sys.stderr)  # noqa: T201

    def detail(self, message: str) -> None:
        """One line on stderr when verbose."""
        if self.options.verbose:
            self.log(message)

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[T]:
        """Yield ``items`` while showing how far, how fast and how long still: a bar, or a line now and then."""
        if self.options.quiet:
            shown = iter(items)
        elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            shown = self._track_bar(items, total, what, weight, unit)
        else:
            shown = self._track_lines(items, total, what, weight, unit)
        for item in shown:
            if self._interrupted:
                raise KeyboardInterrupt
            yield item

    def _on_interrupt(self, signum: int, frame: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _track_bar(self, items: Iterable[T], total: int | None, what: str, weight: int, unit: str) -> Iterator[T]:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        bars = self._bars
        task = bars.add_task(what, total=total, unit=unit, rate="")
        began, done = time.monotonic(), 0
        for item in items:
            yield item
            done += weight
            bars.update(task, completed=done, rate=_rate(done, time.monotonic() - began, unit))
        bars.update(task, completed=done, total=done)

    def _track_lines(self, items: Iterable[T], total: int | None, what: str, weight: int, unit: str) -> Iterator[T]:
        began = said = time.monotonic()
        done = 0
        for item in items:
            yield item
            done += weight
            now = time.monotonic()
            if now - said > _QUIET_SECONDS:
                said = now
                share = "" if not total else f" of {total:,}"
                left = "" if not total else f", {_seconds((now - began) * max(total - done, 0) / done)} left"
                self.log(f"{what}: {done:,}{share} {unit}".rstrip() + f", {_rate(done, now - began, unit)}{left}")
        seconds = time.monotonic() - began
        if seconds > _SHORT_SECONDS or self.options.verbose:
            self.log(f"{what}: {done:,} {unit}".rstrip() + f" in {_seconds(seconds)}, {_rate(done, seconds, unit)}")

    def _close_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def printable(text: str) -> str:
    """Text as a terminal may show it: control and direction characters of strangers' names become escapes."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def encode(data: Any) -> str:
    """One JSON object as text; NaN becomes null, results carry their schema."""
    import msgspec

    if not isinstance(data, bytes):
        data = msgspec.json.encode(data, enc_hook=str)
    return msgspec.json.format(data, indent=2).decode()


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    return _seconds(seconds)


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _rate(done: int, seconds: float, unit: str) -> str:
    rate = done / max(seconds, 1e-9)
    return f"{rate:,.0f} {unit or 'steps'}/s" if rate >= 10 else f"{rate:.1f} {unit or 'steps'}/s"


def _rich(file: TextIO) -> rich.console.Console:
    import rich.console

    class AnswerConsole(rich.console.Console):
        def on_broken_pipe(self) -> None:
            """Left to ``main``: rich would exit with 1, which means findings here."""
            raise BrokenPipeError

    return AnswerConsole(file=file, markup=False, highlight=False, emoji=False)


def _bars() -> rich.progress.Progress:
    import rich.console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=rich.console.Console(stderr=True, markup=False, highlight=False, emoji=False),
    )
