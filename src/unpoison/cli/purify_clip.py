"""``unpoison purify par``, ``clean-clip`` and ``fine-tune``: repair a CLIP with clean image-caption pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from unpoison.cli.options import READING, Planned, Reading, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.clip_results import ClipPurification
    from unpoison.runs import Run

METHOD = Group("Method", sort_key=10)
TEST = Group("Test", sort_key=20)
METHODS = {
    "par": ("unpoison.defenses.par:PARConfig", "purify_with_par"),
    "clean-clip": ("unpoison.defenses.baselines.clean_clip:CleanClipConfig", "purify_with_clean_clip"),
    "fine-tune": ("unpoison.defenses.baselines.fine_tuning:FineTuningConfig", "purify_with_fine_tuning"),
}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train, whichever the method."""

    steps: Annotated[
        int | None,
        Parameter(group=METHOD, show_default=False, help="Optimizer steps. [default: by the number of pairs]"),
    ] = None
    batch_size: Annotated[
        int | None,
        Parameter(group=METHOD, show_default=False, help="Pairs a step, over all processes. [default: as above]"),
    ] = None
    learning_rate: Annotated[
        float | None,
        Parameter(group=METHOD, show_default=False, help="Highest learning rate. [default: by the model's size]"),
    ] = None
    bound: Annotated[
        float | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Largest fall of held-out accuracy, in points, that is accepted. [default: 10]",
        ),
    ] = None
    published: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="The paper's learning rate, batch and epochs, whatever the model's size and the number of pairs.",
        ),
    ] = False
    precision: Annotated[
        Literal["no", "bf16", "fp16"] | None,
        Parameter(group=METHOD, show_default=False, help="Mixed precision. [default: as accelerate is configured]"),
    ] = None
    config: Annotated[
        Path | None, Parameter(group=METHOD, show_default=False, help="TOML file with any keys of the method's config.")
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PairReading:
    """How to read the pairs."""

    image_column: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Column that holds the images.")
    ] = None
    caption_column: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Column that holds the captions.")
    ] = None
    split: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Split of a source that has several.")
    ] = None
    strict: Annotated[
        bool,
        Parameter(negative="", group=READING, show_default=False, help="Stop at the first row that cannot be used."),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Testing:
    """What to measure before and after."""

    test: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE", group=TEST, show_default=False, help="Clean test images: measure before and after."
        ),
    ] = None
    manifest: Annotated[
        Path | None, Parameter(group=TEST, show_default=False, help="Poison manifest: measure attack success with it.")
    ] = None


Pairs = Annotated[
    str, Parameter(metavar="SOURCE", help="Clean image-caption pairs: parquet, CSV, JSONL, shards or a folder.")
]


def par(
    model: str,
    /,
    *,
    pairs: Pairs,
    tau: Annotated[
        float | None,
        Parameter(
            group=METHOD, show_default=False, help="How far to push: squared distance in (0, 4]. [default: 2.15]"
        ),
    ] = None,
    text_tower: Annotated[
        Literal["train", "frozen"] | None,
        Parameter(group=METHOD, show_default=False, help="Train the text tower, or the image tower alone."),
    ] = None,
    distill: Annotated[
        Literal["none", "relations"] | None,
        Parameter(group=METHOD, show_default=False, help="Keep the model's opinion of plain images over captions."),
    ] = None,
    training: Training = Training(),
    testing: Testing = Testing(),
    reading: PairReading = PairReading(),
    options: Planned = Planned(),  # noqa: B008
) -> int:
    """Repair a backdoored CLIP: perturb and recover. The given model stays untouched; the copy has the same format.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a checkpoint file or an id.
    """
    own = {"tau": tau, "text_tower": text_tower, "distill": distill}
    return _purify("par", model, pairs, own, training, testing, reading, options)


def clean_clip(
    model: str,
    /,
    *,
    pairs: Pairs,
    training: Training = Training(),
    testing: Testing = Testing(),
    reading: PairReading = PairReading(),
    options: Planned = Planned(),  # noqa: B008
) -> int:
    """Repair a backdoored CLIP with CleanCLIP, the baseline with self-supervision within each tower.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a checkpoint file or an id.
    """
    return _purify("clean-clip", model, pairs, {}, training, testing, reading, options)


def fine_tune(
    model: str,
    /,
    *,
    pairs: Pairs,
    training: Training = Training(),
    testing: Testing = Testing(),
    reading: PairReading = PairReading(),
    options: Planned = Planned(),  # noqa: B008
) -> int:
    """Fine-tune a CLIP on clean pairs, the plainest baseline.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a checkpoint file or an id.
    """
    return _purify("fine-tune", model, pairs, {}, training, testing, reading, options)


