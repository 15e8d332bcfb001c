"""One offline HTML file about runs: it loads nothing from elsewhere, and no string of the data becomes markup."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unpoison import __version__
from unpoison.detection.measured import say_measured
from unpoison.errors import UsageError
from unpoison.report import charts
from unpoison.report.clip_views import clip_view, drift_rows, trigger_pictures
from unpoison.report.frontier import frontier
from unpoison.report.model_views import model_view, trigger_picture
from unpoison.report.page import EvaluationView, RunView, Step, Tile, arrow, provenance
from unpoison.report.rates import excess_of, rate_rows, retrieval_rows
from unpoison.report.runs import ReportRun
from unpoison.report.text import count, counted, duration, interval, percent, plain, purity_sentence, shortened, tied
from unpoison.report.views import (
    SHOWN_SKIPPED,
    Figure,
    ScanView,
    command,
    evaluation_verdict,
    purification_verdict,
    rates_figure,
    scan_verdict,
    scan_view,
)
from unpoison.report.zero_shot_view import dummy_pictures, zero_shot_view
from unpoison.results import ClipEvaluation, DatasetScan, write_atomically


def write_report(path: Path, runs: Sequence[ReportRun]) -> None:
    """Write the report of ``runs`` (at least one) to ``path``, whole or not at all.

    Raises UsageError when there is no run or the file cannot be written.
    """
    page = render_report(runs).encode("utf-8")
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UsageError(
            f"{path}: the report cannot be written ({error.strerror}).", hint="Choose another file with -o."
        ) from error


def render_report(runs: Sequence[ReportRun]) -> str:
    """The whole page as text. Raises UsageError when there is no run."""
    if not runs:
        raise UsageError(
            "A report needs at least one run.", hint="Name a run folder: unpoison report RUN -o report.html"
        )
    environment = make_environment()
    views = [_run_view(run, f"run-{at}") for at, run in enumerate(runs, start=1)]
    script = asset(environment, "marks.js") if any(run.samples for run in runs) else ""
    return environment.get_template("report.html.j2").render(
        views=views,
        frontier=frontier(runs),
        title=views[0].verdict.sentence if len(views) == 1 else f"Report on {len(views)} runs",
        version=__version__,
        style=Markup(asset(environment, "style.css")),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        policy=content_policy(script),
    )


def content_policy(script: str) -> str:
    """Content-Security-Policy: nothing from outside; the one script is named by its hash."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    return f"default-src 'none'; {scripts}img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def make_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("unpoison.report"),
        autoescape=True,
        undefined=StrictUndefined,
        # Every string is made printable here and escaped right after; markup of our own is left alone.
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else plain(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "counted": counted,
        "drift_rows": drift_rows,
        "dummy_pictures": dummy_pictures,
        "say_measured": say_measured,
        "trigger_picture": trigger_picture,
        "trigger_pictures": trigger_pictures,
        "duration": duration,
        "interval": interval,
        "percent": percent,
        "shortened": shortened,
        "tied": tied,
    }
    environment.globals["shown_skipped"] = SHOWN_SKIPPED
    return environment


def asset(environment: Environment, name: str) -> str:
    if environment.loader is None:
        raise RuntimeError("the report's environment has no loader")
    return environment.loader.get_source(environment, name)[0]


def _run_view(run: ReportRun, anchor: str) -> RunView:
    if run.purification is not None:
        return _purification_view(run, anchor)
    if run.clip is not None:
        return clip_view(run, run.clip, anchor)
    if run.zero_shot is not None:
        return zero_shot_view(run, run.zero_shot, anchor)
    if run.model_scan is not None:
        return model_view(run, run.model_scan, anchor)
    if run.scan is not None:
        return _dataset_view(run, run.scan, anchor)
    return _evaluation_view(run, anchor)


