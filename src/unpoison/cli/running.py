"""What the long verbs share: the source as asked for, the run with its folder, and the plan of a dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unpoison import __version__
from unpoison.cli.console import Console, duration
from unpoison.cli.options import Reading, Running, cache_folder
from unpoison.errors import UsageError

if TYPE_CHECKING:
    import rich.console

    from unpoison.data.pairs import ImageTextPairs
    from unpoison.data.sources import LabelledImages
    from unpoison.planning import Plan
    from unpoison.runs import Run


def open_source(
    source: str, reading: Reading, *, limit: int | None = None, seed: int = 0, class_names: Sequence[str] | None = None
) -> LabelledImages:
    """The source with the user's reading options; ``class_names`` hold where the user names none."""
    from unpoison.data.sources import open_images

    names = read_class_names(reading.class_names) if reading.class_names is not None else class_names
    return open_images(
        source,
        image_column=reading.image_column,
        label_column=reading.label_column,
        class_names=names,
        split=reading.split,
        limit=limit,
        seed=seed,
        strict=reading.strict,
    )


def read_class_names(path: Path) -> list[str]:
    """One name a line; empty lines do not count. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({error}).", hint="Give a text file with one class name a line."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def begin(
    console: Console, options: Running, path: Path, inputs: Mapping[str, Any], *, precision: str | None = None
) -> Run:
    """The run in its folder: new, or the one of the same inputs that is to be continued."""
    from dataclasses import replace

    from unpoison.runs import RunFolder

    run = run_without_folder(console, options, precision=precision)
    with run.accelerator.main_process_first():  # one of several processes begins the folder
        folder = RunFolder.open(path, inputs)
    if folder.finished and run.accelerator.is_main_process:
        console.log(f"{path} holds the finished run of these inputs; this is its result")
    return replace(run, folder=folder)


def run_without_folder(console: Console, options: Running, *, precision: str | None = None) -> Run:
    """A run that stores nothing but what goes into the cache. Of several processes the first tells its progress.

    ``precision``: "no", "bf16" or "fp16" for training; None leaves it to accelerate's own settings.
    """
    from accelerate import Accelerator

    from unpoison.runs import Run, Silent

    accelerator = Accelerator(mixed_precision=precision)
    return Run(
        accelerator=accelerator,
        seed=options.seed,
        progress=console if accelerator.is_main_process else Silent(),
        cache=cache_folder(options.cache),
    )


def run_inputs(verb: str, source: LabelledImages, reading: Reading, options: Running, **more: Any) -> dict[str, Any]:
    """Everything that determines a run's result, as it is kept in run.json."""
    return {
        "unpoison": __version__,
        "verb": verb,
        "source": source.name,
        "content": describe(source),
        "reading": {name: str(value) for name, value in vars_of(reading).items() if value},
        "limit": options.limit,
        "seed": options.seed,
        **more,
    }


def describe(source: LabelledImages | ImageTextPairs) -> str:
    """How many samples, and a fingerprint that tells a changed source, also one in which only an image changed."""
    from unpoison.data.pairs import ImageTextPairs

    if isinstance(source, ImageTextPairs):
        return f"{len(source)} pairs, {source.fingerprint}"
    return f"{len(source)} samples, {source.fingerprint()}"


def vars_of(options: Any) -> dict[str, Any]:
    """A dataclass's fields as they are."""
    from dataclasses import fields

    return {entry.name: getattr(options, entry.name) for entry in fields(options)}


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """A plan as it is shown and printed as JSON."""

    plan: Plan
    folder: Path

    def show(self, out: rich.console.Console) -> None:
        from rich.table import Table

        out.print("Nothing is written in a dry run. The run would do:")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for step in self.plan.steps:
            table.add_row(f"  {step.what}", f"{step.amount:,} {step.unit}", f"about {duration(step.seconds)}")
        out.print(table)
        out.print(f"Time: about {duration(self.plan.seconds)} (from a few probed batches)")
        out.print(f"Memory: about {self.plan.memory / 2**20:,.0f} MiB; disk: about {self.plan.disk / 2**20:,.0f} MiB")
        out.print(f"Files in {self.folder}: {', '.join(self.plan.files)}")

    def data(self) -> dict[str, Any]:
        return {"dry_run": True, "folder": str(self.folder), **vars_of(self.plan)}


def repeated_command(verb: str, model: str, *given: dict[str, Any]) -> str:
    """The shell command that repeats ``purify VERB MODEL`` with the options that were given, in their order."""
    import shlex

    words = ["unpoison", "purify", verb, model]
    for name, value in (entry for options in given for entry in options.items()):
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
