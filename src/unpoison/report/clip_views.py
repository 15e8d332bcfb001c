"""What a report says about the repair of a CLIP: the verdict in words, the rates, the curves of its training."""

from __future__ import annotations

import base64
from pathlib import Path

from markupsafe import Markup

from unpoison.clip_results import ClipPurification, FoundTrigger, PairExposure, TriggerFinding
from unpoison.report import charts
from unpoison.report.page import RunView, Step, Tile, provenance, repair_summary
from unpoison.report.rates import excess_of, rate_rows, retrieval_rows
from unpoison.report.runs import ReportRun, redraw_picture
from unpoison.report.text import count, counted, duration, percent
from unpoison.report.views import Figure, Verdict, command, rates_figure
from unpoison.results import Drift

_PICTURES = 3
_WORDS = 4
_CURVES = {
    "held_out_accuracy": ("held-out accuracy, %", "Held-out pairs that find each other."),
    "image_cosine": ("cosine, images", "Mean cosine with the given model's embeddings: 1 = nothing moved."),
    "text_cosine": ("cosine, texts", "The same for captions."),
    "loss": ("loss", "Mean over the steps since the look before."),
    "image_open": ("images pushed away", "Share of steps in which the image tower was pushed away."),
    "text_open": ("texts pushed away", "Share of steps in which the text tower was pushed away."),
}


def clip_view(run: ReportRun, result: ClipPurification, anchor: str) -> RunView:
    before, after = result.before, result.after
    rates = rate_rows(before, after)
    return RunView(
        anchor=anchor,
        kind="CLIP purification",
        run=run,
        verdict=clip_verdict(result),
        tiles=_tiles(result),
        steps=_steps(run, result),
        scan=None,
        rows=[*rates, *retrieval_rows(before, after)],
        rates=rates_figure(rates) if rates else None,
        history=_curves(result),
        tested=_tested(result),
        not_covered=list(result.not_covered),
        warnings=[*result.warnings, *run.notes],
        provenance=provenance(run, result),
        summary=repair_summary(result),
    )


def clip_verdict(result: ClipPurification) -> Verdict:
    """Not accepted; the tested trigger still works; accepted, with what was measured or was not."""
    before, after = result.before, result.after
    if result.undecided:
        return Verdict(
            tone="caution",
            word="Undecided",
            sentence="The pairs were ranked, which decides nothing, and nothing was done: the model is as it came.",
            detail=result.reason,
        )
    if not result.accepted:
        return Verdict(
            tone="alert",
            word="Not accepted",
            sentence="Not accepted: do not rely on this purified CLIP.",
            detail=result.reason,
        )
    if result.left_alone:
        return _left_alone_verdict(result)
    if before and after and before.asr and after.asr:
        rates = (
            f"the attack's success above chance went from {percent(excess_of(before))} to {percent(excess_of(after))}, "
            f"zero-shot accuracy from {percent(before.c_acc.value)} to {percent(after.c_acc.value)}."
        )
        if result.attack_left:
            sentence = f"The trigger still works, though the model kept its pairs: {rates}"
            return Verdict(tone="alert", word="Backdoor left", sentence=sentence, detail=result.reason)
        sentence = f"Accepted: {rates}"
    elif before and after:
        sentence = (
            f"Accepted: zero-shot accuracy went from {percent(before.c_acc.value)} to {percent(after.c_acc.value)}; "
            "no attack was tested."
        )
    else:
        sentence = (
            f"Accepted: held-out pairs find each other in {percent(result.held_out_after)} of cases, "
            f"{percent(result.held_out_before)} before; no attack was tested."
        )
    return Verdict(tone="ok", word="Accepted", sentence=sentence, detail=result.reason)


def _left_alone_verdict(result: ClipPurification) -> Verdict:
    """Nothing was found and nothing was done; an alarm where a trigger that was tested works."""
    if result.attack_left and result.after is not None:
        sentence = (
            "No trigger was found and the model is as it came, but the attack that was tested works: its success above "
            f"chance is {percent(excess_of(result.after))}."
        )
        return Verdict(tone="alert", word="Backdoor left", sentence=sentence, detail=result.reason)
    return Verdict(
        tone="ok",
        word="Left alone",
        sentence="Nothing suspicious was found, so nothing was done: the model is as it came.",
        detail=result.reason,
    )


def _tiles(result: ClipPurification) -> list[Tile]:
    if result.left_alone and result.search is not None:
        return [
            Tile(value=count(len(result.search.found)), name="concepts searched", note="none reached out of line"),
            Tile(value="0", name="weights changed", note="the model is as it came"),
        ]
    exposed = _exposure_tiles(result.exposure) if result.exposure is not None else []
    if result.left_alone:
        return [*exposed, Tile(value="0", name="weights changed", note="the model is as it came")]
    return [
        *exposed,
        Tile(
            value=percent(result.held_out_after),
            name="held-out pairs that find each other",
            note=f"{percent(result.held_out_before)} before, {percent(result.chance)} by chance",
        ),
        Tile(
            value=f"{result.image_cosine:.2f}",
            name="cosine with the given model, images",
            note=f"texts {result.text_cosine:.2f}; 1 = nothing moved",
        ),
        Tile(value=count(result.trained_pairs), name="pairs trained on", note=_left_out(result)),
        Tile(
            value=count(result.steps),
            name="training steps",
            note=f"of {count(result.planned_steps)}, {count(result.batch_size)} pairs each; {duration(result.seconds)}",
        ),
    ]


