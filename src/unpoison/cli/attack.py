"""``unpoison attack``: poison a copy of an image set, to test defenses with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from unpoison.cli.options import Planned, Reading, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.attacks.poison import Poisoning
    from unpoison.data.sources import LabelledImages


def attack(
    trigger: str,
    source: str,
    /,
    *,
    rate: Annotated[float, Parameter(help="Share of all samples to poison, in (0, 1].")] = 0.05,
    target: Annotated[str, Parameter(help="Target label: its number or its name.")] = "0",
    mode: Annotated[
        str | None,
        Parameter(
            show_default=False, help="all-to-one, all-to-all, clean-label or clean-image. [default: the trigger's own]"
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        Parameter(negative="", show_default=False, help="Parameter of the trigger as NAME=VALUE; may be repeated."),
    ] = None,
    manifest_only: Annotated[
        bool, Parameter(negative="", show_default=False, help="Write the manifest, not the images.")
    ] = False,
    reading: Reading = Reading(),  # noqa: B008
    options: Planned = Planned(),  # noqa: B008
) -> int:
    """Poison a copy of an image set: data.parquet, and manifest.json with the ground truth.

    Parameters
    ----------
    trigger
        badnet, blended, bpp, ...: `unpoison methods` lists them.
    source
        What to poison, as for `scan dataset`. It stays untouched.
    """
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.attacks.folder import write_or_continue
        from unpoison.attacks.poison import plan_poisoning
        from unpoison.catalog import ATTACKS, find
        from unpoison.cli.running import open_source

        find(trigger, ATTACKS)
        images = open_source(source, reading, limit=options.limit, seed=options.seed)
        poisoning = plan_poisoning(
            images, trigger, rate=rate, target=read_target(target, images.class_names), seed=options.seed, mode=mode,
            **read_params(param or []),
        )  # fmt: skip
        path = run_path(options.output, "attack", trigger, source)
        if options.dry_run:
            _dry_run(console, images, poisoning, path, manifest_only)
            return 0
        written = write_or_continue(images, poisoning, path, manifest_only=manifest_only)
        body = {
            "manifest": str(path / "manifest.json"), "data": None if manifest_only else str(path / "data.parquet"),
            "trigger": poisoning.trigger, "config": poisoning.config, "mode": poisoning.mode,
            "target": poisoning.target, "target_name": poisoning.target_name, "rate": poisoning.rate,
            "poisoned": len(written.ids), "covers": len(written.covers), "samples": len(images), "seed": poisoning.seed,
        }  # fmt: skip
        console.answer(body, lambda out: _show(out, written, len(images), path, manifest_only))
    return 0


def read_target(text: str, class_names: tuple[str, ...]) -> int:
    """A class by name, else by number. Raises UsageError."""
    from unpoison.errors import UnknownMethodError

    if text in class_names:
        return class_names.index(text)
    if text.isascii() and text.isdigit():
        return int(text)
    raise UnknownMethodError(text, class_names, kind="class")


def read_params(pairs: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, values as TOML where they are TOML, else as text. Raises UsageError."""
    import tomllib

    from unpoison.errors import UsageError

    params: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--param {pair!r}: expected NAME=VALUE.", hint="For example --param alpha=0.1.")
        try:
            params[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            params[name.strip()] = value
    return params


def _dry_run(console: Any, images: LabelledImages, poisoning: Poisoning, path: Path, manifest_only: bool) -> None:
    from unpoison.cli.running import DryRun
    from unpoison.planning import plan_attack

    plan = plan_attack(images, len(poisoning.ids), manifest_only=manifest_only)
    dry = DryRun(plan=plan, folder=path)
    console.answer(dry.data(), dry.show)


def _show(out: rich.console.Console, poisoning: Poisoning, samples: int, path: Path, manifest_only: bool) -> None:
    import shlex

    from unpoison.cli.console import printable

    out.print(
        f"{len(poisoning.ids):,} of {samples:,} samples poisoned with {poisoning.trigger} ({poisoning.mode}), "
        f"target {printable(poisoning.target_name)!r}"
    )
    if poisoning.covers:
        out.print(f"{len(poisoning.covers):,} of them keep their label (covers)")
    out.print(f"Manifest: {path / 'manifest.json'}", soft_wrap=True)
    if not manifest_only:
        data = path / "data.parquet"
        out.print(f"Data: {data}", soft_wrap=True)
        out.print(f"Next:\n  unpoison scan dataset {shlex.quote(str(data))}", soft_wrap=True)
