"""``unpoison scan dataset`` on image-caption pairs: which of them are suspicious?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unpoison.cli.options import Planned, Reading, run_path

if TYPE_CHECKING:
    import rich.console

    from unpoison.cli.console import Console
    from unpoison.results import DatasetScan, SampleScores

TOP = 10
_CAPTION_WIDTH = 60


def scan(
    console: Console,
    source: str,
    method: str | None,
    clip: str,
    reference: str | None,
    assumed_rate: float | None,
    config: Path | None,
    caption_column: str | None,
    reading: Reading,
    options: Planned,
    *,
    foreign: list[str],
) -> int:
    """``foreign``: options given that only labelled sets have."""
    from dataclasses import asdict

    from unpoison import __version__
    from unpoison.api_pairs import PAIR_DETECTORS, PairDetectorConfig, scan_pairs
    from unpoison.cli import FINDINGS, INCONCLUSIVE
    from unpoison.cli.running import DryRun, begin, describe, run_without_folder
    from unpoison.configs import make_config, merge, read_config
    from unpoison.data.pairs import open_pairs
    from unpoison.errors import UsageError
    from unpoison.models.clip_files import load_any_clip
    from unpoison.outputs import save_scan
    from unpoison.planning_pairs import plan_pair_scan
    from unpoison.results import DatasetScan, SampleScores, to_json

    if foreign:
        raise UsageError(
            f"{', '.join(foreign)} {'is' if len(foreign) == 1 else 'are'} for labelled images, not for pairs.",
            hint="Leave them away, or scan without --pairs and with a --method for labelled images.",
        )
    method = method or "dao"
    if method not in PAIR_DETECTORS:
        raise UsageError(
            f"{method} is for labelled images, not for pairs.", hint=f"Of pairs: --method {', '.join(PAIR_DETECTORS)}."
        )
    detector = PAIR_DETECTORS[method]
    if reference is not None and not detector.reference:
        raise UsageError(f"{method} asks no reference.", hint="Leave --reference away, or try --method density.")
    table = merge(read_config(config) if config is not None else {}, {"assumed_rate": assumed_rate})
    settings = make_config(PairDetectorConfig, table, where=str(config or "options"))
    how = {"image_column": reading.image_column, "caption_column": caption_column, "split": reading.split,
           "strict": reading.strict}  # fmt: skip
    pairs = open_pairs(source, limit=options.limit, seed=options.seed, **how)
    other = load_any_clip(reference or "tiny") if detector.reference else None
    suspect = other if other is not None and not detector.suspect else load_any_clip(clip)
    path = run_path(options.output, "scan", source)
    if options.dry_run:
        run = run_without_folder(console, options)
        dry = DryRun(plan=plan_pair_scan(pairs, detector, suspect, other, settings, run=run), folder=path)
        console.answer(dry.data(), dry.show)
        return 0
    inputs = {
        "unpoison": __version__,
        "verb": "scan dataset",
        "pairs": True,
        "source": pairs.name,
        "content": describe(pairs),
        "reading": {name: str(value) for name, value in how.items() if value},
        "method": method,
        "clip": clip if detector.suspect else None,
        "clip_fingerprint": suspect.fingerprint if detector.suspect else None,
        "reference": None if other is None else reference or "tiny",
        "reference_fingerprint": None if other is None else other.fingerprint,
        "config": asdict(settings),
        "limit": options.limit,
        "seed": options.seed,
    }
    run = begin(console, options, path, inputs)
    if run.folder is not None and not run.folder.finished:
        if detector.suspect and clip == "tiny":
            console.log(f"{method} looks for what training on these pairs left: name the CLIP trained on them (--clip)")
        outcome = scan_pairs(pairs, clip=suspect, reference=other, method=method, config=settings, run=run)
        save_scan(outcome.scan, outcome.scores, outcome.split, outcome.samples, path)
        run.folder.finish()
    found, scores = DatasetScan.load(path / "scan.json"), SampleScores.load(path / "scores.parquet")
    console.answer(to_json(found), lambda out: _show(out, found, scores, path))
    return FINDINGS if found.estimate.poisoned else INCONCLUSIVE


def _show(out: rich.console.Console, scan: DatasetScan, scores: SampleScores, path: Path) -> None:
    from unpoison.cli.console import printable
    from unpoison.cli.tables import skipped_lines, verdict

    out.print(verdict(scan.estimate, scan.samples, (), ranks_only=scan.ranks_only, what="pairs"), style="bold")
    out.print(printable(scan.estimate.reason))
    for warning in scan.warnings:
        out.print(printable(f"Warning: {warning}"), style="yellow")
    out.print()
    out.print(_suspects(scores, path))
    for line in skipped_lines(scan, path):
        out.print(line)
    out.print()
    out.print("Not covered: " + printable("; ".join(scan.not_covered)))
    out.print()
    out.print(f"Flagged: {scan.flagged:,} pairs, listed in {path / 'split.parquet'}")
    out.print(f"Report: {path / 'report.html'}")


def _suspects(scores: SampleScores, path: Path) -> Any:
    """The most suspicious pairs with their captions, as the report has them."""
    from unpoison.cli.console import printable
    from unpoison.cli.tables import plain_table
    from unpoison.report.runs import read_run
    from unpoison.report.text import shortened

    places = {name: row for row, name in enumerate(scores.ids)}
    table = plain_table("most suspicious", scores.primary, "caption", right=(scores.primary,))
    samples = [sample for sample in read_run(path).samples if sample.region != "clean" and sample.id in places]
    for sample in sorted(samples, key=lambda sample: -sample.suspicion)[:TOP]:
        value = f"{scores.suspicion[places[sample.id]]:.3f}"
        table.add_row(printable(sample.id), value, printable(shortened(sample.caption or "", _CAPTION_WIDTH)))
    return table
