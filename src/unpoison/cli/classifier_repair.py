"""What every ``unpoison purify`` of a classifier does once its options are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unpoison.cli.options import Opening, Reading, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.cli.classifier_options import ClassifierRepairOptions
    from unpoison.data.sources import LabelledImages
    from unpoison.models.image_classifier import ImageClassifier
    from unpoison.planning import Plan
    from unpoison.results import Evaluation, Purification
    from unpoison.runs import Run
    from unpoison.types import ZeroShotModel


def repair(
    verb: str,
    model: str,
    asked: ClassifierRepairOptions,
    own: dict[str, Any],
    *,
    paper: bool = False,
    given: Path | None = None,
) -> int:
    """Repair ``model`` by the method that is called ``verb``, and say the exit code.

    ``own``: the options that are fields of the method's config; ``given``: folder of an earlier scan.
    """
    from unpoison.cli import INCONCLUSIVE
    from unpoison.cli.console import Console

    options, own = asked.running, own | {"bound": asked.bound}
    with Console(options) as console:
        console.detail("importing libraries")
        from dataclasses import asdict, replace

        from unpoison.attacks.parts import load_labelled
        from unpoison.catalog import DEFENSES, find, resolve
        from unpoison.cli.running import DryRun, begin, open_source, run_inputs, run_without_folder, vars_of
        from unpoison.configs import make_config, merge, read_config
        from unpoison.errors import UsageError
        from unpoison.evaluation.classifier import purity_of
        from unpoison.models.checkpoints import hash_weights
        from unpoison.models.clip_transformers import load_clip
        from unpoison.outputs import model_folder, save_purification
        from unpoison.results import Purification, to_json

        if asked.manifest is not None and asked.test is None:
            raise UsageError("--manifest needs test images.", hint="Give them with --test SOURCE.")
        entry = find(verb, DEFENSES)
        kind = resolve(entry.config)
        table = merge(read_config(asked.config) if asked.config is not None else {}, own)
        if paper:
            table = merge(asdict(kind.as_published()), table)
        settings = make_config(kind, table, where=str(asked.config or "options"))
        classifier, images = open_pair(
            model, asked.data, asked.opening, asked.reading, limit=options.limit, seed=options.seed
        )
        tested = None
        if asked.test is not None:
            tested = open_source(asked.test, Reading(), class_names=classifier.class_names)
        path = run_path(options.output, f"purify-{verb}", model)
        evidence = _read_evidence(verb, given)
        truth = None if asked.train_manifest is None else load_labelled(asked.train_manifest)
        surrogate = None if paper or evidence is not None else load_clip(asked.clip)
        if options.dry_run:
            dry = DryRun(plan=_plan(images, surrogate, classifier, settings, run_without_folder(console, options)),
                         folder=path)  # fmt: skip
            console.answer(dry.data(), dry.show)
            return 0
        inputs = run_inputs(
            f"purify {verb}", images, asked.reading, options, model=model,
            model_hash=hash_weights(classifier.weights()), opening=vars_of(asked.opening),
            clip=None if surrogate is None else asked.clip,
            clip_fingerprint=None if surrogate is None else surrogate.fingerprint, config=asdict(settings),
            test=asked.test, manifest=None if asked.manifest is None else str(asked.manifest),
            train_manifest=None if asked.train_manifest is None else str(asked.train_manifest),
            given=None if given is None else str(given),
        )  # fmt: skip
        run = begin(console, options, path, inputs)
        if run.folder is not None and not run.folder.finished:
            more = {} if evidence is None else {"scores" if verb == "pad-ft" else "split": evidence}
            outcome = resolve(entry.function)(classifier, images, config=settings, clip=surrogate, run=run, **more)
            purification: Purification = outcome.purification
            if truth is not None:
                purification = replace(purification, purity=purity_of(outcome.split, truth))
            if tested is not None:
                before = evaluate(classifier, tested, asked.manifest, model, run)
                name = str(path / model_folder(purification))
                after = evaluate(outcome.classifier, tested, asked.manifest, name, run)
                purification = replace(purification, before=before, after=after)
            save_purification(
                purification, outcome.classifier, outcome.scores, outcome.split, outcome.samples, path,
                base_model=model,
            )  # fmt: skip
            run.folder.finish()
        result = Purification.load(path / "purification.json")
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


def evaluate(classifier: Any, tested: LabelledImages, manifest: Path | None, name: str, run: Run) -> Evaluation:
    """One evaluation with the model's name as the user knows it."""
    from unpoison.attacks.parts import load_labelled
    from unpoison.evaluation.classifier import evaluate_classifier

    poisoning = None if manifest is None else load_labelled(manifest)
    return evaluate_classifier(classifier, tested, poisoning=poisoning, run=run, name=name)


def _plan(
    images: LabelledImages, clip: ZeroShotModel | None, classifier: ImageClassifier, config: Any, run: Run
) -> Plan:
    """``clip``: None where the separation is given, or not asked for."""
    from unpoison.detection.cgd import SeparationConfig
    from unpoison.planning import plan_purification, probe
    from unpoison.planning_repairs import attempts, repair_work

    repaired, passed = repair_work(config, len(images), len(images.class_names))
    separation = getattr(config, "separation", None) or SeparationConfig()
    return plan_purification(
        len(images),
        classifier.image_size,
        probe(images, clip, classifier, run=run),
        scorers=0 if clip is None else separation.scorers,
        scorer_epochs=0 if clip is None else separation.scorer_epochs,
        classes=len(images.class_names),
        repaired=repaired,
        passed=passed,
        attempts=attempts(config),
    )


def show_purification(out: rich.console.Console, result: Purification, path: Path) -> None:
    """What a repair of a classifier came to."""
    from unpoison.cli.console import printable
    from unpoison.cli.tables import evaluation_table
    from unpoison.outputs import model_folder
    from unpoison.report.text import purity_sentence

    out.print("Accepted." if result.accepted else "Not accepted.", style="bold")
    out.print(printable(result.reason))
    out.print(
        f"{result.clean_count:,} samples were trusted, {result.suspect_count:,} suspected; {result.steps:,} training "
        f"steps, {100 * result.changed_share:.1f} percent of the parameters free to change."
    )
    if result.purity:
        out.print(printable(purity_sentence(result.purity)))
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


def _read_evidence(verb: str, given: Path | None) -> Any:
    """The scores or the split of an earlier scan; None where none is named."""
    from unpoison.results import SampleScores, Split

    if given is None:
        return None
    kind, name = (SampleScores, "scores.parquet") if verb == "pad-ft" else (Split, "split.parquet")
    return kind.load(given / name if given.is_dir() else given)
