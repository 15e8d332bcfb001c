"""``unpoison evaluate``: accuracy of a classifier or a CLIP, and attack success where a manifest is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from unpoison.cli.evaluate_clip import Compared
from unpoison.cli.options import Opening, Reading, Running

if TYPE_CHECKING:
    import rich.console

    from unpoison.cli.console import Console
    from unpoison.results import ClipEvaluation, Evaluation


def evaluate(
    model: str,
    /,
    *,
    data: Annotated[str, Parameter(metavar="SOURCE", help="Clean test images with their true labels.")],
    manifest: Annotated[
        Path | None, Parameter(show_default=False, help="Poison manifest: its trigger is put on the test images.")
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(
            name=["--output", "-o"],
            show_default=False,
            help="Folder for evaluation.json and report.html. [default: none]",
        ),
    ] = None,
    compared: Compared = Compared(),
    opening: Opening = Opening(),
    reading: Reading = Reading(),
    options: Running = Running(),
) -> int:
    """Measure a classifier, or a CLIP as zero-shot classifier, on clean test images. Files are written only with -o.

    Parameters
    ----------
    model
        A classifier: folder of unpoison or transformers, or a weights file (.safetensors, .pt, .pth) with --arch.
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.cli import evaluate_clip
        from unpoison.cli.running import vars_of
        from unpoison.errors import UsageError
        from unpoison.models import any_model

        if any_model.kind_of(model, any_model.Opening(**vars_of(opening))) == "CLIP":
            evaluate_clip.evaluate(console, model, data, manifest, compared, reading, options, output)
            return 0
        of_clips = [f"--{name}" for name, value in vars_of(compared).items() if value is not None]
        if of_clips:
            raise UsageError(
                f"{', '.join(of_clips)} cannot be measured: {model} is a classifier, not a CLIP.",
                hint="Leave it away, or name a CLIP.",
            )
        _evaluate_classifier(console, model, data, manifest, opening, reading, options, output)
    return 0


def _evaluate_classifier(
    console: Console,
    model: str,
    data: str,
    manifest: Path | None,
    opening: Opening,
    reading: Reading,
    options: Running,
    output: Path | None,
) -> None:
    from unpoison.cli import classifier_repair
    from unpoison.cli.running import begin, run_inputs, run_without_folder, vars_of
    from unpoison.models.checkpoints import hash_weights
    from unpoison.outputs import save_report
    from unpoison.results import Evaluation, to_json

    classifier, images = classifier_repair.open_pair(
        model, data, opening, reading, limit=options.limit, seed=options.seed
    )
    if output is None:
        result = classifier_repair.evaluate(classifier, images, manifest, model, run_without_folder(console, options))
    else:
        inputs = run_inputs(
            "evaluate", images, reading, options, model=model, model_hash=hash_weights(classifier.weights()),
            opening=vars_of(opening), manifest=None if manifest is None else str(manifest),
        )  # fmt: skip
        run = begin(console, options, output, inputs)
        if run.folder is not None and not run.folder.finished:
            classifier_repair.evaluate(classifier, images, manifest, model, run).save(output / "evaluation.json")
            save_report(output)
            run.folder.finish()
        result = Evaluation.load(output / "evaluation.json")
    console.answer(to_json(result), lambda out: _show(out, result))


def _show(out: rich.console.Console, result: Evaluation) -> None:
    from unpoison.cli.console import printable
    from unpoison.cli.tables import evaluation_table

    out.print(evaluation_table({printable(result.model): result}))
    show_notes(out, result)


def show_notes(out: rich.console.Console, result: Evaluation | ClipEvaluation) -> None:
    """Each of several attacks, what could not be measured, and what was left out."""
    from unpoison.cli.console import printable

    for part in result.parts:
        out.print(
            f"{part.attack}, target {printable(part.target)!r}: attack success {part.asr.value:.2f} %, "
            f"floor {part.asr_floor.value:.2f} %"
        )
    for note in getattr(result, "notes", ()):
        out.print(f"Note: {printable(note)}")
    if result.skipped:
        out.print(f"Skipped {len(result.skipped)} rows that could not be used.")
    if result.asr is None:
        out.print("No manifest was given, so no trigger was tested.")
