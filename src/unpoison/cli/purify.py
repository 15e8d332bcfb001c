"""``unpoison purify cgd``: repair a classifier with its own poisoned training set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from unpoison.cli.classifier_options import Bound, Config, Data, Manifest, Test
from unpoison.cli.options import METHOD, Opening, Planned, Reading, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.data.sources import LabelledImages
    from unpoison.defenses.cgd import CGDConfig
    from unpoison.models.image_classifier import ImageClassifier
    from unpoison.results import Evaluation, Purification
    from unpoison.runs import Run


def cgd(
    model: str,
    /,
    *,
    data: Data,
    clip: Annotated[
        str, Parameter(group=METHOD, help='A CLIP of transformers: "tiny" (bundled), a folder, an id.')
    ] = "tiny",
    steps: Annotated[
        int | None, Parameter(group=METHOD, show_default=False, help="Optimizer steps of the repair. [default: 400]")
    ] = None,
    bound: Bound = None,
    config: Config = None,
    test: Test = None,
    manifest: Manifest = None,
    opening: Opening = Opening(),  # noqa: B008
    reading: Reading = Reading(),  # noqa: B008
    options: Planned = Planned(),  # noqa: B008
) -> int:
    """Repair a backdoored classifier. The given model stays untouched; the repaired one has the same format.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        Folder of unpoison or transformers, or a weights file (.safetensors, .pt, .pth) with --arch.
    """
    from unpoison.cli import INCONCLUSIVE
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.cli.running import DryRun, begin, open_source, run_inputs, run_without_folder, vars_of
        from unpoison.configs import make_config, merge, read_config
        from unpoison.defenses.cgd import CGDConfig
        from unpoison.errors import UsageError
        from unpoison.models.checkpoints import hash_weights
        from unpoison.models.clip_transformers import load_clip

        if manifest is not None and test is None:
            raise UsageError("--manifest needs test images.", hint="Give them with --test SOURCE.")
        table = merge(read_config(config) if config is not None else {}, {"steps": steps, "bound": bound})
        settings = make_config(CGDConfig, table, where=str(config or "options"))
        classifier, images = open_pair(model, data, opening, reading, limit=options.limit, seed=options.seed)
        tested = None if test is None else open_source(test, Reading(), class_names=classifier.class_names)
        path = run_path(options.output, "purify", model)
        surrogate = load_clip(clip)
        if options.dry_run:
            plan = _plan(images, surrogate, classifier, settings, run_without_folder(console, options))
            dry = DryRun(plan=plan, folder=path)
            console.answer(dry.data(), dry.show)
            return 0
        inputs = run_inputs(
            "purify cgd", images, reading, options, model=model, model_hash=hash_weights(classifier.weights()),
            opening=vars_of(opening), clip=clip, clip_fingerprint=surrogate.fingerprint, config=table, test=test,
            manifest=None if manifest is None else str(manifest),
        )  # fmt: skip
        run = begin(console, options, path, inputs)
        result = _purify(classifier, images, settings, surrogate, run, path, model, tested, manifest)
        from unpoison.results import to_json

        console.answer(to_json(result), lambda out: show_purification(out, result, path))
    return 0 if result.accepted else INCONCLUSIVE


def open_pair(
    model: str, data: str, opening: Opening, reading: Reading, *, limit: int | None = None, seed: int = 0
) -> tuple[ImageClassifier, LabelledImages]:
    """A classifier and its images under one class list: the model's own, else (weights files) that of the data."""
    from unpoison.cli.running import open_source, vars_of
    from unpoison.models.classifier import load_classifier

    how = vars_of(opening)
    if Path(model).is_file():
        images = open_source(data, reading, limit=limit, seed=seed)
        return load_classifier(model, class_names=images.class_names, **how), images
    classifier = load_classifier(model, **how)
    return classifier, open_source(data, reading, limit=limit, seed=seed, class_names=classifier.class_names)


def _purify(
    classifier: ImageClassifier,
    images: LabelledImages,
    config: CGDConfig,
    clip: Any,
    run: Run,
    path: Path,
    model: str,
    tested: LabelledImages | None,
    manifest: Path | None,
) -> Purification:
    from dataclasses import replace

    from unpoison.api import purify_with_cgd
    from unpoison.outputs import save_purification
    from unpoison.results import Purification

    if run.folder is not None and not run.folder.finished:
        outcome = purify_with_cgd(classifier, images, config=config, clip=clip, run=run)
        purification = outcome.purification
        if tested is not None:
            before = evaluate(classifier, tested, manifest, model, run)
            after = evaluate(outcome.classifier, tested, manifest, str(path / "model"), run)
            purification = replace(purification, before=before, after=after)
        save_purification(
            purification,
            outcome.classifier,
            outcome.scores,
            outcome.split,
            outcome.samples,
            path,
            base_model=model,
        )
        run.folder.finish()
    return Purification.load(path / "purification.json")


def evaluate(classifier: Any, tested: LabelledImages, manifest: Path | None, name: str, run: Run) -> Evaluation:
    """One evaluation with the model's name as the user knows it."""
    from unpoison.attacks.parts import load_labelled
    from unpoison.evaluation.classifier import evaluate_classifier

    poisoning = None if manifest is None else load_labelled(manifest)
    return evaluate_classifier(classifier, tested, poisoning=poisoning, run=run, name=name)


def _plan(images: LabelledImages, clip: Any, classifier: ImageClassifier, config: CGDConfig, run: Run) -> Any:
    from unpoison.planning import plan_purification, probe

    return plan_purification(
        len(images),
        classifier.image_size,
        probe(images, clip, classifier, run=run),
        scorers=config.separation.scorers,
        scorer_epochs=config.separation.scorer_epochs,
        classes=len(images.class_names),
        repaired=config.steps * config.batch_size,
    )


def show_purification(out: rich.console.Console, result: Purification, path: Path) -> None:
    """What a repair of a classifier came to."""
    from unpoison.cli.console import printable
    from unpoison.cli.tables import evaluation_table
    from unpoison.outputs import model_folder

    out.print("Accepted." if result.accepted else "Not accepted.", style="bold")
    out.print(printable(result.reason))
    out.print(
        f"{result.clean_count:,} samples were trusted, {result.suspect_count:,} suspected; {result.steps:,} training "
        f"steps, {100 * result.changed_share:.1f} percent of the parameters free to change."
    )
    if result.before is not None and result.after is not None:
        out.print()
        out.print(evaluation_table({"before": result.before, "after": result.after}))
    out.print()
    for warning in result.warnings:
        out.print(printable(f"Warning: {warning}"), style="yellow")
    out.print(f"Protects: {printable(result.protects)}.")
    if result.not_covered:
        out.print("Not covered: " + printable("; ".join(result.not_covered)))
    out.print(f"Model: {path / model_folder(result)}")
    out.print(f"Report: {path / 'report.html'}")
