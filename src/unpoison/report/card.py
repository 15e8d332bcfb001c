"""The model card that goes with a purified model: Markdown in which every string from outside is inert text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unpoison import __version__
from unpoison.report.rates import RateRow, rate_rows
from unpoison.report.text import count, interval, percent, plain
from unpoison.results import Interval, Purification, write_atomically

_PAPERS = {
    "cgd": "CGD, [arXiv 2507.05113](https://arxiv.org/abs/2507.05113)",
}


_CLIPPED = (
    "## How to load it",
    "Activations are clipped above. The bounds lie beside the weights under `activation_bounds`, and "
    "`unpoison.load_classifier` applies them. Without them the last layer was tuned for another network.",
)


def write_card(path: Path, purification: Purification, *, base_model: str | None = None) -> None:
    """Write :func:`model_card` to ``path``, whole or not at all."""
    write_atomically(path, model_card(purification, base_model=base_model).encode("utf-8"))


def model_card(
    purification: Purification,
    *,
    base_model: str | None = None,
    class_names: Sequence[str] = (),
    architecture: str | None = None,
    image_size: int | None = None,
) -> str:
    """A card with what was done to ``base_model`` (default: as the result names it), the rates and the limits.

    ``class_names``, paths and reasons may come from strangers: they stand in code spans that no renderer reads as
    markup. ``image_size`` in pixels.
    """
    result = purification
    base_model = base_model or (result.before.model if result.before else result.inputs.get("model", "unknown"))
    accepted = "Accepted" if result.accepted else "**Not accepted: do not rely on this model.**"
    parts = [
        "---\nlibrary_name: unpoison\npipeline_tag: image-classification\ntags:\n- unpoison\n- backdoor-defense\n---",
        "# Purified image classifier",
        f"{accepted} {sentence(result.reason)}",
        table(
            ("", ""),
            [
                ("base model", code(base_model, cell=True)),
                ("architecture", code(architecture, cell=True) if architecture else "as the base model"),
                ("image size", f"{image_size} x {image_size} pixels" if image_size else "as the base model"),
                ("method", _PAPERS.get(result.method.lower(), code(result.method, cell=True))),
                ("training steps", count(result.steps)),
                ("share of weights changed", percent(100 * result.changed_share)),
                ("seed", str(result.seed)),
                ("made by", f"unpoison {__version__}"),
            ],
        ),
        "## What is safe to use",
        sentence(result.protects),
        "## Before and after",
        *_rates(result),
        "## Data",
        f"{count(result.clean_count)} training images counted as clean and were trained on; "
        f"{count(result.suspect_count)} counted as suspect.",
        *_estimate(result, class_names),
        listed("Inputs", result.inputs),
        "## Method configuration",
        listed("Setting", result.config),
        *(_CLIPPED if result.clipped_sites else ()),
        "## Limits",
        *[f"- {sentence(line)}" for line in result.not_covered],
        "- A purified model is only as good as the tests above: a backdoor that none of them shows may remain.",
    ]
    if class_names:
        parts += ["## Classes", ", ".join(code(name) for name in class_names)]
    return "\n\n".join(part for part in parts if part) + "\n"


def code(text: object, *, cell: bool = False) -> str:
    """A code span that holds ``text`` whatever it is; in a table ``cell`` the bars are escaped too."""
    shown = plain(text).strip() or "(empty)"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    if shown[0] == "`" or shown[-1] == "`":
        shown = f" {shown} "
    span = f"{fence}{shown}{fence}"
    return span.replace("|", "\\|") if cell else span


def sentence(text: str) -> str:
    """Prose from a result file: letters and common marks stay prose, anything else makes it a code span."""
    shown = plain(text).strip()
    return shown if re.fullmatch(r"[\w ,.:;%()'/+–−=-]*", shown) and not _linkable(shown) else code(shown)  # noqa: RUF001


def _linkable(text: str) -> bool:
    """Emphasis, autolinks, and block openers (lists, headings under text) that plain characters can still make."""
    return bool(re.search(r"_|www\.|://|^[-+=]|^\d+[.)]", text))


def _rates(result: Purification) -> list[str]:
    rows = rate_rows(result.before, result.after)
    if not rows:
        return [
            f"No test set was given. Accuracy on held-out training images: {percent(result.held_out_before)} before, "
            f"{percent(result.held_out_after)} after (a fall of at most {result.bound:g} points is accepted)."
        ]
    evaluation = result.after or result.before
    lines = rates_table(rows)
    if evaluation is not None:
        attack = f", attack {code(evaluation.attack)}" if evaluation.attack else ""
        target = f", target {code(evaluation.target)}" if evaluation.target else ""
        lines.append(f"Test data: {code(evaluation.data)}{attack}{target}.")
    return lines


def rates_table(rows: Sequence[RateRow]) -> list[str]:
    """The rates before and after as a table, and below it what each means."""
    lines = [
        (row.name, _rate(row.before, row.before_text), _rate(row.after, row.after_text), row.change or "–")  # noqa: RUF001
        for row in rows
    ]
    return [
        table(("rate", "before", "after", "change, points"), lines),
        "Percent, with 95 % Wilson intervals. " + " ".join(_meaning(row) for row in rows),
    ]


def _meaning(row: RateRow) -> str:
    return f"{row.name}: {row.meaning}."


def _rate(rate: Interval | None, text: str) -> str:
    if rate is None:
        return text or "–"  # noqa: RUF001
    return f"{percent(rate.value)} ({interval(rate)}), n = {count(rate.n)}"


def _estimate(result: Purification, class_names: Sequence[str]) -> list[str]:
    estimate = result.estimate
    if estimate is None:
        return []
    named = estimate.target_labels if estimate.poisoned else estimate.odd_labels
    names = ", ".join(code(class_names[label]) if 0 <= label < len(class_names) else str(label) for label in named)
    if not estimate.poisoned and names:
        return [
            "No proof of poisoning was found in the training data, but odd labels, and their doubtful images were "
            f"unlearnt: {names}."
        ]
    if not estimate.poisoned:
        return ["No evidence of poisoning was found in the training data; this does not prove them clean."]
    goal = f" toward {names}" if names else ""
    return [
        f"Evidence of poisoning was found: about {percent(100 * estimate.rate)} "
        f"({100 * estimate.rate_low:.1f} to {percent(100 * estimate.rate_high)}) of the images{goal}."
    ]


def listed(title: str, values: dict[str, Any]) -> str:
    """A table of names and values in code spans; nothing for no values."""
    if not values:
        return ""
    rows = [
        (code(name, cell=True), code(value if isinstance(value, str) else json.dumps(value, default=str), cell=True))
        for name, value in values.items()
    ]
    return table((title, "value"), rows)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; the cells are taken as they are."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
