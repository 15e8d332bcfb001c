"""Tables and sentences of the terminal's answers. Strings from data go through ``printable``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from unpoison.cli.console import printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from unpoison.clip_results import ClipPurification
    from unpoison.model_results import ClassTrigger
    from unpoison.results import ClipEvaluation, DatasetScan, Evaluation, Interval, PoisonEstimate, SampleScores, Split
    from unpoison.zero_shot_results import ZeroShotPurification

_NAMED = 5  # target labels named in the verdict


def plain_table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; the columns in ``right`` are flush right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table


def verdict(
    estimate: PoisonEstimate,
    samples: int,
    class_names: Sequence[str],
    *,
    ranks_only: bool = False,
    what: str = "samples",
) -> str:
    """One sentence: whether, toward what, how much."""
    if ranks_only and not estimate.poisoned:
        return f"Inconclusive: {samples:,} {what} were ranked; this method does not say whether a set is poisoned."
    if not estimate.poisoned and estimate.odd_labels:
        names = ", ".join(repr(printable(class_names[label])) for label in estimate.odd_labels[:_NAMED])
        more = f" and {len(estimate.odd_labels) - _NAMED} more" if len(estimate.odd_labels) > _NAMED else ""
        return f"Inconclusive: no proof of poisoning in {samples:,} samples, but odd labels: {names}{more}."
    if not estimate.poisoned:
        return f"Nothing found: no sign of poisoning in {samples:,} samples."
    names = [repr(printable(class_names[label])) for label in estimate.target_labels[:_NAMED]]
    more = f" and {len(estimate.target_labels) - _NAMED} more" if len(estimate.target_labels) > _NAMED else ""
    toward = f" toward {', '.join(names)}{more}" if names else ""
    rate = f"{100 * estimate.rate:.1f} % ({100 * estimate.rate_low:.1f} to {100 * estimate.rate_high:.1f} %)"
    return f"Poisoned{toward}: about {rate} of {samples:,} {what}."


def class_triggers_table(classes: Sequence[ClassTrigger], count: int = 6) -> Table:
    """The classes that are most out of line, each with the least change that reaches it."""
    table = plain_table("class", "form", "size", "works on", "index", "beside references",
                        right=("size", "works on", "index", "beside references"))  # fmt: skip
    for row in classes[:count]:
        added = row.form == "additive"
        size = f"{255 * row.size:.1f} of 255 levels" if added else f"{100 * row.size:.1f} % of the image"
        second = "" if row.reference_index is None else f"{row.reference_index:.1f}"
        table.add_row(printable(row.name), row.form, size, f"{row.success:.0f} %", f"{row.index:.1f}", second)
    return table


def flagged_table(scan: DatasetScan) -> Table:
    """Flagged samples per given label, most first."""
    table = plain_table("label", "flagged", right=("flagged",))
    for name, count in sorted(scan.flagged_per_class.items(), key=lambda item: -item[1]):
        if count:
            table.add_row(printable(name), f"{count:,}")
    table.add_row("all", f"{scan.flagged:,}")
    return table


def suspects_table(scores: SampleScores, split: Split, count: int) -> Table:
    """The most suspicious samples of the suspect region."""
    order = split.suspect[np.argsort(-scores.suspicion[split.suspect], kind="stable")][:count]
    axes = list(scores.axes)
    table = plain_table("most suspicious", "label", *axes, right=tuple(axes))
    for row in order:
        values = [f"{scores.axes[axis][row]:.3f}" for axis in axes]
        table.add_row(printable(scores.ids[row]), printable(scores.class_names[int(scores.labels[row])]), *values)
    return table


def skipped_lines(scan: DatasetScan, path: Path) -> list[str]:
    """How many rows could not be used, and why the first could not; nothing where all could."""
    if not scan.skipped:
        return []
    lines = ["", f"Skipped {len(scan.skipped)} rows that could not be used:"]
    lines += [printable(f"  {row.id}: {row.reason}") for row in scan.skipped[:3]]
    more = [f"  and {len(scan.skipped) - 3} more, in {path / 'scan.json'}"] if len(scan.skipped) > 3 else []
    return lines + more


def evaluation_table(evaluations: Mapping[str, Evaluation | ClipEvaluation]) -> Table:
    """One column for each evaluation (before, after, ...), one row for each rate with its interval and n."""
    results = list(evaluations.values())
    table = plain_table("", *evaluations, "n", right=(*evaluations, "n"))

    def row(name: str, values: list[Interval | None]) -> None:
        counts = {f"{value.n:,}" for value in values if value is not None}
        table.add_row(name, *map(rate, values), " / ".join(sorted(counts)))

    row("clean accuracy", [result.c_acc for result in results])
    if any(result.asr is not None for result in results):
        row("attack success (ASR)", [result.asr for result in results])
        row("ASR floor", [result.asr_floor for result in results])
        excess = ("" if result.asr_excess is None else f"{result.asr_excess:.1f} %" for result in results)
        table.add_row("excess ASR", *excess, "")
        row("robust accuracy", [result.ra for result in results])
    for key, name in (("image_to_text", "R@1, image to text"), ("text_to_image", "R@1, text to image")):
        found = [getattr(result, key, None) for result in results]
        if any(recall is not None for recall in found):
            row(name, [None if recall is None else recall.at_1 for recall in found])
    asr = [getattr(result, "retrieval_asr", None) for result in results]
    if any(value is not None for value in asr):
        row("retrieval ASR", asr)
    return table


def rate(value: Interval | None) -> str:
    """A rate with its 95 % interval."""
    return "" if value is None else f"{value.value:.1f} % ({value.low:.1f} to {value.high:.1f})"


def show_judgement(out: Console, result: ClipPurification | ZeroShotPurification, what: str) -> None:
    """Figures before and after, notes, what is protected and what is not; ``what`` was purified: "model", ..."""
    if result.before is not None and result.after is not None:
        out.print()
        out.print(evaluation_table({"before": result.before, "after": result.after}))
        if result.attack_left:
            out.print(f"The trigger that was tested still works: do not use the {what} yet.", style="bold")
    out.print()
    for warning in (*result.warnings, *(result.after.notes if result.after is not None else ())):
        out.print(f"Note: {printable(warning)}")
    if result.skipped:
        out.print(f"{len(result.skipped):,} rows could not be used; they are listed in purification.json.")
    out.print(f"Protects: {printable(result.protects)}.")
    out.print("Not covered: " + printable(" ".join(result.not_covered)))