def _dataset_view(run: ReportRun, scan: DatasetScan, anchor: str) -> RunView:
    separation = scan_view(run)
    usable = separation.usable if separation else scan.samples
    agreement = []
    if scan.clip_agreement is not None:
        note = f"{percent(scan.chance_agreement)} by chance"
        agreement = [Tile(value=percent(scan.clip_agreement), name="CLIP agrees with the label", note=note)]
    return RunView(
        anchor=anchor,
        kind="Scan of pairs" if scan.captioned else "Data set scan",
        run=run,
        verdict=scan_verdict(
            scan.estimate, usable, scan.class_names, weak_clip=scan.weak_clip, ranks_only=scan.ranks_only
        ),
        tiles=[*_scan_tiles(separation), *agreement] if separation else agreement,
        steps=_scan_steps(run, scan),
        scan=separation,
        evaluations=_evaluation_views(run),
        tested=[
            f"{counted(usable, 'usable image')} of {scan.source} with their captions."
            if scan.captioned
            else f"{counted(usable, 'usable image')} of {scan.source} with their given labels, "
            f"in {counted(len(scan.class_names), 'class', 'classes')}.",
            f"Whether CLIP ({scan.clip}) disagrees with a label, and whether a small network learns an image "
            "suspiciously early."
            if scan.method.lower().startswith("cgd")
            else f"Every image was scored by the method {scan.method}.",
        ],
        not_covered=list(scan.not_covered),
        warnings=[*scan.warnings, *run.notes],
        provenance=provenance(run, scan, source=scan.source),
        summary={
            "found": scan.estimate.reason,
            "flagged": f"{count(scan.flagged)} of {count(usable)}",
        },
    )


def _scan_tiles(view: ScanView) -> list[Tile]:
    tiles = [
        Tile(value=count(view.usable), name="usable images", note=f"of {count(view.usable + len(view.skipped))}"),
        Tile(
            value=count(view.flagged),
            name="flagged as suspect",
            note=f"{percent(100 * view.flagged / max(view.usable, 1))} of the usable images",
        ),
    ]
    if view.mixed:
        note = "in doubt: kept by keep, not trained on by purify"
        tiles.append(Tile(value=count(view.mixed), name="mixed", note=note))
    note = "listed below with reasons" if view.skipped else "every image could be read"
    tiles.append(Tile(value=count(len(view.skipped)), name="skipped", note=note))
    return tiles


def _scan_steps(run: ReportRun, scan: DatasetScan) -> list[Step]:
    if scan.captioned:
        return _pair_steps(run)
    purify = command("unpoison", "purify", "cgd", "MODEL", "--data", scan.source, "-o", "purified")
    if not scan.estimate.poisoned and scan.estimate.odd_labels:
        return [
            Step(text="Look at the images of the odd labels below. Do they show what their label says?"),
            Step(text="If they do, CLIP does not know the name: scan with other class names or a larger CLIP."),
            Step(text="If they do not, repair a classifier that was trained on them:", line=purify),
        ]  # fmt: skip
    if not scan.estimate.poisoned:
        return [
            Step(text="Nothing has to be removed on this evidence. Look at the most suspicious images all the same."),
            Step(text="A classifier from elsewhere can be tested on data with a known trigger manifest:",
                 line="unpoison evaluate MODEL --data TEST_DATA --manifest MANIFEST"),
        ]  # fmt: skip
    keep = command("unpoison", "keep", run.path, "-o", "clean.parquet")
    steps = [
        Step(text="Look at the suspects below, so that you know what you drop."),
        Step(text="Write a copy without the suspects; the original stays as it is:", line=keep),
        Step(text="Repair a classifier that was trained on these data:", line=purify),
    ]
    if run.samples:
        marked = command("unpoison", "keep", run.path, "--decisions", "decisions.json", "-o", "clean.parquet")
        steps.insert(2, Step(text="Or mark images below, save your decisions, and let them count:", line=marked))
    return steps


def _pair_steps(run: ReportRun) -> list[Step]:
    keep = command("unpoison", "keep", run.path, "--decisions", "decisions.json", "-o", "clean.parquet")
    return [
        Step(text="Look at the pairs below. Do captions fit their images? Do odd ones share a pattern, or a word?"),
        Step(text="If so, mark what stays and what goes, save your decisions, and write a copy without the rest:",
             line=keep),
        Step(text="Repair a CLIP that was trained on these pairs, with other pairs that are clean:",
             line="unpoison purify par MODEL --pairs CLEAN_PAIRS -o purified"),
    ]  # fmt: skip


