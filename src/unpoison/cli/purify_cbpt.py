"""``unpoison purify cbpt``, ``rvpt`` and ``linear-probe``: purify a CLIP's zero-shot classifier, not its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from unpoison.cli.clip_options import Testing
from unpoison.cli.options import METHOD, Planned, Reading, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.cli.clip_options import Tests
    from unpoison.data.sources import LabelledImages
    from unpoison.runs import Run
    from unpoison.zero_shot_results import ZeroShotPurification


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions:
    """What all of them can be told."""

    data: Annotated[
        str,
        Parameter(
            metavar="SOURCE",
            help="Clean labelled images, a few of each class; their class names make the classifier.",
        ),
    ]
    shots: Annotated[
        int | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Images of a class to learn from; at most 64 others judge. [default: 16]",
        ),
    ] = None
    bound: Annotated[
        float | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Largest fall of held-out accuracy, in points, that is accepted. [default: 1.5]",
        ),
    ] = None
    config: Annotated[
        Path | None, Parameter(group=METHOD, show_default=False, help="TOML file with any keys of the method's config.")
    ] = None
    testing: Testing = Testing()
    reading: Reading = Reading()
    running: Planned = Planned()


def cbpt(
    model: str,
    /,
    *,
    target: Annotated[
        str | None,
        Parameter(
            metavar="CLASS",
            group=METHOD,
            show_default=False,
            help="The class that the backdoor leads to, where that is known. [default: it is looked for]",
        ),
    ] = None,
    paper: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="The plain reading of the paper: token prompts before each name, one contrastive dummy, SGD.",
        ),
    ] = False,
    asked: ZeroShotOptions,
) -> int:
    """Purify a backdoored CLIP's zero-shot classifier: invert a trigger, move the classes away from it.

    The weights stay as they are: only the classifier in classifier.safetensors is protected; retrieval and other class
    lists stay as attackable as before. Where no trigger is found the classifier is the model's own.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    return _run_purification("cbpt", model, asked, paper=paper, more={"target": target})


def rvpt(
    model: str,
    /,
    *,
    asked: ZeroShotOptions,
) -> int:
    """Baseline of cbpt: learn repulsive visual prompts inside the frozen image tower, which must be a ViT.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    return _run_purification("rvpt", model, asked)


def linear_probe(
    model: str,
    /,
    *,
    asked: ZeroShotOptions,
) -> int:
    """Baseline of cbpt: logistic regression on the embeddings of a few images.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    return _run_purification("linear-probe", model, asked)


def _run_purification(
    verb: str,
    model: str,
    asked: ZeroShotOptions,
    *,
    paper: bool = False,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """``more``: what else the method's function is told, by its own names."""
    from unpoison.cli import INCONCLUSIVE
    from unpoison.cli.clip_options import open_tests
    from unpoison.cli.console import Console

    testing, reading, options = asked.testing, asked.reading, asked.running
    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.cli.running import (
            DryRun,
            begin,
            open_source,
            repeated_command,
            run_inputs,
            run_without_folder,
            vars_of,
        )
        from unpoison.models.clip_files import load_any_clip
        from unpoison.storage import to_json

        tests = open_tests(testing)
        clip = load_any_clip(model)
        images = open_source(asked.data, reading, limit=options.limit, seed=options.seed)
        config = _config(verb, asked, paper=paper)
        path = run_path(options.output, f"purify-{verb}", model)
        if options.dry_run:
            from unpoison.planning_zero_shot import plan_zero_shot

            run = run_without_folder(console, options)
            plan = plan_zero_shot(clip, images, config, target=more.get("target"), run=run, tested=tests.encoded)
            dry = DryRun(plan=plan, folder=path)
            console.answer(dry.data(), dry.show)
            return 0
        inputs = run_inputs(
            f"purify {verb}", images, reading, options, model=model, model_fingerprint=clip.fingerprint,
            config=vars_of(config), **more, **tests.inputs,
        )  # fmt: skip
        run = begin(console, options, path, inputs)
        given = {"data": asked.data, "paper": paper, "shots": asked.shots, "bound": asked.bound, "config": asked.config}
        command = repeated_command(
            verb, model, given, dict(more), vars_of(testing), vars_of(reading),
            {"seed": options.seed, "limit": options.limit, "output": path},
        )  # fmt: skip
        result = _purify(verb, clip, images, config, more, tests, run, path, model, command)
        console.answer(to_json(result), lambda out: _show(out, result, path))
    return 0 if result.accepted else INCONCLUSIVE


def _config(verb: str, asked: ZeroShotOptions, *, paper: bool) -> Any:
    """The defaults (or the paper's reading), then the file's keys, then the options."""
    from dataclasses import asdict

    from unpoison.catalog import DEFENSES, find, resolve
    from unpoison.configs import make_config, merge, read_config

    kind = resolve(find(verb, DEFENSES).config)
    given = read_config(asked.config) if asked.config is not None else {}
    table = merge(given, {"shots": asked.shots, "bound": asked.bound})
    start = asdict(kind.as_published()) if paper else {}
    return make_config(kind, merge(start, table), where=str(asked.config or "options"))


def _purify(
    verb: str,
    clip: Any,
    images: LabelledImages,
    config: Any,
    more: Mapping[str, Any],
    tests: Tests,
    run: Run,
    path: Path,
    model: str,
    command: str,
) -> ZeroShotPurification:
    from dataclasses import replace

    from unpoison.catalog import DEFENSES, find, resolve
    from unpoison.outputs_zero_shot import classifier_file, save_zero_shot
    from unpoison.zero_shot_results import ZeroShotPurification

    folder = run.folder
    if folder is not None and not folder.finished:
        before = tests.evaluate(clip, run, name=model)
        outcome = resolve(find(verb, DEFENSES).function)(clip, images, config=config, run=run, **more)
        result, classifier = outcome.purification, outcome.classifier
        after = tests.evaluate(
            classifier.clip, run, name=str(path / classifier_file(result)), classes=classifier.classes_of(tests.images)
        )
        save_zero_shot(replace(result, command=command, before=before, after=after), classifier, path)
        folder.finish()
    return ZeroShotPurification.load(path / "purification.json")


def _show(out: rich.console.Console, result: ZeroShotPurification, path: Path) -> None:
    from unpoison.cli.console import printable
    from unpoison.cli.tables import show_judgement
    from unpoison.outputs_zero_shot import classifier_file

    verdict = "Accepted." if result.accepted else "Not accepted."
    out.print("Nothing suspicious was found." if result.left_alone else verdict, style="bold")
    out.print(printable(result.reason))
    show_judgement(out, result, "classifier")
    out.print(f"Classifier: {path / classifier_file(result)}")
    out.print(f"Report: {path / 'report.html'}")
