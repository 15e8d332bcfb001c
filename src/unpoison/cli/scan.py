"""``unpoison scan dataset``: is this set of images or of image-caption pairs poisoned, and which samples?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from unpoison.cli.options import READING, RUNNING, Channels, Opening, Planned, Reading, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.cli.console import Console
    from unpoison.defenses.cgd import CGDConfig
    from unpoison.results import DatasetScan, SampleScores, Split

METHOD = Group("Method", sort_key=10)
TOP = 10
Method = Literal[
    "cgd", "activation-clustering", "spectral-signatures", "strip", "ibd-psc",
    "dao", "slof", "k-distance", "similarity", "density", "exposure", "gain", "mean",
]  # fmt: skip
OF_PAIRS = ("dao", "slof", "k-distance", "similarity", "density", "exposure", "gain", "mean")


def dataset(
    source: str,
    /,
    *,
    pairs: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="SOURCE holds image-caption pairs; implied by a --method for pairs.",
        ),
    ] = False,
    method: Annotated[
        Method | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="How samples are scored: labelled images by CLIP and fresh networks (cgd) or by a network trained on "
            "them (the next four), pairs by the last six. [default: cgd, for pairs dao]",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="That network, as for `purify`. [default: one of --arch is trained on the set]",
        ),
    ] = None,
    clip: Annotated[
        str,
        Parameter(
            group=METHOD,
            help='For cgd, a CLIP: "tiny" (bundled), a folder, an id. For pairs the one trained on them.',
        ),
    ] = "tiny",
    reference: Annotated[
        str | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="For similarity, density, exposure, gain and mean: a CLIP that never saw the pairs. [default: tiny]",
        ),
    ] = None,
    arch: Annotated[
        str,
        Parameter(
            group=METHOD, help="Network to train: small-resnet, preact-resnet-18, wrn-16-1, package.module:callable."
        ),
    ] = "small-resnet",
    image_size: Annotated[int, Parameter(group=METHOD, help="Pixels of its input.")] = 32,
    mean: Annotated[
        Channels | None,
        Parameter(
            negative="", group=METHOD, show_default=False, help="For --model: its normalization of images in [0, 1]."
        ),
    ] = None,
    std: Annotated[
        Channels | None, Parameter(negative="", group=METHOD, show_default=False, help="Its standard deviation.")
    ] = None,
    assumed_rate: Annotated[
        float | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Where a method only ranks: flag 1.5 times this share. [default: 0.05, for pairs 0.005]",
        ),
    ] = None,
    scorers: Annotated[
        int | None, Parameter(group=METHOD, show_default=False, help="Scorers that are averaged. [default: 3]")
    ] = None,
    scorer_epochs: Annotated[
        int | None, Parameter(group=METHOD, show_default=False, help="Epochs of each scorer. [default: 5]")
    ] = None,
    scorer_samples: Annotated[
        int | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Samples, drawn at random, that scorers are trained on. [default: all, with --ray 50,000]",
        ),
    ] = None,
    config: Annotated[
        Path | None, Parameter(group=METHOD, show_default=False, help="TOML file with any keys of the method's config.")
    ] = None,
    ray: Annotated[
        str | None,
        Parameter(
            group=RUNNING,
            show_default=False,
            metavar="[ADDRESS]",
            help="For cgd: spread the images over the Ray cluster at HOST:PORT or 'auto'. Last or before another "
            "option, it needs no address: one is started on this machine ('local').",
        ),
    ] = None,
    exit_zero: Annotated[
        bool, Parameter(negative="", show_default=False, help="Exit with 0 whatever is found.")
    ] = False,
    caption_column: Annotated[
        str | None, Parameter(group=READING, show_default=False, help="Column that holds the captions of pairs.")
    ] = None,
    reading: Reading = Reading(),
    options: Planned = Planned(),
) -> int:
    """Find out whether a labelled image set is poisoned, toward what, and which samples are suspect; rank pairs.

    Exit codes: 0 nothing found, 1 poisoned, 2 error, 3 inconclusive.

    Parameters
    ----------
    source
        Folder of class folders (pairs: of images with captions), .parquet, .csv, .jsonl, .tar shards, a Hugging Face
        id, or "shapes" (built in).
    """
    from unpoison.cli import FINDINGS, INCONCLUSIVE
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.cli.running import DryRun, begin, open_source, run_inputs, run_without_folder
        from unpoison.configs import make_config, merge, read_config
        from unpoison.defenses.cgd import CGDConfig
        from unpoison.errors import UsageError
        from unpoison.models.clip_transformers import load_clip

        if ray is not None and (pairs or method not in (None, "cgd")):
            raise UsageError(
                f"--ray is for cgd, not for {method or 'pairs'}: only cgd judges each image on its own.",
                hint="Leave --ray away, or scan labelled images with cgd.",
            )
        if pairs or method in OF_PAIRS:
            from unpoison.cli.scan_pairs import scan

            foreign = {
                "--model": model, "--mean": mean, "--std": std, "--scorers": scorers, "--scorer-epochs": scorer_epochs,
                "--scorer-samples": scorer_samples, "--label-column": reading.label_column,
                "--class-names": reading.class_names,
            }  # fmt: skip
            code = scan(
                console, source, method, clip, reference, assumed_rate, config, caption_column, reading, options,
                foreign=[name for name, value in foreign.items() if value is not None],
            )  # fmt: skip
            return 0 if exit_zero else code
        if reference is not None or caption_column is not None:
            raise UsageError(
                "--reference and --caption-column are for image-caption pairs.", hint="Add --pairs, or leave them away."
            )
        method = method or "cgd"
        if model is None and (mean is not None or std is not None):
            raise UsageError("--mean and --std are of the network that --model names.", hint="Name it, or leave them.")
        if method != "cgd":
            opening = Opening(arch=arch, image_size=image_size, mean=mean, std=std)
            code = _detect(console, source, method, model, opening, assumed_rate, config, reading, options)
            return 0 if exit_zero else code
        if model is not None or assumed_rate is not None:
            raise UsageError("--model and --assumed-rate are not for cgd.", hint="Name another --method with them.")
        early = {"scorers": scorers, "scorer_epochs": scorer_epochs, "scorer_samples": scorer_samples}
        table = merge(read_config(config) if config is not None else {}, {"separation": early})
        settings = make_config(CGDConfig, table, where=str(config or "options"))
        if ray is not None:
            from unpoison.distributed.cluster import check_answers
            from unpoison.distributed.scan import on_a_sample

            check_answers(ray)
            settings = on_a_sample(settings)
            table = merge(table, {"separation": {"scorer_samples": settings.separation.scorer_samples}})
        images = open_source(source, reading, limit=options.limit, seed=options.seed)
        path = run_path(options.output, "scan", source)
        surrogate = load_clip(clip)
        if options.dry_run:
            plan = _plan(images, surrogate, arch, image_size, settings, ray, run_without_folder(console, options))
            dry = DryRun(plan=plan, folder=path)
            console.answer(dry.data(), dry.show)
            return 0
        inputs = run_inputs(
            "scan dataset", images, reading, options, clip=clip, clip_fingerprint=surrogate.fingerprint, arch=arch,
            image_size=image_size, config=table,
        )  # fmt: skip
        run = begin(console, options, path, inputs)
        scan, scores, split = _scan(images, surrogate, arch, image_size, settings, ray, run, path)
        from unpoison.results import to_json

        console.answer(to_json(scan), lambda out: _show(out, scan, scores, split, path))
    if exit_zero:
        return 0
    return FINDINGS if scan.estimate.poisoned else INCONCLUSIVE if scan.inconclusive else 0


def _detect(
    console: Console,
    source: str,
    method: str,
    model: str | None,
    opening: Opening,
    assumed_rate: float | None,
    config: Path | None,
    reading: Reading,
    options: Planned,
) -> int:
    """A scan with one of the detectors that need a network trained on the set; ``opening``: that network's."""
    from dataclasses import asdict, replace

    from unpoison.api_detectors import DetectorConfig, scan_with_detector
    from unpoison.cli import FINDINGS, INCONCLUSIVE
    from unpoison.cli.classifier_repair import open_pair
    from unpoison.cli.running import DryRun, begin, open_source, run_inputs, run_without_folder
    from unpoison.configs import make_config, merge, read_config
    from unpoison.models.checkpoints import hash_weights
    from unpoison.models.classifier import new_classifier
    from unpoison.outputs import save_scan
    from unpoison.planning import plan_detection, probe
    from unpoison.results import DatasetScan, SampleScores, Split, to_json

    table = merge(read_config(config) if config is not None else {}, {"assumed_rate": assumed_rate})
    settings = make_config(DetectorConfig, table, where=str(config or "options"))
    arch, image_size = opening.arch or "", opening.image_size
    if model is None:
        classifier, images = None, open_source(source, reading, limit=options.limit, seed=options.seed)
    else:
        how = opening if Path(model).is_file() else replace(opening, arch=None, image_size=Opening().image_size)
        classifier, images = open_pair(model, source, how, reading, limit=options.limit, seed=options.seed)
    path = run_path(options.output, "scan", source)
    if options.dry_run:
        run = run_without_folder(console, options)
        network = classifier or new_classifier(arch, images.class_names, image_size=image_size)
        epochs = settings.epochs if classifier is None else 0
        passes = {"strip": settings.strip.overlays, "ibd-psc": 1 + settings.scaling.networks}.get(method, 1)
        rates = probe(images, None, network, run=run)
        plan = plan_detection(len(images), network.image_size, rates, epochs=epochs, passes=passes)
        dry = DryRun(plan=plan, folder=path)
        console.answer(dry.data(), dry.show)
        return 0
    inputs = run_inputs(
        "scan dataset", images, reading, options, method=method, model=model, arch=arch, image_size=image_size,
        mean=opening.mean, std=opening.std,
        model_hash=None if classifier is None else hash_weights(classifier.weights()), config=asdict(settings),
    )  # fmt: skip
    run = begin(console, options, path, inputs)
    if run.folder is not None and not run.folder.finished:
        outcome = scan_with_detector(
            images, method, classifier=classifier, arch=arch, image_size=image_size, config=settings, run=run
        )
        save_scan(outcome.scan, outcome.scores, outcome.split, outcome.samples, path)
        run.folder.finish()
    scan = DatasetScan.load(path / "scan.json")
    scores, split = SampleScores.load(path / "scores.parquet"), Split.load(path / "split.parquet")
    console.answer(to_json(scan), lambda out: _show(out, scan, scores, split, path))
    return FINDINGS if scan.estimate.poisoned else INCONCLUSIVE if scan.inconclusive else 0


