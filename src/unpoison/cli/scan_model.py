"""``unpoison scan model``: is this checkpoint backdoored?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from unpoison.cli.options import READING, Opening, Planned, Reading, run_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    import rich.console

    from unpoison.model_results import ModelScan

METHOD = Group("Method", sort_key=10)
_IMAGE_SIZE = 32


def model(
    model: str,
    /,
    *,
    data: Annotated[
        str | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="SOURCE of images like those that the model is for. [default: made-up pictures]",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Text file with a CLIP's class names, one a line. [default: those of --data, else none: DECREE]",
        ),
    ] = None,
    clean_reference: Annotated[
        list[str] | None,
        Parameter(
            group=METHOD,
            negative="",
            show_default=False,
            help="A model of the same kind that is known to be clean; may be repeated.",
        ),
    ] = None,
    trained_on: Annotated[
        str | None,
        Parameter(group=METHOD, show_default=False, help="SOURCE that the model was trained on, for a data verdict."),
    ] = None,
    pairs: Annotated[
        bool,
        Parameter(group=METHOD, negative="", show_default=False, help="--trained-on holds image-caption pairs."),
    ] = False,
    data_method: Annotated[
        str | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="How --trained-on is scanned, as by `scan dataset --method`. [default: cgd, for pairs dao]",
        ),
    ] = None,
    clip: Annotated[
        str,
        Parameter(
            group=METHOD,
            help='For --trained-on: a CLIP that judges its labels, "tiny" (bundled), a folder, an id; for pairs the '
            "reference that never saw them.",
        ),
    ] = "tiny",
    power: Annotated[
        bool,
        Parameter(
            group=METHOD,
            negative="",
            show_default=False,
            help="Plant backdoors in copies of the model and tell which of them the scan finds.",
        ),
    ] = False,
    budget: Annotated[
        str | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Stop in this time, as 90s, 10m or 1h, and say what was reached. [default: no limit]",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        Parameter(group=METHOD, show_default=False, help="TOML file with any keys of the tables weights and canaries."),
    ] = None,
    exit_zero: Annotated[
        bool, Parameter(negative="", show_default=False, help="Exit with 0 whatever is found.")
    ] = False,
    caption_column: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Column that holds the captions of pairs.")
    ] = None,
    opening: Opening = Opening(),
    reading: Reading = Reading(),
    options: Planned = Planned(),
) -> int:
    """Find out whether a checkpoint is backdoored: its files, its training data, its weights, one verdict each.

    Exit codes: 0 no evidence, 1 findings, 2 error, 3 inconclusive or of no recognized format.

    Parameters
    ----------
    model
        A folder or id of transformers or open_clip, open_clip:NAME/TAG, a weights file (with --arch for a classifier).
    """
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from dataclasses import asdict

        from unpoison import __version__
        from unpoison.api_models import ModelScanConfig, files_of, scan_model
        from unpoison.cli.running import (
            DryRun,
            begin,
            describe,
            open_source,
            read_class_names,
            run_without_folder,
            vars_of,
        )
        from unpoison.configs import make_config, read_config
        from unpoison.data.pairs import open_pairs
        from unpoison.detection.model_files import hash_files
        from unpoison.model_results import ModelScan
        from unpoison.models import any_model
        from unpoison.models.clip_files import load_any_clip
        from unpoison.outputs_models import save_model_scan
        from unpoison.planning_models import plan_model_scan
        from unpoison.report.runs import MODEL_SCAN
        from unpoison.results import to_json

        table = read_config(config) if config is not None else {}
        settings = make_config(ModelScanConfig, table, where=str(config or "options"))
        seconds = None if budget is None else parse_duration(budget)
        names = None if classes is None else read_class_names(classes)
        images = None
        if data is not None:
            images = open_source(data, reading, limit=options.limit, seed=options.seed)
        learnt, content = None, None
        if trained_on is not None and pairs:
            learnt = open_pairs(
                trained_on, image_column=reading.image_column, caption_column=caption_column, split=reading.split,
                seed=options.seed, strict=reading.strict,
            )  # fmt: skip
            content = describe(learnt)
        elif trained_on is not None:
            learnt = open_source(trained_on, reading, seed=options.seed)
            content = describe(learnt)
        opened = any_model.Opening(**vars_of(opening))
        path = run_path(options.output, "scan", model)
        judge = None if learnt is None else load_any_clip(clip)
        if options.dry_run:
            plan = plan_model_scan(
                model, images=images, class_names=names, references=len(clean_reference or ()), trained_on=learnt,
                data_method=data_method, clip=judge, opening=opened, power=power, config=settings,
                run=run_without_folder(console, options),
            )  # fmt: skip
            dry = DryRun(plan=plan, folder=path)
            console.answer(dry.data(), dry.show)
            return 0
        words = words_of(
            model, data=data, classes=classes, clean_reference=clean_reference, trained_on=trained_on, pairs=pairs,
            data_method=data_method, clip=None if clip == "tiny" else clip, config=config,
            caption_column=caption_column, **vars_of(opening), **vars_of(reading), limit=options.limit,
            seed=options.seed or None,
        )  # fmt: skip
        inputs = {
            "unpoison": __version__, "verb": "scan model", "model": model, "files": hash_files(files_of(model)),
            "data": None if images is None else describe(images),
            "trained_on": content, "data_method": data_method,
            "clip": None if judge is None else clip,
            "clip_fingerprint": None if judge is None else judge.fingerprint,
            "classes": names, "clean_reference": {name: hash_files(files_of(name)) for name in clean_reference or ()},
            "opening": vars_of(opening), "power": power, "budget": seconds, "limit": options.limit,
            "seed": options.seed, "config": asdict(settings), "command": words,
        }  # fmt: skip
        run = begin(console, options, path, inputs)
        if run.folder is not None and not run.folder.finished:
            outcome = scan_model(
                model, images=images, class_names=names, references=clean_reference or (), trained_on=learnt,
                data_method=data_method, clip=judge, opening=opened, power=power, budget=seconds, config=settings,
                run=run,
            )  # fmt: skip
            save_model_scan(outcome, path)
            run.folder.finish()
        scan = ModelScan.load(path / MODEL_SCAN)
        console.answer(to_json(scan), lambda out: _show(out, scan, path, inputs))
    return 0 if exit_zero else scan.exit_code


def words_of(model: str, **options: Any) -> list[str]:
    """The command again, but for its budget and its folder: what was given under the names that it was given by."""
    words = ["unpoison", "scan", "model", model]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False or (name == "image_size" and value == _IMAGE_SIZE):
            continue
        if value is True:
            words.append(flag)
        elif name in ("mean", "std"):
            words += [flag, *map(str, value)]
        else:
            for entry in value if isinstance(value, list) else [value]:
                words += [flag, str(entry)]
    return words


def parse_duration(text: str) -> float:
    """ "90", "90s", "10m" or "1h" in seconds. Raises UsageError."""
    from unpoison.errors import UsageError

    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--budget {text}: expected a time such as 90s, 10m or 1h.", hint="Write --budget 10m.")
    return seconds


def _show(out: rich.console.Console, scan: ModelScan, path: Path, inputs: Mapping[str, Any]) -> None:
    from unpoison.cli.console import printable
    from unpoison.cli.tables import class_triggers_table, plain_table
    from unpoison.detection.measured import say_measured
    from unpoison.report.model_views import next_steps

    out.print(f"File: {scan.file.word}", style="bold")
    out.print(printable(scan.file.reason))
    for finding in scan.file.findings:
        out.print(printable(f"  {finding.file} ({finding.kind}): {finding.reason} {finding.hint}".rstrip()))
    for known in scan.file.recognized:
        out.print(printable(f"  recognized: {known}"))
    out.print()
    out.print(f"Data: {scan.data.word}", style="bold")
    out.print(printable(scan.data.reason))
    out.print()
    out.print(f"Weights: {scan.weights.word}", style="bold")
    out.print(printable(scan.weights.reason))
    weights = scan.weights
    if weights.index is not None:
        index = weights.index
        out.print(f"Anomaly index: {index.value:.1f} (95 % interval {index.low:.1f} to {index.high:.1f})")
    if weights.suspicious_from is not None and weights.backdoored_from is not None:
        out.print(
            f"Score {weights.score:.1f}: suspicious from {weights.suspicious_from:.1f}, backdoored from "
            f"{weights.backdoored_from:.1f} where the interval lies above {weights.suspicious_from:.1f}"
        )
    if weights.asr is not None:
        asr, floor = weights.asr, weights.asr_floor
        without = "was not measured (no labels)" if floor is None else f"{floor.value:.1f} %"
        out.print(
            f"The inverted trigger's success on unseen images: {asr.value:.1f} % ({asr.low:.1f} to {asr.high:.1f}, "
            f"n = {asr.n}); without it {without}"
        )
    if weights.method:
        out.print(printable(say_measured(weights.measured)))
    if weights.classes:
        out.print()
        out.print(class_triggers_table(weights.classes))
    if scan.power is not None:
        out.print()
        out.print(printable(f"Power: {scan.power.reason}"))
        table = plain_table(
            "planted", "rate", "target", "success", "floor", "verdict", right=("rate", "success", "floor")
        )
        for canary in scan.power.canaries:
            word = canary.word if canary.learnt else "not learnt"
            row = (canary.trigger, f"{100 * canary.rate:g} %", printable(canary.target), f"{canary.asr:.0f} %",
                   f"{canary.floor:.0f} %", word)  # fmt: skip
            table.add_row(*row)
        out.print(table)
    for warning in scan.warnings:
        out.print(printable(f"Warning: {warning}"), style="yellow")
    out.print()
    if scan.not_covered:
        out.print("Not covered: " + printable(" ".join(scan.not_covered)))
        out.print()
    for step in next_steps(scan, str(path), inputs):
        out.print(printable(f"Next: {step.text}"))
        if step.line:
            out.print(printable(f"  {step.line}"), soft_wrap=True)
    out.print(f"Report: {path / 'report.html'}")
