"""``unpoison evaluate``: accuracy of a classifier, and attack success where a manifest is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from unpoison.cli.options import Opening, Reading, Running

if TYPE_CHECKING:
    import rich.console

    from unpoison.results import Evaluation


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
    opening: Opening = Opening(),
    reading: Reading = Reading(),
    options: Running = Running(),
) -> int:
    """Measure a classifier on clean test images. Files are written only with -o.

    Parameters
    ----------
    model
        Folder of unpoison or transformers, or a weights file (.safetensors, .pt, .pth) with --arch.
    """
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.cli import classifier_repair
        from unpoison.cli.running import begin, run_inputs, run_without_folder, vars_of
        from unpoison.models.checkpoints import hash_weights
        from unpoison.outputs import save_report
        from unpoison.results import Evaluation, to_json

        classifier, images = classifier_repair.open_pair(
            model, data, opening, reading, limit=options.limit, seed=options.seed
        )
        if output is None:
            result = classifier_repair.evaluate(
                classifier, images, manifest, model, run_without_folder(console, options)
            )
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
    return 0


def _show(out: rich.console.Console, result: Evaluation) -> None:
    from unpoison.cli.console import printable
    from unpoison.cli.tables import evaluation_table

    out.print(evaluation_table({printable(result.model): result}))
    for part in result.parts:
        out.print(
            f"{part.attack}, target {printable(part.target)!r}: attack success {part.asr.value:.2f} %, "
            f"floor {part.asr_floor.value:.2f} %"
        )
    if result.skipped:
        out.print(f"Skipped {len(result.skipped)} rows that could not be used.")
    if result.asr is None:
        out.print("No manifest was given, so no trigger was tested.")
