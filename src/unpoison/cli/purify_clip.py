"""``unpoison purify par``, ``clean-clip`` and ``fine-tuning``: repair a CLIP with clean image-caption pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from unpoison.cli.clip_options import ClipRepairOptions, Sources, Tests, Training, open_tests
from unpoison.cli.options import METHOD, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.clip_results import ClipPurification
    from unpoison.data.pairs import ImageTextPairs
    from unpoison.runs import Run


def par(
    model: str,
    /,
    *,
    sources: Sources = Sources(),
    tau: Annotated[
        float | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="How far to push: squared distance in (0, 4]. [default: 0.5; with --paper 2.15]",
        ),
    ] = None,
    text_tower: Annotated[
        Literal["train", "frozen"] | None,
        Parameter(
            group=METHOD, show_default=False, help="Train the text tower too. [default: frozen; with --paper train]"
        ),
    ] = None,
    distill: Annotated[
        Literal["none", "relations"] | None,
        Parameter(group=METHOD, show_default=False, help="Keep its opinion of plain images. [default: relations]"),
    ] = None,
    paper: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="As in the paper: both towers, a long push, no adversary; the rate is scaled to the model.",
        ),
    ] = False,
    always: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="Repair a model in which no trigger is found as well, instead of handing it back as it came.",
        ),
    ] = False,
    asked: ClipRepairOptions = ClipRepairOptions(),
) -> int:
    """Repair a backdoored CLIP: perturb and recover. The given model stays untouched; the copy has the same format.

    A trigger is looked for first. Where none is found the copy is the model as it came, and the result says so.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    own = {"paper": paper, "always": always, "tau": tau, "text_tower": text_tower, "distill": distill}
    return run_purification("par", model, sources, own, asked)


def clean_clip(
    model: str,
    /,
    *,
    sources: Sources = Sources(),
    asked: ClipRepairOptions = ClipRepairOptions(),
) -> int:
    """Repair a backdoored CLIP with CleanCLIP, the baseline with self-supervision within each tower.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    return run_purification("clean-clip", model, sources, {}, asked)


def fine_tuning(
    model: str,
    /,
    *,
    sources: Sources = Sources(),
    asked: ClipRepairOptions = ClipRepairOptions(),
) -> int:
    """Fine-tune a CLIP on clean pairs, the plainest baseline.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    return run_purification("fine-tuning", model, sources, {}, asked)


def run_purification(
    verb: str,
    model: str,
    sources: Sources,
    own: dict[str, Any],
    asked: ClipRepairOptions,
    models: Mapping[str, str | None] | None = None,
) -> int:
    """``models``: further CLIPs of the method, by its own name for them."""
    from unpoison.cli import INCONCLUSIVE
    from unpoison.cli.console import Console

    training, testing, reading, options = asked.training, asked.testing, asked.reading, asked.running
    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison import __version__
        from unpoison.cli.running import DryRun, begin, describe, repeated_command, run_without_folder, vars_of
        from unpoison.clip_training import check_precision
        from unpoison.models.clip_files import load_any_clip

        tests = open_tests(testing)
        clip = load_any_clip(model)
        others = {role: None if name is None else load_any_clip(name) for role, name in (models or {}).items()}
        opened = sources.open(options, vars_of(reading))
        config = _config(verb, clip, len(opened), own, training)
        path = run_path(options.output, f"purify-{verb}", model)
        run = run_without_folder(console, options, precision=training.precision)
        check_precision(run)
        if options.dry_run:
            from unpoison.planning_clip import plan_clip_training

            plan = plan_clip_training(clip, opened, config, run=run, tested=tests.encoded, **others)
            dry = DryRun(plan=plan, folder=path)
            console.answer(dry.data(), dry.show)
            return 0
        inputs = {
            "unpoison": __version__,
            "verb": f"purify {verb}",
            "model": model,
            "model_fingerprint": clip.fingerprint,
            "pairs": opened.name,
            "content": describe(opened),
            "reading": {name: str(value) for name, value in vars_of(reading).items() if value},
            "config": vars_of(config),
            "precision": run.accelerator.mixed_precision,
            "limit": options.limit,
            "seed": options.seed,
            **(models or {}),
            **{f"{role}_fingerprint": other and other.fingerprint for role, other in others.items()},
            **tests.inputs,
        }
        run = begin(console, options, path, inputs, precision=training.precision)
        repeat = repeated_command(
            verb, model, vars_of(sources), _given(own, models), vars_of(training), vars_of(testing), vars_of(reading),
            {"seed": options.seed, "limit": options.limit, "output": path},
        )  # fmt: skip
        result = _run(verb, clip, opened, config, tests, run, path, model, repeat, sources, others)
        if run.accelerator.is_main_process:
            from unpoison.storage import to_json

            console.answer(to_json(result), lambda out: _show(out, result, path))
    return 0 if result.accepted else INCONCLUSIVE


