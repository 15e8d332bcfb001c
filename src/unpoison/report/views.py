"""What a report says about a run: the verdict in words, the rates and the figures, as plain values for templates."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from unpoison.report import charts
from unpoison.report.charts import ClassCount
from unpoison.report.rates import RateRow, excess_of
from unpoison.report.runs import ReportRun, ReportSample
from unpoison.report.text import counted, interval, percent, shortened
from unpoison.results import CLEAN, MIXED, SUSPECT, ClipEvaluation, Evaluation, PoisonEstimate, Purification, SkippedRow

SHOWN_SKIPPED = 50
AXIS_WORDS = {
    "joint_rank": "both: the smaller of the two ranks",
    "clip_rank": "CLIP disagrees with the label (rank)",
    "early_rank": "learnt early (rank)",
    "mean_rank": "mean of the two ranks",
    "own_loss": "the model's own loss",
    "activation_clustering": "nearer to the smaller cluster of its label",
    "spectral_signature": "along its label's direction of largest variance",
    "strip": "keeps its label under other images (minus entropy)",
    "ibd_psc": "keeps its label when weights are scaled",
    "mean_of_ranks": "mean of the ranks below",
    "dao": "far from its neighbours, by local dimension (DAO)",
    "slof": "far from its neighbours (SLOF)",
    "k_distance": "distance to the k-th neighbour",
    "density": "alike among the least similar pairs",
    "low_similarity": "minus the cosine of image and caption",
}
NOT_PROOF = "This does not prove the data clean."


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``tone`` is alert, ok or caution; the sentence stands alone, ``detail`` gives the reason."""

    tone: str
    word: str
    sentence: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart and the words below it."""

    svg: Markup
    caption: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One example image with its label, or with its caption.

    ``key`` is the exact id as ASCII JSON, since HTML attributes do not keep every character.
    """

    id: str
    key: str
    label: str
    caption: str | None
    clip_label: str | None
    region: str
    clip_rank: float | None
    early_rank: float | None
    score: float | None
    suspicion: float
    picture: str


@dataclass(frozen=True, kw_only=True)
class ScanView:
    """The separation of a data set: from a scan, or as the first half of a purification."""

    total: int
    usable: int
    flagged: int
    mixed: int
    skipped: tuple[SkippedRow, ...]
    classes: list[ClassCount]
    targets: tuple[str, ...]
    evidence: dict[str, float]
    class_figure: Figure | None
    plane: Figure | None
    histograms: list[Figure]
    suspects: list[Card]
    comparison: list[Card]
    poisoned: bool | None
    captioned: bool = False


# ---- verdicts


def scan_verdict(
    estimate: PoisonEstimate,
    usable: int,
    class_names: tuple[str, ...],
    *,
    weak_clip: bool = False,
    ranks_only: bool = False,
) -> Verdict:
    """``weak_clip``: CLIP knows these classes hardly better than chance, so finding nothing means nothing.

    ``ranks_only``: the method decides nothing.
    """
    if ranks_only and not estimate.poisoned:
        return Verdict(
            tone="caution",
            word="Ranked only",
            sentence="Inconclusive: this method ranks samples by suspicion; it does not say whether a set is poisoned.",
            detail=estimate.reason,
        )
    if not estimate.poisoned and weak_clip:
        return Verdict(
            tone="caution",
            word="Inconclusive",
            sentence="Inconclusive: nothing was found, but this CLIP hardly knows the classes. Scan with a better one.",
            detail=estimate.reason,
        )
    if not estimate.poisoned and estimate.odd_labels:
        return Verdict(
            tone="caution",
            word="Inconclusive",
            sentence=f"Inconclusive: {_some_labels(named(estimate.odd_labels, class_names))} odd. "
            "Poisoned labels look like this, and so do classes whose name this CLIP does not know: look at the images.",
            detail=estimate.reason,
        )
    if not estimate.poisoned:
        return Verdict(
            tone="ok",
            word="Nothing found",
            sentence=f"No evidence of poisoning was found. {NOT_PROOF}",
            detail=estimate.reason,
        )
    share = f"{percent(100 * estimate.rate)} ({100 * estimate.rate_low:.1f} to {percent(100 * estimate.rate_high)})"
    return Verdict(
        tone="alert",
        word="Poisoning found",
        sentence=f"Evidence of poisoning: about {share} of {counted(usable, 'image')}"
        f"{toward(targets(estimate, class_names))}",
        detail=estimate.reason,
    )


def targets(estimate: PoisonEstimate, class_names: tuple[str, ...]) -> tuple[str, ...]:
    return named(estimate.target_labels, class_names)