def _scan(
    images: Any, clip: Any, arch: str, image_size: int, config: CGDConfig, ray: str | None, run: Any, path: Path
) -> tuple[DatasetScan, SampleScores, Split]:
    from unpoison.api import scan_dataset
    from unpoison.outputs import save_scan
    from unpoison.results import DatasetScan, SampleScores, Split

    if not run.folder.finished:
        how: dict[str, Any] = {"clip": clip, "arch": arch, "image_size": image_size, "config": config, "run": run}
        if ray is None:
            outcome = scan_dataset(images, **how)
        else:
            from unpoison.distributed.scan import scan_dataset_on_ray

            outcome = scan_dataset_on_ray(images, address=ray, **how)
        save_scan(outcome.scan, outcome.scores, outcome.split, outcome.samples, path)
        run.folder.finish()
    return (
        DatasetScan.load(path / "scan.json"),
        SampleScores.load(path / "scores.parquet"),
        Split.load(path / "split.parquet"),
    )


def _plan(images: Any, clip: Any, arch: str, image_size: int, config: CGDConfig, ray: str | None, run: Any) -> Any:
    from unpoison.models.classifier import new_classifier
    from unpoison.planning import on_workers, plan_scan, probe

    classifier = new_classifier(arch, images.class_names, image_size=image_size)
    separation = config.separation
    plan = plan_scan(
        len(images),
        classifier.image_size,
        probe(images, clip, classifier, run=run),
        scorers=separation.scorers,
        scorer_epochs=separation.scorer_epochs,
        classes=len(images.class_names),
        trained=separation.scorer_samples,
    )
    if ray is None:
        return plan
    from unpoison.distributed.cluster import count_workers

    return on_workers(plan, len(images), classifier.image_size, count_workers(ray))