def _config(verb: str, clip: Any, samples: int, own: dict[str, Any], training: Training) -> Any:
    """The scaled (or published) settings, then the file's keys, then the options."""
    from dataclasses import asdict

    from unpoison.api_clip import count_parameters
    from unpoison.catalog import DEFENSES, find, resolve
    from unpoison.configs import make_config, merge, read_config

    kind = resolve(find(verb, DEFENSES).config)
    given = read_config(training.config) if training.config is not None else {}
    options = {name: getattr(training, name) for name in ("steps", "batch_size", "learning_rate", "bound")}
    paper = own.get("paper", False)
    if own.get("always", False):
        options |= {"always": True} if hasattr(kind, "always") else {"search_concepts": 0}
    table = merge(given, {key: value for key, value in own.items() if key not in ("paper", "always")} | options)
    where = str(training.config or "options")
    checked = make_config(kind, table, where=where)  # names unknown keys before the rest is added
    if training.published:
        plain = asdict(kind.as_published()) if paper and hasattr(kind, "as_published") else {}
        return make_config(kind, merge(plain, table), where=where)
    lengths = {name: getattr(checked, name) for name in ("batch_size", "epochs") if name in table}
    make = kind.paper if paper else kind.recommended
    start = make(parameters=count_parameters(clip), samples=samples, **lengths)
    return make_config(kind, merge(asdict(start), table), where=where)


def _given(own: dict[str, Any], models: Mapping[str, str | None] | None) -> dict[str, Any]:
    """The method's options as they were given, and its further models."""
    return own | {role: name or "none" for role, name in (models or {}).items()}


def _run(
    verb: str,
    clip: Any,
    pairs: ImageTextPairs,
    config: Any,
    tests: Tests,
    run: Run,
    path: Path,
    model: str,
    repeat: str,
    sources: Sources,
    others: dict[str, Any],
) -> ClipPurification:
    from dataclasses import replace

    from unpoison.catalog import DEFENSES, find, resolve
    from unpoison.clip_results import ClipPurification
    from unpoison.models.clip_files import load_any_clip, save_clip
    from unpoison.outputs import save_scan
    from unpoison.outputs_clip import model_folder, save_clip_purification
    from unpoison.report.runs import SUSPICIOUS
    from unpoison.storage import remove_partials, write_atomically

    main, folder = run.accelerator.is_main_process, run.folder
    if folder is not None and not folder.finished:
        before = tests.evaluate(clip, run, name=model) if main else None
        outcome = resolve(find(verb, DEFENSES).function)(clip, pairs, config=config, run=run, **others)
        if main:
            result = replace(outcome.purification, command=repeat, synthetic_pairs=sources.made_up(pairs))
            if tests.images is not None:  # of the files: weights in the types that they are stored in
                saved = path / model_folder(result)
                save_clip(outcome.clip, saved)
                after = tests.evaluate(load_any_clip(saved), run, name=str(saved), suspect=clip)
                result = replace(result, before=before, after=after)
            suspicious = getattr(outcome, "suspicious", None)
            if suspicious is not None:
                (path / SUSPICIOUS).mkdir(exist_ok=True)
                write_atomically(path / SUSPICIOUS / "run.json", _as_scan(path / "run.json"))
                save_scan(suspicious.scan, suspicious.scores, suspicious.split, suspicious.samples, path / SUSPICIOUS)
            save_clip_purification(result, outcome.clip, path, base_model=model)
            remove_partials(path, path / "steps", path / model_folder(result))
            folder.finish()
        run.accelerator.wait_for_everyone()
    if folder is not None:
        run.forget(file.stem for file in sorted((folder.path / "steps").glob("*.safetensors")))
    return ClipPurification.load(path / "purification.json")


def _as_scan(file: Path) -> bytes:
    """Of this repair's run.json, what `unpoison keep` asks of that of a scan."""
    import msgspec

    inputs = msgspec.json.decode(file.read_bytes())
    kept = {key: inputs[key] for key in ("unpoison", "content", "reading", "limit", "seed")}
    return msgspec.json.encode({"verb": "scan dataset", "pairs": True, "source": inputs["pairs"], **kept})


def _show(out: rich.console.Console, result: ClipPurification, path: Path) -> None:
    from unpoison.cli.console import printable

    verdict = "Accepted." if result.accepted else "Not accepted."
    if result.left_alone and result.accepted:
        verdict = "Nothing suspicious was found."
    out.print("Undecided." if result.undecided else verdict, style="bold")
    out.print(printable(result.reason))
    if result.search is not None and result.search.suspected:
        out.print(printable(f"Before the repair: {result.search.reason}"))
    if not result.left_alone:
        _show_training(out, result)
    if result.exposure is not None and result.exposure.words:
        words = ", ".join(f"{entry.word} ({entry.captions})" for entry in result.exposure.words[:5])
        out.print(printable(f"Words that the unlearnt captions share: {words}."))
    _show_rest(out, result, path)


def _show_training(out: rich.console.Console, result: ClipPurification) -> None:
    out.print(
        f"{result.steps:,} of {result.planned_steps:,} training steps on {result.trained_pairs:,} pairs; mean cosine "
        f"with the given model's embeddings: images {result.image_cosine:.2f}, texts {result.text_cosine:.2f}."
    )


def _show_rest(out: rich.console.Console, result: ClipPurification, path: Path) -> None:
    from unpoison.cli.tables import show_judgement
    from unpoison.outputs_clip import model_folder

    show_judgement(out, result, "model")
    out.print(f"Model: {path / model_folder(result)}")
    if result.exposure is not None:
        from unpoison.report.runs import SUSPICIOUS

        out.print(f"Ranked pairs: {path / SUSPICIOUS}, for `unpoison keep` as well")
    out.print(f"Report: {path / 'report.html'}")
