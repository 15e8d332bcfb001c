"""``unpoison evaluate`` of a CLIP: zero-shot accuracy, attack success, retrieval, drift, and rebound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from unpoison.cli.clip_options import Testing, Tests, open_tests
from unpoison.cli.options import Reading, Running

if TYPE_CHECKING:
    import rich.console

    from unpoison.cli.console import Console
    from unpoison.data.pairs import ImageTextPairs
    from unpoison.results import ClipEvaluation, Rebound
    from unpoison.runs import Run
    from unpoison.types import ImageTextModel

CLIP_ONLY = Group("CLIP models only", sort_key=20)
AGAIN = "evaluation-fine-tuned.json"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Compared:
    """What is measured of a CLIP alone."""

    retrieval: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE",
            group=CLIP_ONLY,
            show_default=False,
            help="Test pairs: R@1, R@5, R@10, and with --manifest retrieval ASR.",
        ),
    ] = None
    suspect: Annotated[
        str | None,
        Parameter(
            metavar="MODEL",
            group=CLIP_ONLY,
            show_default=False,
            help="The model that this one was made from: how far the embeddings moved.",
        ),
    ] = None
    rebound: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE",
            group=CLIP_ONLY,
            show_default=False,
            help="Clean pairs: measure again after an epoch of plain fine-tuning on them.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """All that the command names."""

    clip: ImageTextModel
    suspect: ImageTextModel | None
    later: ImageTextPairs | None
    tests: Tests


def evaluate(
    console: Console,
    model: str,
    data: str,
    manifest: Path | None,
    compared: Compared,
    reading: Reading,
    options: Running,
    output: Path | None,
) -> None:
    """Measure, store where asked to, and answer with the evaluation; with ``rebound`` with both."""
    from unpoison import __version__
    from unpoison.cli.running import begin, describe, run_without_folder, vars_of
    from unpoison.data.pairs import open_pairs
    from unpoison.models.clip_files import load_any_clip
    from unpoison.results import ClipEvaluation, Rebound

    testing = Testing(test=data, manifest=manifest, retrieval=compared.retrieval)
    tests = open_tests(testing, reading, limit=options.limit, seed=options.seed)
    later = None
    if compared.rebound is not None:
        later = open_pairs(compared.rebound, limit=options.limit, seed=options.seed)
    suspect = None if compared.suspect is None else load_any_clip(compared.suspect)
    opened = _Opened(clip=load_any_clip(model), suspect=suspect, later=later, tests=tests)
    if output is None:
        run = run_without_folder(console, options)
        result: ClipEvaluation | Rebound = _measure(opened, model, run)
    else:
        inputs = {
            "unpoison": __version__, "verb": "evaluate", "model": model, "model_fingerprint": opened.clip.fingerprint,
            **tests.inputs, "reading": {name: str(value) for name, value in vars_of(reading).items() if value},
            "suspect": compared.suspect, "suspect_fingerprint": suspect and suspect.fingerprint,
            "rebound": compared.rebound, "rebound_content": None if later is None else describe(later),
            "limit": options.limit, "seed": options.seed,
        }  # fmt: skip
        run = begin(console, options, output, inputs)
        if run.folder is not None and not run.folder.finished:
            found = _measure(opened, model, run)
            if run.accelerator.is_main_process:
                _save(found, output)
                run.folder.finish()
            run.accelerator.wait_for_everyone()
        kind, name = (ClipEvaluation, "evaluation.json") if later is None else (Rebound, "rebound.json")
        result = kind.load(output / name)
    if run.accelerator.is_main_process:
        from unpoison.storage import to_json

        console.answer(to_json(result), lambda out: _show(out, result, compared))


def _measure(opened: _Opened, model: str, run: Run) -> ClipEvaluation | Rebound:
    """Every process of several measures for itself; they fine-tune together."""
    from functools import partial

    from unpoison.api_clip import count_parameters, purify_with_fine_tuning
    from unpoison.defenses.baselines.fine_tuning import FineTuningConfig
    from unpoison.evaluation.clip import rebound
    from unpoison.results import ClipEvaluation

    def measure(clip: ImageTextModel, name: str) -> ClipEvaluation:
        found = opened.tests.evaluate(clip, run, name=name, suspect=opened.suspect)
        assert found is not None  # noqa: S101 - --data is required
        return found

    before = run.kept("given", ClipEvaluation, lambda: measure(opened.clip, model))
    if opened.later is None:
        return before

    def fine_tune(clip: ImageTextModel, pairs: ImageTextPairs) -> ImageTextModel:
        config = FineTuningConfig.scaled(parameters=count_parameters(clip), samples=len(pairs), epochs=1)
        outcome = purify_with_fine_tuning(clip, pairs, config=config, run=run)
        if outcome.purification.stopped:
            run.progress.log(f"fine-tuning: {outcome.purification.stopped}")
        return outcome.clip

    again = partial(measure, name=f"{model}, fine-tuned")
    return rebound(opened.clip, opened.later, fine_tune, evaluate=again, before=before)


def _save(found: ClipEvaluation | Rebound, output: Path) -> None:
    from unpoison.outputs import save_report
    from unpoison.results import Rebound
    from unpoison.storage import remove_partials

    before = found.before if isinstance(found, Rebound) else found
    before.save(output / "evaluation.json")
    if isinstance(found, Rebound):
        found.after.save(output / AGAIN)
        found.save(output / "rebound.json")
    save_report(output)
    for kept in (output / "steps").iterdir():  # large, and no longer needed
        kept.unlink()
    remove_partials(output, output / "steps")


def _show(out: rich.console.Console, result: ClipEvaluation | Rebound, compared: Compared) -> None:
    from unpoison.cli.console import printable
    from unpoison.cli.evaluate import show_notes
    from unpoison.cli.tables import evaluation_table
    from unpoison.results import Rebound

    if isinstance(result, Rebound):
        found = result.before
        out.print(evaluation_table({printable(found.model): found, "after fine-tuning": result.after}))
    else:
        found = result
        out.print(evaluation_table({printable(found.model): found}))
    for way, recall in (("image to text", found.image_to_text), ("text to image", found.text_to_image)):
        if recall is not None:
            out.print(
                f"{way}: R@1 {recall.at_1.value:.1f}, R@5 {recall.at_5.value:.1f}, R@10 {recall.at_10.value:.1f} %"
            )
    if found.drift is not None:
        drift = found.drift
        out.print(
            f"Mean cosine with {printable(compared.suspect or '')}: images {drift.image_raw:.3f}, texts "
            f"{drift.text_raw:.3f}; after the best rotation {drift.image_aligned:.3f} and {drift.text_aligned:.3f}."
        )
    if isinstance(result, Rebound) and result.asr_rise is not None:
        out.print(f"Fine-tuning on {printable(result.pairs)} changed the excess ASR by {result.asr_rise:+.1f} points.")
    show_notes(out, found)
