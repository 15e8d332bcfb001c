"""Options that every verb shares, and where things go when the user does not say."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, Token

from unpoison.errors import UsageError

OPENING = Group("Opening the model", sort_key=60)
READING = Group("Reading", sort_key=70)
METHOD = Group("Method", sort_key=10)
TEST = Group("Test", sort_key=20)
OUTPUT = Group("Output", sort_key=90)
RUNNING = Group("Running", sort_key=80)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Common:
    """What to print."""

    json: Annotated[
        bool,
        Parameter(
            name="--json", negative="", show_default=False, group=OUTPUT, help="Print one JSON object and nothing else."
        ),
    ] = False
    quiet: Annotated[
        bool,
        Parameter(
            name=["--quiet", "-q"],
            negative="",
            show_default=False,
            group=OUTPUT,
            help="No progress and no log on stderr.",
        ),
    ] = False
    verbose: Annotated[
        bool,
        Parameter(
            name=["--verbose", "-v"],
            negative="",
            show_default=False,
            group=OUTPUT,
            help="More log, and full tracebacks.",
        ),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Running(Common):
    """How to run something long."""

    seed: Annotated[int, Parameter(group=RUNNING, help="Seed of every random choice.")] = 0
    limit: Annotated[
        int | None, Parameter(group=RUNNING, help="Use a random subset of N samples.", show_default=False)
    ] = None
    cache: Annotated[
        Path | None,
        Parameter(
            group=RUNNING,
            help="Folder for decoded images and CLIP logits. [default: $UNPOISON_CACHE or ~/.cache/unpoison]",
            show_default=False,
        ),
    ] = None


def _folder(kind: Any, tokens: Sequence[Token]) -> Path:
    """A run folder as given. Raises UsageError for an address, which pathlib would take for a folder here."""
    (token,) = tokens
    if "://" in token.value:
        raise UsageError(
            f"-o {token.value} is an address, a run folder is on a file system.",
            hint="Give a folder, mounted there or copied afterwards; only `unpoison bench run` takes an address.",
        )
    return Path(token.value)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Planned(Running):
    """Running in a folder, for verbs that can tell beforehand what they would do."""

    output: Annotated[
        Path | None,
        Parameter(
            name=["--output", "-o"],
            converter=_folder,
            group=RUNNING,
            help="Run folder. The same command continues an interrupted run in it. [default: runs/VERB-NAME]",
            show_default=False,
        ),
    ] = None
    dry_run: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=RUNNING,
            help="Show steps, memory, time and files of the run; write nothing.",
        ),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read a SOURCE."""

    image_column: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Column that holds the images.")
    ] = None
    label_column: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Column that holds the labels.")
    ] = None
    class_names: Annotated[
        Path | None, Parameter(group=READING, show_default=False, help="Text file with one class name a line.")
    ] = None
    split: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Split of a source that has several.")
    ] = None
    strict: Annotated[
        bool,
        Parameter(negative="", group=READING, show_default=False, help="Stop at the first row that cannot be used."),
    ] = False


Channels = tuple[float, float, float]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Opening:
    """How to open a MODEL that does not say it itself."""

    arch: Annotated[
        str | None,
        Parameter(
            group=OPENING,
            show_default=False,
            help="Network of a weights file: small-resnet, preact-resnet-18, wrn-16-1, package.module:callable.",
        ),
    ] = None
    image_size: Annotated[int, Parameter(group=OPENING, help="Input of a weights file's network, in pixels.")] = 32
    mean: Annotated[
        Channels | None,
        Parameter(
            negative="",
            group=OPENING,
            show_default=False,
            help="Normalization of images in [0, 1]: mean of R, G and B.",
        ),
    ] = None
    std: Annotated[
        Channels | None,
        Parameter(negative="", group=OPENING, show_default=False, help="Its standard deviation of R, G and B."),
    ] = None


def cache_folder(given: Path | None) -> Path:
    """Where decoded pixels and CLIP logits are kept between runs."""
    if given is not None:
        return given
    if os.environ.get("UNPOISON_CACHE"):
        return Path(os.environ["UNPOISON_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "unpoison"


def run_path(given: Path | None, verb: str, *sources: str | Path) -> Path:
    """The run folder: as given, or ``runs/VERB-SOURCE`` in the current folder."""
    return given if given is not None else Path("runs", "-".join([verb, *(stem(source) for source in sources)]))


def stem(source: str | Path) -> str:
    """A short name for a source or model: ``a/b.parquet[0:10]`` is ``b-0-10``, ``shapes:300`` is ``shapes-300``."""
    last = str(source).rstrip("/").rsplit("/", 1)[-1]
    last = re.sub(r"\.(parquet|csv|jsonl|tar|safetensors|pth|pt|th|bin)(?=$|\[)", "", last)
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.") or "here"