def _exposure_tiles(exposure: PairExposure) -> list[Tile]:
    found = Tile(
        value=percent(100 * exposure.confirmation),
        name="suspicion of pairs like the most suspicious",
        note="mean rank, 50 % by chance",
    )
    if not exposure.unlearnt:
        return [found]
    words = ", ".join(entry.word for entry in exposure.words[:_WORDS])
    return [
        found,
        Tile(
            value=count(exposure.unlearnt),
            name="pairs unlearnt",
            note=f"about {percent(exposure.rate)} are like them" + (f"; their words: {words}" if words else ""),
        ),
    ]


def _left_out(result: ClipPurification) -> str:
    parts = [f"{count(result.held_out_pairs)} held out"]
    if result.synthetic_pairs:
        parts.append(f"{count(result.synthetic_pairs)} made up")
    if result.skipped:
        parts.append(f"{count(len(result.skipped))} skipped")
    return ", ".join(parts)


def _steps(run: ReportRun, result: ClipPurification) -> list[Step]:
    model = str(Path(run.path) / "model")
    if result.undecided:
        again = command("unpoison", "purify", result.method, "MODEL", "--pairs", "PAIRS", "--always", "-o", "FOLDER")
        return [
            Step(text="Repeat the command with a --reference that never saw these pairs, in another folder."),
            Step(
                text="Or look at the first of the ranked pairs in suspicious/; where they are poison, repair:",
                line=again,
            ),
        ]
    if not result.accepted:
        steps = [Step(text="Keep the given model out of use if it is suspicious: it could not be repaired.")]
        if result.stopped:
            steps.append(Step(text="Repeat the command with a lower --learning-rate, in another folder."))
        return steps
    if result.left_alone and result.exposure is not None:
        return [
            Step(text="Use the model as before, as far as its training pairs can tell; the limits are below."),
            Step(text="The pairs are ranked in the folder suspicious/ all the same: look at the first of them."),
        ]
    if result.left_alone:
        again = command("unpoison", "purify", result.method, "MODEL", "--pairs", "PAIRS", "--always", "-o", "FOLDER")
        return [
            Step(text="Use the model as before, as far as this search can tell; its limits are below."),
            Step(text="Where there is reason to doubt it, repair it all the same:", line=again),
        ]
    if result.attack_left:
        return [
            Step(text="Do not use the model yet: the trigger that was tested still works."),
            Step(text="Repeat the repair with more pairs, --steps or a higher --learning-rate, in another folder."),
        ]
    steps = [Step(text=f"Use the purified model in {model}; it loads wherever the original did.")]
    if result.exposure is not None:
        listed = command("unpoison", "keep", str(Path(run.path) / "suspicious"), "-o", "clean.parquet")
        steps.append(
            Step(text="Look at the suspicious pairs below, then write a copy of the set without them:", line=listed)
        )
    if min(result.image_cosine, result.text_cosine) < 0.9:
        steps.append(Step(text="Make indexes, heads and connectors again that were built on the old embeddings."))
    if result.before is None:
        again = command("unpoison", "purify", result.method, "MODEL", "--pairs", "PAIRS", "--test", "LABELLED_IMAGES")
        steps.append(Step(text="To measure accuracy before and after, repair with test images:", line=again))
    return steps


def _tested(result: ClipPurification) -> list[str]:
    lines = []
    if result.search is not None:
        lines.append(
            f"Whether one of {counted(len(result.search.found), 'concept')} of the captions is reached from all images "
            f"by a change far smaller than the others need. {result.search.reason}"
        )
    if result.exposure is not None:
        lines.append(
            f"Whether {counted(result.exposure.seeds, 'most suspicious pair')} of the training set have something in "
            "common that points at other suspicious pairs."
        )
    if result.exposure is not None and result.exposure.judges:
        judges = counted(result.exposure.judges, "suspicious pair")
        lines.append(f"Whether {judges} that were kept aside still match their captions.")
    lines += [
        f"Whether {counted(result.held_out_pairs, 'held-out pair')} still find each other; a fall of at most "
        f"{result.bound:g} points is accepted."
    ]
    after = result.after
    if after is not None:
        lines.append(f"Zero-shot accuracy on {counted(after.c_acc.n, 'image')} of {after.data}.")
        if after.retrieval_data is not None:
            lines.append(f"Retrieval on {after.retrieval_data}.")
    if after is not None and after.asr is not None:
        lines.append(f"The attack {after.attack or 'of the manifest'} on {counted(after.asr.n, 'test image')}.")
    else:
        lines.append("No attack: without a trigger manifest the success of a backdoor cannot be measured.")
    return [*lines, *(after.notes if after is not None else ())]


def _curves(result: ClipPurification) -> list[Figure]:
    figures = []
    for key, (name, caption) in _CURVES.items():
        rows = [{"step": look["step"], name: look[key]} for look in result.history if key in look]
        figures += [
            Figure(svg=Markup(svg), caption=caption)  # noqa: S704 - charts escape all text
            for _, svg in charts.history_charts(rows)
        ]
    return figures


def trigger_pictures(finding: TriggerFinding) -> list[tuple[FoundTrigger, str]]:
    """What was found, smallest first, the first few with their pictures drawn anew as data addresses, else ""."""
    rows = []
    for place, entry in enumerate(finding.found):
        drawn = redraw_picture(entry.picture) if place < _PICTURES and entry.picture else ""
        shown = f"data:image/png;base64,{base64.b64encode(drawn).decode()}" if isinstance(drawn, bytes) else ""
        rows.append((entry, shown))
    return rows


def drift_rows(drift: Drift) -> list[tuple[str, str, str]]:
    """Tower, mean cosine as it is, and after the best orthogonal map."""
    return [
        ("images", f"{drift.image_raw:.3f}", f"{drift.image_aligned:.3f}"),
        ("texts", f"{drift.text_raw:.3f}", f"{drift.text_aligned:.3f}"),
    ]