def _show(out: rich.console.Console, scan: DatasetScan, scores: SampleScores, split: Split, path: Path) -> None:
    import shlex

    from unpoison.cli.console import printable
    from unpoison.cli.tables import flagged_table, skipped_lines, suspects_table, verdict

    out.print(verdict(scan.estimate, scan.samples, scan.class_names, ranks_only=scan.ranks_only), style="bold")
    out.print(printable(scan.estimate.reason))
    if scan.weak_clip and not scan.estimate.poisoned:
        out.print("CLIP knows these classes hardly better than chance: this scan is inconclusive.", style="yellow")
    for warning in scan.warnings:
        out.print(printable(f"Warning: {warning}"), style="yellow")
    if scan.flagged:
        out.print()
        out.print(flagged_table(scan))
        out.print()
        out.print(suspects_table(scores, split, TOP))
    for line in skipped_lines(scan, path):
        out.print(line)
    if scan.not_covered:
        out.print()
        out.print("Not covered: " + printable("; ".join(scan.not_covered)))
    out.print()
    out.print(f"Report: {path / 'report.html'}")
    if scan.estimate.poisoned:
        folder, source = shlex.quote(str(path)), shlex.quote(scan.source)
        out.print("Next:")
        out.print(f"  unpoison keep {folder} -o clean.parquet", soft_wrap=True)
        out.print(f"  unpoison purify cgd MODEL --data {source}", soft_wrap=True)
