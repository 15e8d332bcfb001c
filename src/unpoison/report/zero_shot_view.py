"""What a report says about the purification of a zero-shot classifier."""

from __future__ import annotations

import base64
from pathlib import Path

from unpoison.report.page import RunView, Step, Tile, provenance, repair_summary
from unpoison.report.rates import excess_of, rate_rows, retrieval_rows
from unpoison.report.runs import ReportRun, redraw_picture
from unpoison.report.text import count, counted, duration, percent
from unpoison.report.views import Verdict, rates_figure
from unpoison.zero_shot_results import DummyTrigger, ZeroShotPurification

_FILE = "classifier.safetensors"


def zero_shot_view(run: ReportRun, result: ZeroShotPurification, anchor: str) -> RunView:
    before, after = result.before, result.after
    rates = rate_rows(before, after)
    return RunView(
        anchor=anchor,
        kind="Zero-shot classifier",
        run=run,
        verdict=zero_shot_verdict(result),
        tiles=_tiles(result),
        steps=_steps(run, result),
        scan=None,
        rows=[*rates, *retrieval_rows(before, after)],
        rates=rates_figure(rates) if rates else None,
        tested=_tested(result),
        not_covered=list(result.not_covered),
        warnings=[*result.warnings, *run.notes],
        provenance=provenance(run, result),
        summary=repair_summary(result),
    )


def zero_shot_verdict(result: ZeroShotPurification) -> Verdict:
    """Not accepted; the tested trigger still works; left alone; accepted, with what was measured or was not."""
    before, after, detail = result.before, result.after, result.reason
    if not result.accepted:
        sentence = "Not accepted: do not rely on this zero-shot classifier."
        return Verdict(tone="alert", word="Not accepted", sentence=sentence, detail=detail)
    if result.attack_left and after is not None:
        sentence = f"The trigger that was tested still works: its success above chance is {percent(excess_of(after))}."
        return Verdict(tone="alert", word="Backdoor left", sentence=sentence, detail=detail)
    if result.left_alone:
        sentence = "Nothing suspicious was found among these classes, so nothing was done."
        return Verdict(tone="ok", word="Left alone", sentence=sentence, detail=detail)
    if before and after and before.asr and after.asr:
        sentence = (
            f"Accepted: the attack's success above chance went from {percent(excess_of(before))} to "
            f"{percent(excess_of(after))}, accuracy from {percent(before.c_acc.value)} to "
            f"{percent(after.c_acc.value)}; the CLIP itself is as it was."
        )
    else:
        sentence = (
            f"Accepted: held-out accuracy went from {percent(result.held_out_before)} to "
            f"{percent(result.held_out_after)}; no attack was tested, and the CLIP itself is as it was."
        )
    return Verdict(tone="ok", word="Accepted", sentence=sentence, detail=detail)


def _tiles(result: ZeroShotPurification) -> list[Tile]:
    tiles = [
        Tile(
            value=percent(result.held_out_after),
            name="held-out images named right",
            note=f"{percent(result.held_out_before)} before, n = {count(result.judging)}",
        ),
        Tile(value=count(result.learnt), name="labelled images learnt from", note=duration(result.seconds)),
        Tile(value="0", name="weights changed", note="only this classifier is protected"),
    ]
    if result.targets:
        shown = ", ".join(result.targets)
        tiles.insert(0, Tile(value=count(len(result.targets)), name="classes suspected as target", note=shown))
    return tiles


def _steps(run: ReportRun, result: ZeroShotPurification) -> list[Step]:
    if not result.accepted:
        return [Step(text="Do not use this classifier. Where the weights may be changed, repair the CLIP itself:",
                     line="unpoison purify par MODEL --pairs CLEAN_PAIRS -o purified")]  # fmt: skip
    if result.left_alone:
        return [Step(text="Use the classifier as before, as far as this search can tell; its limits are below.")]
    file = str(Path(run.path) / _FILE)
    return [
        Step(text=f"Load {file} with unpoison.load_zero_shot and the same CLIP: a drop-in zero-shot classifier."),
        Step(text="Keep the CLIP out of every other use: retrieval and other class lists are as attackable as before."),
    ]


def _tested(result: ZeroShotPurification) -> list[str]:
    lines = []
    if result.search is not None:
        lines.append(
            f"Whether one of {counted(len(result.search.found), 'class', 'classes')} is reached from all images by a "
            f"change far smaller than the others need. {result.search.reason}"
        )
    if result.dummies:
        aside = sum(entry.aside for entry in result.dummies)
        lines.append(
            f"Whether {counted(len(result.dummies), 'inverted trigger')} still work on held-out images; "
            f"{count(aside)} of them were kept aside."
        )
    lines.append(
        f"Whether {counted(result.judging, 'held-out image')} are still named right; a fall of at most "
        f"{result.bound:g} points is accepted."
    )
    after = result.after
    if after is not None and after.asr is not None:
        lines.append(f"The attack {after.attack or 'of the manifest'} on {counted(after.asr.n, 'test image')}.")
    else:
        lines.append("No attack: without a trigger manifest the success of a backdoor cannot be measured.")
    return [*lines, *(after.notes if after is not None else ())]


def dummy_pictures(result: ZeroShotPurification) -> list[tuple[DummyTrigger, str]]:
    """Each inverted trigger with its picture drawn anew as a data address, else ""."""
    rows = []
    for entry in result.dummies:
        drawn = redraw_picture(entry.picture) if entry.picture else ""
        shown = f"data:image/png;base64,{base64.b64encode(drawn).decode()}" if isinstance(drawn, bytes) else ""
        rows.append((entry, shown))
    return rows
