"""The model card that goes with a purified CLIP: Markdown in which every string from outside is inert text."""

from __future__ import annotations

from unpoison import __version__
from unpoison.clip_results import ClipPurification
from unpoison.report.card import code, listed, rates_table, sentence, table
from unpoison.report.rates import rate_rows, retrieval_rows
from unpoison.report.text import count, percent

_PAPERS = {
    "par": "PAR, [arXiv 2412.00727](https://arxiv.org/abs/2412.00727)",
    "clean-clip": "CleanCLIP, [arXiv 2303.03323](https://arxiv.org/abs/2303.03323)",
    "fine-tuning": "fine-tuning on clean pairs",
}


def clip_card(result: ClipPurification, *, base_model: str, library: str = "") -> str:
    """What was done to ``base_model``, with which pairs, the rates before and after, and the limits.

    ``library`` is the one that opens the files ("transformers", "open_clip"), "" for bare weights.
    """
    accepted = "Accepted." if result.accepted else "**Not accepted: do not rely on this model.**"
    left = ["**The trigger that was tested still works on this model.**"] if result.attack_left else []
    head = [f"library_name: {library}"] if library else []
    head += ["pipeline_tag: zero-shot-image-classification", "tags:", "- unpoison", "- backdoor-defense"]
    parts = [
        "\n".join(["---", *head, "---"]),
        "# Purified CLIP",
        f"{accepted} {sentence(result.reason)}",
        *left,
        table(
            ("", ""),
            [
                ("base model", code(base_model, cell=True)),
                ("method", _PAPERS.get(result.method, code(result.method, cell=True))),
                ("pairs", f"{code(result.inputs.get('pairs', 'unknown'), cell=True)}: {_pairs(result)}"),
                ("training steps", f"{count(result.steps)} of {count(result.planned_steps)}, {_batch(result)}"),
                ("seed", str(result.seed)),
                ("made by", f"unpoison {__version__}"),
                *([("command", code(result.command, cell=True))] if result.command else []),
            ],
        ),
        "## What is safe to use",
        sentence(result.protects) + ".",
        *[f"- {sentence(warning)}" for warning in result.warnings],
        "## Before and after",
        *_rates(result),
        "## Inputs and versions",
        listed("Input", result.inputs),
        "## Method configuration",
        listed("Setting", result.config),
        "## Limits",
        *[f"- {sentence(line)}" for line in result.not_covered],
        "- A purified model is only as good as the tests above: a backdoor that none of them shows may remain.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pairs(result: ClipPurification) -> str:
    made_up = f"; {count(result.synthetic_pairs)} made up" if result.synthetic_pairs else ""
    return f"{count(result.trained_pairs)} trained on, {count(result.held_out_pairs)} held out{made_up}"


def _batch(result: ClipPurification) -> str:
    return f"{count(result.batch_size)} pairs each"


def _rates(result: ClipPurification) -> list[str]:
    lines = [
        table(
            ("figure", "before", "after"),
            [
                (
                    "held-out pairs that find each other",
                    percent(result.held_out_before),
                    f"{percent(result.held_out_after)} ({percent(result.chance)} by chance)",
                ),
                ("mean cosine with the given model, images", "1", f"{result.image_cosine:.3f}"),
                ("mean cosine with the given model, texts", "1", f"{result.text_cosine:.3f}"),
            ],
        )
    ]
    rows = [*rate_rows(result.before, result.after), *retrieval_rows(result.before, result.after)]
    if not rows:
        return [*lines, "No test images were given, and no attack was tested."]
    lines += rates_table(rows)
    if result.after is not None:
        attack = f", attack {code(result.after.attack)}" if result.after.attack else ", no attack"
        target = f", target {code(result.after.target)}" if result.after.target else ""
        lines.append(f"Test data: {code(result.after.data)}{attack}{target}.")
    return lines
