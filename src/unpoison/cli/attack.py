"""``unpoison attack``: poison a copy of an image set, to test defenses with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from unpoison.cli.options import Planned, Reading, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.attacks.folder import Plan
    from unpoison.attacks.parts import Part
    from unpoison.cli.console import Console
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
    and_: Annotated[
        list[str] | None,
        Parameter(
            name="--and",
            negative="",
            show_default=False,
            help='A further poisoning on other samples, as "TRIGGER NAME=VALUE ...": rate, target, mode, parameters; '
            "may be repeated.",
        ),
    ] = None,
    select: Annotated[
        Literal["random", "boundary"],
        Parameter(help="Which samples: a draw, or those that --clip takes for the target most (adaptive)."),
    ] = "random",
    clip: Annotated[
        str, Parameter(help='The attacker\'s own CLIP, for --select boundary: "tiny" (bundled), a folder, an id.')
    ] = "tiny",
    manifest_only: Annotated[
        bool, Parameter(negative="", show_default=False, help="Write the manifest, not the images.")
    ] = False,
    reading: Reading = Reading(),
    options: Planned = Planned(),
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
        from unpoison.attacks.folder import parts_of, write_or_continue
        from unpoison.attacks.parts import plan_parts
        from unpoison.catalog import ATTACKS, find
        from unpoison.cli.running import open_source

        find(trigger, ATTACKS)
        images = open_source(source, reading, limit=options.limit, seed=options.seed)
        first = {"rate": rate, "target": target, "mode": mode} | read_params(param or [])
        parts = [read_part(trigger, first, images.class_names)]
        parts += [read_part(*read_further(text), images.class_names) for text in and_ or []]
        if select == "boundary":
            parts = select_near(parts, images, clip, console, options)
        planned = plan_parts(images, parts, seed=options.seed)
        poisoning = planned if and_ else parts_of(planned)[0]
        path = run_path(options.output, "attack", trigger, source)
        if options.dry_run:
            _dry_run(console, images, poisoning, path, manifest_only)
            return 0
        written = write_or_continue(images, poisoning, path, manifest_only=manifest_only)
        described = [
            {
                "trigger": part.trigger, "config": part.config, "mode": part.mode, "target": part.target,
                "target_name": part.target_name, "rate": part.rate, "poisoned": len(part.ids),
                "covers": len(part.covers), "seed": part.seed, "selection": part.selection,
            }
            for part in parts_of(written)
        ]  # fmt: skip
        body = {
            "manifest": str(path / "manifest.json"), "data": None if manifest_only else str(path / "data.parquet"),
            "samples": len(images), **(described[0] if not and_ else {"poisoned": len(written.ids)}),
        } | ({"parts": described} if and_ else {})  # fmt: skip
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


def read_further(text: str) -> tuple[str, dict[str, Any]]:
    """A trigger's name and its ``NAME=VALUE`` words. Raises UsageError."""
    import shlex

    from unpoison.errors import UsageError

    try:
        name, *words = shlex.split(text)
    except ValueError as error:
        raise UsageError(
            f"--and {text!r}: expected a trigger's name.", hint='For example --and "blended rate=0.02 target=bird".'
        ) from error
    return name, {"rate": 0.05, "target": "0"} | read_params(words)


def read_part(trigger: str, told: dict[str, Any], class_names: tuple[str, ...]) -> Part:
    """``told``: rate, target (number or name), mode and the trigger's parameters; pictures of blended by their files.

    Raises UsageError, and as reading a picture does.
    """
    from unpoison.attacks.badclip_patch import encoded
    from unpoison.attacks.parts import Part
    from unpoison.attacks.patterns import read_pattern
    from unpoison.catalog import ATTACKS, find
    from unpoison.errors import UsageError

    find(trigger, ATTACKS)
    rate, target = told.pop("rate"), told.pop("target")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise UsageError(f"{trigger}: rate {rate!r} is no number.", hint="Give a share of all samples, such as 0.02.")
    for key in ("pattern", "mask") if trigger == "blended" else ():
        if isinstance(told.get(key), str):
            told[key] = encoded(read_pattern(Path(told[key])))
    return Part(trigger=trigger, target=read_target(str(target), class_names), rate=float(rate), options=told)


def select_near(parts: list[Part], images: LabelledImages, clip: str, console: Console, options: Planned) -> list[Part]:
    """The parts, each with the samples that look most like its target to the CLIP. Raises as opening a CLIP does."""
    from dataclasses import replace

    from unpoison.attacks.boundary import near_the_boundary
    from unpoison.cli.running import run_without_folder
    from unpoison.models.clip_files import load_any_clip

    model, run = load_any_clip(clip), run_without_folder(console, options)
    chosen = [near_the_boundary(images, model, int(part.target), run=run) for part in parts]
    return [
        replace(part, options={**part.options, "selection": selection})
        for part, selection in zip(parts, chosen, strict=True)
    ]


def _dry_run(console: Any, images: LabelledImages, poisoning: Plan, path: Path, manifest_only: bool) -> None:
    from unpoison.cli.running import DryRun
    from unpoison.planning import plan_attack

    plan = plan_attack(images, len(poisoning.ids), manifest_only=manifest_only)
    dry = DryRun(plan=plan, folder=path)
    console.answer(dry.data(), dry.show)


def _show(out: rich.console.Console, poisoning: Plan, samples: int, path: Path, manifest_only: bool) -> None:
    import shlex

    from unpoison.attacks.folder import parts_of
    from unpoison.cli.console import printable

    for part in parts_of(poisoning):
        out.print(
            f"{len(part.ids):,} of {samples:,} samples poisoned with {part.trigger} ({part.mode}), "
            f"target {printable(part.target_name)!r}"
        )
        if part.selection != "random":
            out.print(f"chosen by {part.selection}, not drawn")
        if part.covers:
            out.print(f"{len(part.covers):,} of them keep their label (covers)")
    out.print(f"Manifest: {path / 'manifest.json'}", soft_wrap=True)
    if not manifest_only:
        data = path / "data.parquet"
        out.print(f"Data: {data}", soft_wrap=True)
        out.print(f"Next:\n  unpoison scan dataset {shlex.quote(str(data))}", soft_wrap=True)
