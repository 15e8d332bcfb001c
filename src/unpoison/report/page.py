"""What the page shows of one run, as plain values for the templates, and how each result says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from unpoison import __version__
from unpoison.clip_results import ClipPurification
from unpoison.model_results import ModelScan
from unpoison.report.rates import RateRow, excess_of
from unpoison.report.runs import ReportRun
from unpoison.report.text import duration, percent
from unpoison.report.views import Figure, ScanView, Verdict, facts
from unpoison.results import ClipEvaluation, DatasetScan, Evaluation, Purification
from unpoison.zero_shot_results import ZeroShotPurification


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something to do next; ``line`` is a shell command."""

    text: str
    line: str = ""


@dataclass(frozen=True, kw_only=True)
class Tile:
    value: str
    name: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluationView:
    name: str
    result: Evaluation | ClipEvaluation
    verdict: Verdict
    rows: list[RateRow]


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What the templates show of one run."""

    anchor: str
    kind: str
    run: ReportRun
    verdict: Verdict
    tiles: list[Tile]
    steps: list[Step]
    scan: ScanView | None
    rows: list[RateRow] = field(default_factory=list)
    rates: Figure | None = None
    history: list[Figure] = field(default_factory=list)
    evaluations: list[EvaluationView] = field(default_factory=list)
    tested: list[str]
    not_covered: list[str]
    warnings: list[str]
    provenance: list[tuple[str, list[tuple[str, str]]]]
    summary: dict[str, str]


def arrow(before: float | None, after: float | None) -> str:
    """``96.6 % → 0.3 %``; of what is not known nothing."""
    return " → ".join(percent(value) for value in (before, after) if value is not None)


def repair_summary(result: ClipPurification | ZeroShotPurification) -> dict[str, str]:
    """A CLIP's repair in the table of runs: what was found, accuracy (held-out where there is no test), excess ASR."""
    before, after = result.before, result.after
    return {
        "found": result.reason,
        "accuracy": arrow(
            before.c_acc.value if before else result.held_out_before,
            after.c_acc.value if after else result.held_out_after,
        ),
        "excess": arrow(
            excess_of(before) if before and before.asr else None, excess_of(after) if after and after.asr else None
        ),
    }


def provenance(
    run: ReportRun,
    result: DatasetScan
    | ModelScan
    | Purification
    | ClipPurification
    | ZeroShotPurification
    | Evaluation
    | ClipEvaluation,
    *,
    source: str | None = None,
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Captioned tables: the run, what it was given, its configuration, the content hashes of its inputs."""
    rows: list[tuple[str, object]] = [("folder or file", run.path), ("source", source)]
    if not isinstance(result, Evaluation | ClipEvaluation):
        method = result.weights.method if isinstance(result, ModelScan) else result.method
        rows += [("method", method or None), ("seed", result.seed)]
    if isinstance(result, ClipPurification | ZeroShotPurification):
        rows.append(("command", result.command or None))
    rows.append(("time taken", duration(result.seconds)))
    if run.finished_at is not None:
        rows.append(("finished", run.finished_at.strftime("%Y-%m-%d %H:%M UTC")))
    rows.append(("report by", f"unpoison {__version__}"))
    tables = [("Run", facts((name, value) for name, value in rows if value is not None))]
    if not isinstance(result, Evaluation | ClipEvaluation):
        tables.append(("Configuration", facts(result.config.items())))
    tables.append(("The command's inputs", facts(run.inputs.items())))
    if not isinstance(result, Evaluation | ClipEvaluation):
        tables.append(("Hashes and versions", facts(result.inputs.items())))
    return tables