def _purification_view(run: ReportRun, anchor: str) -> RunView:
    result = run.purification
    if result is None:
        raise RuntimeError("not a purification run")
    separation = scan_view(run)
    rows = rate_rows(result.before, result.after)
    tiles = [
        Tile(
            value=percent(result.held_out_after),
            name="held-out accuracy after",
            note=f"{percent(result.held_out_before)} before",
        ),
        Tile(value=count(result.suspect_count), name="images counted as suspect"),
        Tile(value=count(result.clean_count), name="images trained on as clean"),
        Tile(value=count(result.steps), name="training steps", note=duration(result.seconds)),
    ]
    after = result.after or result.before
    tested = [
        f"Accuracy on held-out images of the training data; a fall of at most {result.bound:g} points is accepted."
    ]
    if after and after.asr:
        tested.append(f"The attack {after.attack or 'of the manifest'} on {counted(after.asr.n, 'test image')}.")
    else:
        tested.append("No attack: without a trigger manifest the success of a backdoor cannot be measured.")
    if result.purity:
        tested.append(purity_sentence(result.purity))
    return RunView(
        anchor=anchor,
        kind="Purification",
        run=run,
        verdict=purification_verdict(result),
        tiles=tiles,
        steps=_purification_steps(run, result.accepted, separation),
        scan=separation,
        rows=rows,
        rates=rates_figure(rows) if rows else None,
        history=[
            Figure(svg=Markup(svg), caption="")  # noqa: S704 - charts escape all text
            for _, svg in charts.history_charts(result.history)
        ],
        evaluations=_evaluation_views(run),
        tested=tested,
        not_covered=list(result.not_covered) + list(run.scan.not_covered if run.scan else ()),
        warnings=[*(run.scan.warnings if run.scan else ()), *result.warnings, *run.notes],
        provenance=provenance(run, result),
        summary={
            "found": result.reason,
            "flagged": count(result.suspect_count),
            "accuracy": arrow(
                result.before.c_acc.value if result.before else result.held_out_before,
                result.after.c_acc.value if result.after else result.held_out_after,
            ),
            "excess": arrow(
                excess_of(result.before) if result.before and result.before.asr else None,
                excess_of(result.after) if result.after and result.after.asr else None,
            ),
        },
    )


def _purification_steps(run: ReportRun, accepted: bool, separation: ScanView | None) -> list[Step]:
    model = str(Path(run.path) / "model")
    test = Step(
        text="Test the model on images that it was not trained on:",
        line=command("unpoison", "evaluate", model, "--data", "TEST_DATA"),
    )
    keep = Step(
        text="Or train anew, on a copy of the data without the suspects:",
        line=command("unpoison", "keep", run.path, "-o", "clean.parquet"),
    )
    if accepted and run.purification is not None and run.purification.clipped_sites:
        use = (
            f"Use the purified model in {model} with unpoison.load_classifier: it clips activations, nothing else does."
        )
        steps = [Step(text=use), test]
    elif accepted:
        steps = [Step(text=f"Use the purified model in {model}; it loads wherever the original did."), test]
    else:
        steps = [Step(text="Keep the original model out of use: it was found suspicious and could not be repaired.")]
    return [*steps, keep] if separation is not None and separation.flagged else steps


def _evaluation_views(run: ReportRun) -> list[EvaluationView]:
    return [
        EvaluationView(
            name=name,
            result=result,
            verdict=evaluation_verdict(result),
            rows=rate_rows(result, None) + (retrieval_rows(result, None) if isinstance(result, ClipEvaluation) else []),
        )
        for name, result in run.evaluations.items()
    ]


def _evaluation_view(run: ReportRun, anchor: str) -> RunView:
    views = _evaluation_views(run)
    if not views:
        raise UsageError(f"{run.name} holds no result to report.", hint="Read it with read_run(folder).")
    first = views[0].result
    tiles = [Tile(value=percent(first.c_acc.value), name="clean accuracy", note=f"n = {count(first.c_acc.n)}")]
    if first.asr is not None:
        tiles += [
            Tile(value=percent(first.asr.value), name="attack success (ASR)", note=f"n = {count(first.asr.n)}"),
            Tile(value=percent(excess_of(first)), name="excess ASR", note="above the natural floor"),
        ]
    tiles.append(Tile(value=count(len(first.skipped)), name="skipped"))
    untested = "No trigger was tested: a backdoor with a trigger that is not known here would not show."
    return RunView(
        anchor=anchor,
        kind="Evaluation",
        run=run,
        verdict=views[0].verdict,
        tiles=tiles,
        steps=[],
        scan=None,
        evaluations=views,
        tested=[f"{view.result.model} on {view.result.data}." for view in views],
        not_covered=[untested if first.asr is None else "Other triggers than the one of the manifest."],
        warnings=list(run.notes),
        provenance=provenance(run, first),
        summary={
            "found": f"attack {first.attack}" if first.attack else "no attack tested",
            "accuracy": percent(first.c_acc.value),
            "excess": percent(excess_of(first)) if first.asr else "",
        },
    )