def _purify(
    verb: str,
    model: str,
    pairs: str,
    own: dict[str, Any],
    training: Training,
    testing: Testing,
    reading: PairReading,
    options: Planned,
) -> int:
    from unpoison.cli import INCONCLUSIVE
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison import __version__
        from unpoison.cli.running import DryRun, begin, open_source, run_without_folder, vars_of
        from unpoison.data.pairs import open_pairs
        from unpoison.errors import UsageError
        from unpoison.models.clip_transformers import load_clip

        if testing.manifest is not None and testing.test is None:
            raise UsageError("--manifest needs test images.", hint="Give them with --test SOURCE.")
        clip = load_clip(model)
        opened = open_pairs(pairs, limit=options.limit, seed=options.seed, **vars_of(reading))
        config = _config(verb, clip, len(opened), own, training)
        tested = None if testing.test is None else open_source(testing.test, Reading())
        path = run_path(options.output, f"purify-{verb}", model)
        if options.dry_run:
            from unpoison.planning_clip import plan_clip_training

            run = run_without_folder(console, options, precision=training.precision)
            dry = DryRun(plan=plan_clip_training(clip, opened, config, run=run), folder=path)
            console.answer(dry.data(), dry.show)
            return 0
        inputs = {
            "unpoison": __version__,
            "verb": f"purify {verb}",
            "model": model,
            "model_fingerprint": clip.fingerprint,
            "pairs": opened.name,
            "content": f"{len(opened)} pairs, {opened.fingerprint}",
            "reading": {name: str(value) for name, value in vars_of(reading).items() if value},
            "config": vars_of(config),
            "precision": training.precision,
            "limit": options.limit,
            "seed": options.seed,
            "test": testing.test,
            "manifest": None if testing.manifest is None else str(testing.manifest),
        }
        run = begin(console, options, path, inputs, precision=training.precision)
        result = _run(verb, clip, opened, config, tested, testing.manifest, run, path, model)
        if run.accelerator.is_main_process:
            from unpoison.storage import to_json

            console.answer(to_json(result), lambda out: _show(out, result, path))
    return 0 if result.accepted else INCONCLUSIVE


def _config(verb: str, clip: Any, samples: int, own: dict[str, Any], training: Training) -> Any:
    """The scaled (or published) settings, then the file's keys, then the options."""
    from dataclasses import asdict

    from unpoison.api_clip import count_parameters
    from unpoison.catalog import resolve
    from unpoison.configs import make_config, merge, read_config

    kind = resolve(METHODS[verb][0])
    start = kind() if training.published else kind.scaled(parameters=count_parameters(clip), samples=samples)
    given = read_config(training.config) if training.config is not None else {}
    options = {name: getattr(training, name) for name in ("steps", "batch_size", "learning_rate", "bound")}
    table = merge(given, own | options)
    make_config(kind, table, where=str(training.config or "options"))  # names unknown keys before the rest is added
    return make_config(kind, merge(asdict(start), table), where=str(training.config or "options"))


def _run(
    verb: str,
    clip: Any,
    pairs: Any,
    config: Any,
    tested: Any,
    manifest: Path | None,
    run: Run,
    path: Path,
    model: str,
) -> ClipPurification:
    from dataclasses import replace

    from unpoison import api_clip
    from unpoison.clip_results import ClipPurification
    from unpoison.outputs_clip import model_folder, save_clip_purification

    if run.folder is not None and not run.folder.finished:
        outcome = getattr(api_clip, METHODS[verb][1])(clip, pairs, config=config, run=run)
        if run.accelerator.is_main_process:
            result = outcome.purification
            if tested is not None:
                from unpoison.attacks.manifest import Poisoning
                from unpoison.evaluation.clip import evaluate_clip

                poisoning = None if manifest is None else Poisoning.load(manifest)
                before = evaluate_clip(clip, tested, poisoning=poisoning, run=run, name=model)
                after = evaluate_clip(
                    outcome.clip, tested, poisoning=poisoning, suspect=clip, run=run,
                    name=str(path / model_folder(result)),
                )  # fmt: skip
                result = replace(result, before=before, after=after)
            save_clip_purification(result, outcome.clip, path, base_model=model)
            run.folder.finish()
            run.forget(file.stem for file in (run.folder.path / "steps").glob("*.safetensors"))
        run.accelerator.wait_for_everyone()
    return ClipPurification.load(path / "purification.json")


def _show(out: rich.console.Console, result: ClipPurification, path: Path) -> None:
    from unpoison.cli.console import printable
    from unpoison.cli.tables import plain_table
    from unpoison.outputs_clip import model_folder

    out.print("Accepted." if result.accepted else "Not accepted.", style="bold")
    out.print(printable(result.reason))
    out.print(
        f"{result.steps:,} of {result.planned_steps:,} training steps on {result.trained_pairs:,} pairs; mean cosine "
        f"with the given model's embeddings: images {result.image_cosine:.2f}, texts {result.text_cosine:.2f}."
    )
    if result.before is not None and result.after is not None:
        table = plain_table("percent", "before", "after", right=("before", "after"))
        for name, key in (("C-Acc", "c_acc"), ("ASR", "asr"), ("ASR floor", "asr_floor"), ("RA", "ra")):
            before, after = getattr(result.before, key), getattr(result.after, key)
            if before is not None and after is not None:
                table.add_row(name, f"{before.value:.1f}", f"{after.value:.1f}")
        out.print()
        out.print(table)
    out.print()
    for warning in result.warnings:
        out.print(f"Note: {printable(warning)}")
    if result.skipped:
        out.print(f"{len(result.skipped):,} rows could not be used; they are listed in purification.json.")
    out.print(f"Protects: {printable(result.protects)}.")
    out.print("Not covered: " + printable(" ".join(result.not_covered)))
    out.print(f"Model: {path / model_folder(result)}")