def named(labels: tuple[int, ...], class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of labels; one outside the list keeps its number."""
    return tuple(class_names[label] if 0 <= label < len(class_names) else str(label) for label in labels)


def _some_labels(names: tuple[str, ...]) -> str:
    if len(names) > 3:
        return f"{len(names)} labels look"
    shown = " and ".join(f"'{shortened(name, 60)}'" for name in names)
    return f"label {shown} looks" if len(names) == 1 else f"labels {shown} look"


def toward(names: tuple[str, ...]) -> str:
    if not names:
        return ", toward no single class"
    if len(names) > 3:
        return f", toward {len(names)} classes"
    return ", toward " + " and ".join(f"'{shortened(name, 60)}'" for name in names)


def purification_verdict(result: Purification) -> Verdict:
    before, after = result.before, result.after
    if not result.accepted:
        return Verdict(
            tone="alert",
            word="Not accepted",
            sentence="Not accepted: do not rely on this purified model.",
            detail=result.reason,
        )
    if result.steps == 0:
        sentence = "Accepted: the model was left as it was, for no training step was taken."
    elif before and after and before.asr_excess is not None and after.asr_excess is not None:
        sentence = (
            f"Accepted: the attack's success above chance went from {percent(before.asr_excess)} to "
            f"{percent(after.asr_excess)}, clean accuracy from {percent(before.c_acc.value)} to "
            f"{percent(after.c_acc.value)}."
        )
    elif before and after:
        sentence = (
            f"Accepted: clean accuracy went from {percent(before.c_acc.value)} to {percent(after.c_acc.value)}; "
            "no attack was tested."
        )
    else:
        sentence = (
            f"Accepted: accuracy on held-out images went from {percent(result.held_out_before)} to "
            f"{percent(result.held_out_after)}; no attack was tested."
        )
    return Verdict(tone="ok", word="Accepted", sentence=sentence, detail=result.reason)


def evaluation_verdict(result: Evaluation | ClipEvaluation) -> Verdict:
    accuracy = f"{percent(result.c_acc.value)} ({interval(result.c_acc)} %) of {counted(result.c_acc.n, 'clean image')}"
    if result.asr is None:
        return Verdict(
            tone="caution",
            word="No attack tested",
            sentence=f"The model is right on {accuracy}. No trigger was tested.",
        )
    excess = excess_of(result)
    floor = "" if result.asr_floor is None else f", {percent(result.asr_floor.value)} without it"
    goal = f"to '{shortened(result.target, 60)}'" if result.target else "to the attack's label"
    return Verdict(
        tone="alert" if excess > 1 else "ok",
        word="Backdoor works" if excess > 1 else "Backdoor does not work",
        sentence=f"The model is right on {accuracy}; with the trigger {percent(result.asr.value)} go {goal}{floor}.",
    )


def rates_figure(rows: list[RateRow]) -> Figure:
    measured = [(row.name, row.before, row.after) for row in rows if row.before or row.after]
    return Figure(
        svg=Markup(charts.rates_chart(measured)),  # noqa: S704 - charts escape all text and keep known elements only
        caption="Before and after, with 95 % Wilson intervals (narrow ones hide behind their dot).",
    )


# ---- the separation


def scan_view(run: ReportRun) -> ScanView | None:
    """None for runs that separated nothing."""
    scan, split, scores = run.scan, run.split, run.scores
    estimate = _estimate(run)
    if scan is None and split is None and scores is None:
        return None
    table = split or scores
    class_names = scan.class_names if scan else table.class_names if table else ()
    skipped = scan.skipped if scan else scores.skipped if scores else ()
    region = None if split is None else split.region
    classes = _class_counts(run, class_names)
    total = scan.samples if scan else len(table.ids) if table else 0
    flagged = scan.flagged if scan else int((region == SUSPECT).sum()) if region is not None else 0
    # Rows that could not be opened at all are in `skipped`, not in the tables.
    known = len(table.ids) if table else total
    usable = int((region >= CLEAN).sum()) if region is not None else max(known - len(skipped), 0)
    cards = [_card(sample) for sample in sorted(run.samples, key=lambda sample: -sample.suspicion)]
    suspects = [card for card in cards if card.region != "clean"]
    return ScanView(
        total=total,
        usable=usable,
        flagged=flagged,
        mixed=int((region == MIXED).sum()) if region is not None else 0,
        skipped=skipped,
        classes=classes,
        targets=targets(estimate, class_names) if estimate and estimate.poisoned else (),
        evidence=estimate.evidence if estimate else {},
        class_figure=_class_figure(classes) if any(entry.flagged for entry in classes) else None,
        plane=_plane(run),
        histograms=_histograms(run, class_names),
        suspects=suspects or cards,
        comparison=[card for card in cards if card.region == "clean"] if suspects else [],
        poisoned=estimate.poisoned if estimate else None,
        captioned=scan is not None and scan.captioned,
    )


def _estimate(run: ReportRun) -> PoisonEstimate | None:
    if run.scan is not None:
        return run.scan.estimate
    if run.purification is not None and run.purification.estimate is not None:
        return run.purification.estimate
    return run.split.estimate if run.split else None


def _class_counts(run: ReportRun, class_names: tuple[str, ...]) -> list[ClassCount]:
    """From the split where there is one; else the scan's own counts, with class sizes from the scores if given."""
    table = run.split or run.scores
    size = np.zeros(len(class_names), np.int64)
    flagged = np.zeros(len(class_names), np.int64)
    if table is not None:
        known = (table.labels >= 0) & (table.labels < len(class_names))
        if run.split is not None:
            known &= run.split.region >= CLEAN
        size = np.bincount(table.labels[known], minlength=len(class_names))
    if run.split is not None:
        suspect = run.split.suspect
        labels = run.split.labels[suspect]
        flagged = np.bincount(labels[(labels >= 0) & (labels < len(class_names))], minlength=len(class_names))
    elif run.scan is not None:
        flagged = np.array([run.scan.flagged_per_class.get(name, 0) for name in class_names], np.int64)
    spread = size / max(int(size.sum()), 1) * int(flagged.sum())
    return [
        ClassCount(name=name, size=int(size[at]), flagged=int(flagged[at]), expected=float(spread[at]))
        for at, name in enumerate(class_names)
    ]


def _class_figure(classes: list[ClassCount]) -> Figure:
    return Figure(
        svg=Markup(charts.class_chart(classes)),  # noqa: S704
        caption="Flagged images by given label. The upright tick shows where a class would stand if the flagged "
        "images were spread evenly over the data; orange marks more than twice that.",
    )


def _plane(run: ReportRun) -> Figure | None:
    if run.scores is None or not {"clip_rank", "early_rank"} <= run.scores.axes.keys():
        return None
    axes = run.scores.axes
    region = run.split.region if run.split is not None else np.zeros(len(run.scores.ids), np.int8)
    if region.shape != axes["clip_rank"].shape:
        return None
    borders = _borders(run, region)
    told = "" if borders is None else "Inside the dashed line images count as clean, beyond the solid line as suspect. "
    return Figure(
        svg=Markup(charts.plane_chart(axes["clip_rank"], axes["early_rank"], region, borders=borders)),  # noqa: S704
        caption="Each cell shows how many images lie there. Blue: clean. Gray: mixed, left out. Orange: suspect. "
        f"{told}Hard images lie to the right and low (CLIP errs, learnt late); poisoned ones gather at the top.",
    )


def _borders(run: ReportRun, region: Any) -> tuple[float, float] | None:
    """The paper's fixed borders, when the regions were cut there and not by the evidence."""
    config = run.scan.config if run.scan else run.purification.config if run.purification else {}
    clean, suspect = config.get("sigma1"), config.get("sigma2")
    if not isinstance(clean, float) or not isinstance(suspect, float) or not (region == SUSPECT).any():
        return None
    return (1 - clean, 1 - suspect) if config.get("regions") == "published" else None


def _histograms(run: ReportRun, class_names: tuple[str, ...]) -> list[Figure]:
    """Each axis: images of the target label (or, without one, the flagged ones) against the rest."""
    if run.scores is None:
        return []
    estimate = _estimate(run)
    labels = () if estimate is None else estimate.target_labels if estimate.poisoned else estimate.odd_labels
    if 1 <= len(labels) <= 3:
        chosen = np.isin(run.scores.labels, labels)
        name = "labelled " + " or ".join(named(labels, class_names))
        rest = "other labels"
    elif run.split is not None and len(run.split.suspect) and run.split.region.shape == run.scores.labels.shape:
        chosen, name, rest = run.split.region == SUSPECT, "flagged", "not flagged"
    else:
        return []
    return [
        Figure(
            svg=Markup(  # noqa: S704
                charts.histogram_chart(
                    values, chosen, title=AXIS_WORDS.get(axis, axis), chosen_name=name, rest_name=rest
                )
            ),
            caption=f"Score {axis}: higher is more suspicious. Each outline sums to 100 %.",
        )
        for axis, values in _ranked_axes(run.scores.axes)
    ]


def _ranked_axes(axes: dict[str, Any]) -> list[tuple[str, Any]]:
    """CGD's ranks, leaving out the losses behind them; of other methods the first three axes."""
    known = [(name, axes[name]) for name in AXIS_WORDS if name in axes]
    return known or list(axes.items())[:3]


def _card(sample: ReportSample) -> Card:
    return Card(
        id=sample.id,
        key=json.dumps(sample.id),
        label=sample.label,
        caption=sample.caption,
        clip_label=sample.clip_label,
        region=sample.region,
        clip_rank=sample.clip_rank,
        early_rank=sample.early_rank,
        score=sample.score,
        suspicion=sample.suspicion,
        picture=f"data:image/png;base64,{base64.b64encode(sample.thumbnail).decode()}",
    )


# ---- the rest


def facts(values: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Name and value as text, nested values as JSON."""
    return [(name, value if isinstance(value, str) else json.dumps(value, default=str)) for name, value in values]


def command(*words: str) -> str:
    """A shell command with every word quoted where it needs to be."""
    return " ".join(shlex.quote(word) for word in words)
