"""``unpoison purify pad-ft`` and the classics: repair a classifier with what its training set itself gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from unpoison.cli.classifier_options import Bound, Clip, Config, Data, Manifest, Test
from unpoison.cli.options import METHOD, Opening, Planned, Reading, run_path

if TYPE_CHECKING:
    from unpoison.results import Purification

Steps = Annotated[
    int | None, Parameter(group=METHOD, show_default=False, help="Optimizer steps. [default: the method's]")
]
SplitFrom = Annotated[
    Path | None,
    Parameter(
        metavar="RUN",
        group=METHOD,
        show_default=False,
        help="Folder of a `scan dataset` of this set, or its split.parquet. [default: separate as CGD does]",
    ),
]


def pad_ft(
    model: str,
    /,
    *,
    data: Data,
    clip: Clip = "tiny",
    scores: Annotated[
        Path | None,
        Parameter(
            metavar="RUN",
            group=METHOD,
            show_default=False,
            help="Folder of a `scan dataset` of this set, or its scores.parquet. [default: CGD's, made here]",
        ),
    ] = None,
    per_class: Annotated[
        int | None,
        Parameter(group=METHOD, show_default=False, help="Samples of each class to tune on. [default: 250]"),
    ] = None,
    rule: Annotated[
        Literal["suspects", "quantile", "learned", "margin", "none"] | None,
        Parameter(
            group=METHOD, show_default=False, help="How the bounds of activations are found. [default: suspects]"
        ),
    ] = None,
    paper: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="As in the paper: samples chosen by the model's own losses alone, the head tuned from where it is.",
        ),
    ] = False,
    bound: Bound = None,
    config: Config = None,
    test: Test = None,
    manifest: Manifest = None,
    opening: Opening = Opening(),  # noqa: B008
    reading: Reading = Reading(),  # noqa: B008
    options: Planned = Planned(),  # noqa: B008
) -> int:
    """Repair a classifier in minutes: clip activations, tune the last layer. The given model stays untouched.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        Folder of unpoison or transformers, or a weights file (.safetensors, .pt, .pth) with --arch.
    """
    own = {"per_class": per_class, "clip": {"rule": rule}, "bound": bound}
    return _purify(
        "pad-ft", model, data, clip, own, config, test, manifest, opening, reading, options, paper=paper, given=scores
    )


def _classic(method: str, text: str) -> Any:
    """The verb of one of the defenses that were published for clean samples."""

    def verb(
        model: str,
        /,
        *,
        data: Data,
        clip: Clip = "tiny",
        split_from: SplitFrom = None,
        steps: Steps = None,
        bound: Bound = None,
        config: Config = None,
        test: Test = None,
        manifest: Manifest = None,
        opening: Opening = Opening(),  # noqa: B008
        reading: Reading = Reading(),  # noqa: B008
        options: Planned = Planned(),  # noqa: B008
    ) -> int:
        own = {"steps": steps, "bound": bound}
        return _purify(
            method, model, data, clip, own, config, test, manifest, opening, reading, options, given=split_from
        )

    verb.__name__ = method.replace("-", "_")
    verb.__doc__ = f"""{text} The given model stays untouched.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        Folder of unpoison or transformers, or a weights file (.safetensors, .pt, .pth) with --arch.
    """
    return verb


CLASSICS = {
    "ft": "Fine-tune a classifier on the clean part of its training set, the plainest baseline.",
    "ft-sam": "Fine-tune a classifier toward flat minima on the clean part of its training set.",
    "fine-pruning": "Prune the features that clean samples leave idle, then fine-tune.",
    "nad": "Distill attention from a fine-tuned copy of the classifier.",
    "anp": "Prune the neurons that small changes turn into a backdoor.",
    "i-bau": "Unlearn what one perturbation of all images can do.",
    "abl": "Train a new classifier that isolates poison and unlearns it.",
}
"""Verb to what it does; the command line's help and the verbs themselves have it from here."""
ft, ft_sam, fine_pruning, nad, anp, i_bau, abl = (_classic(method, text) for method, text in CLASSICS.items())


