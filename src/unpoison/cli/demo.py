"""``unpoison demo``: the whole way without data, network or GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from unpoison.cli.options import Planned

if TYPE_CHECKING:
    import rich.console

    from unpoison.demo import DemoConfig
    from unpoison.planning import Plan
    from unpoison.results import Purification
    from unpoison.runs import Run
    from unpoison.types import ZeroShotModel


def demo(
    *,
    config: Annotated[
        Path | None, Parameter(show_default=False, help="TOML file with other sizes: train, test, epochs, rate, ...")
    ] = None,
    clip: Annotated[str, Parameter(help='A CLIP of transformers: "tiny" (bundled), a folder, an id.')] = "tiny",
    options: Planned = Planned(),
) -> int:
    """Poison built-in pictures, train on them, find the poison, repair the model, write the report."""
    from unpoison.cli import INCONCLUSIVE
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.log("importing libraries")
        from unpoison import __version__
        from unpoison.cli.running import DryRun, begin, run_without_folder
        from unpoison.configs import make_config, merge, read_config
        from unpoison.demo import DemoConfig, run_demo
        from unpoison.models.clip_transformers import load_clip
        from unpoison.results import Purification, to_json

        table = merge(read_config(config) if config is not None else {}, {"train": options.limit})
        settings = make_config(DemoConfig, table, where=str(config or "options"))
        path = options.output if options.output is not None else Path("runs", "demo")
        surrogate = load_clip(clip)
        if options.dry_run:
            dry = DryRun(plan=_plan(settings, surrogate, run_without_folder(console, options)), folder=path)
            console.answer(dry.data(), dry.show)
            return 0
        inputs = {
            "unpoison": __version__,
            "verb": "demo",
            "seed": options.seed,
            "config": settings,
            "clip_fingerprint": surrogate.fingerprint,
        }
        run = begin(console, options, path, inputs)
        if run.folder is not None and not run.folder.finished:
            run_demo(settings, path, clip=surrogate, run=run)
            run.folder.finish()
        result = Purification.load(path / "purification.json")
        console.answer(to_json(result), lambda out: _show(out, result, path))
    return 0 if result.accepted else INCONCLUSIVE


def _plan(config: DemoConfig, clip: ZeroShotModel, run: Run) -> Plan:
    from unpoison.data.sources import open_images
    from unpoison.models.classifier import new_classifier
    from unpoison.planning import plan_demo, probe

    images = open_images(f"shapes:128:{run.seed}")
    classifier = new_classifier("small-resnet", images.class_names)
    rates = probe(images, clip, classifier, run=run)
    return plan_demo(config, len(images.class_names), classifier.image_size, rates)


def _show(out: rich.console.Console, result: Purification, path: Path) -> None:
    from unpoison.cli.tables import evaluation_table, verdict
    from unpoison.data.shapes import SHAPES_CLASSES
    from unpoison.outputs import model_folder

    if result.estimate is not None:
        total = result.clean_count + result.suspect_count
        out.print(verdict(result.estimate, total, SHAPES_CLASSES), style="bold")
    out.print("The repaired model is accepted." if result.accepted else "The repair is not accepted.", style="bold")
    out.print(result.reason)
    if result.before is not None and result.after is not None:
        out.print()
        out.print(evaluation_table({"before": result.before, "after": result.after}))
    out.print()
    out.print(f"Report: {path / 'report.html'}", soft_wrap=True)
    out.print("The same by hand:")
    data, manifest, victim = path / "poisoned/data.parquet", path / "poisoned/manifest.json", path / "victim"
    for line in (
        f"scan dataset {data}",
        f"purify cgd {victim} --data {data}",
        f"evaluate {path / model_folder(result)} --data shapes:{1500}:1 --manifest {manifest}",
    ):
        out.print(f"  unpoison {line}", soft_wrap=True)