def _purify(
    verb: str,
    model: str,
    data: str,
    clip: str,
    own: dict[str, Any],
    config: Path | None,
    test: str | None,
    manifest: Path | None,
    opening: Opening,
    reading: Reading,
    options: Planned,
    *,
    paper: bool = False,
    given: Path | None = None,
) -> int:
    from unpoison.cli import INCONCLUSIVE
    from unpoison.cli.console import Console
    from unpoison.cli.purify import evaluate, open_pair, show_purification

    with Console(options) as console:
        console.detail("importing libraries")
        from dataclasses import asdict, replace

        from unpoison.catalog import DEFENSES, find, resolve
        from unpoison.cli.running import DryRun, begin, open_source, run_inputs, run_without_folder, vars_of
        from unpoison.configs import make_config, merge, read_config
        from unpoison.errors import UsageError
        from unpoison.models.checkpoints import hash_weights
        from unpoison.models.clip_transformers import load_clip
        from unpoison.outputs import save_purification
        from unpoison.planning import plan_purification, probe
        from unpoison.planning_repairs import attempts, repair_work
        from unpoison.results import Purification, to_json

        if manifest is not None and test is None:
            raise UsageError("--manifest needs test images.", hint="Give them with --test SOURCE.")
        entry = find(verb, DEFENSES)
        kind = resolve(entry.config)
        table = merge(read_config(config) if config is not None else {}, own)
        if paper:
            table = merge(asdict(kind.as_published()), table)
        settings = make_config(kind, table, where=str(config or "options"))
        classifier, images = open_pair(model, data, opening, reading, limit=options.limit, seed=options.seed)
        tested = None if test is None else open_source(test, Reading(), class_names=classifier.class_names)
        path = run_path(options.output, f"purify-{verb}", model)
        evidence = _read_evidence(verb, given)
        alone = paper or evidence is not None
        surrogate = None if alone else load_clip(clip)
        if options.dry_run:
            run = run_without_folder(console, options)
            separation = not alone
            repaired, passed = repair_work(settings, len(images), len(images.class_names))
            plan = plan_purification(
                len(images),
                classifier.image_size,
                probe(images, surrogate, classifier, run=run),
                scorers=3 if separation else 0,
                scorer_epochs=5 if separation else 0,
                classes=len(images.class_names),
                repaired=repaired,
                passed=passed,
                attempts=attempts(settings),
            )
            dry = DryRun(plan=plan, folder=path)
            console.answer(dry.data(), dry.show)
            return 0
        inputs = run_inputs(
            f"purify {verb}", images, reading, options, model=model, model_hash=hash_weights(classifier.weights()),
            opening=vars_of(opening), clip=None if surrogate is None else clip,
            clip_fingerprint=None if surrogate is None else surrogate.fingerprint, config=asdict(settings), test=test,
            manifest=None if manifest is None else str(manifest), given=None if given is None else str(given),
        )  # fmt: skip
        run = begin(console, options, path, inputs)
        if run.folder is not None and not run.folder.finished:
            more = {} if evidence is None else {"scores" if verb == "pad-ft" else "split": evidence}
            outcome = resolve(entry.function)(classifier, images, config=settings, clip=surrogate, run=run, **more)
            purification: Purification = outcome.purification
            if tested is not None:
                before = evaluate(classifier, tested, manifest, model, run)
                after = evaluate(outcome.classifier, tested, manifest, str(path / "model"), run)
                purification = replace(purification, before=before, after=after)
            save_purification(
                purification, outcome.classifier, outcome.scores, outcome.split, outcome.samples, path, base_model=model
            )
            run.folder.finish()
        result = Purification.load(path / "purification.json")
        console.answer(to_json(result), lambda out: show_purification(out, result, path))
    return 0 if result.accepted else INCONCLUSIVE


def _read_evidence(verb: str, given: Path | None) -> Any:
    """The scores or the split of an earlier scan; None where none is named."""
    from unpoison.results import SampleScores, Split

    if given is None:
        return None
    kind, name = (SampleScores, "scores.parquet") if verb == "pad-ft" else (Split, "split.parquet")
    return kind.load(given / name if given.is_dir() else given)
