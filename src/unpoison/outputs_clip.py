"""The files that the purification of a CLIP leaves in its folder, in the order that makes a kill harmless."""

from __future__ import annotations

import json
from pathlib import Path

from unpoison import __version__
from unpoison.clip_results import ClipPurification
from unpoison.report.card import code
from unpoison.storage import write_atomically
from unpoison.types import ImageTextModel

_PAPERS = {
    "par": "PAR, [arXiv 2412.00727](https://arxiv.org/abs/2412.00727)",
    "clean-clip": "CleanCLIP, [arXiv 2303.03323](https://arxiv.org/abs/2303.03323)",
    "fine-tuning": "fine-tuning on clean pairs",
}


def save_clip_purification(result: ClipPurification, clip: ImageTextModel, folder: Path, *, base_model: str) -> None:
    """The model in the format that it came in, with its card inside and beside it, then purification.json."""
    model = folder / model_folder(result)
    clip.save(model)
    card = clip_card(result, base_model=base_model).encode()
    write_atomically(model / "README.md", card)
    write_atomically(folder / "card.md", card)
    result.save(folder / "purification.json")


def model_folder(result: ClipPurification) -> str:
    """A model that was not accepted gets a name that says so: nobody should take it for repaired."""
    return "model" if result.accepted else "model-not-accepted"


def clip_card(result: ClipPurification, *, base_model: str) -> str:
    """A model card in Markdown in which every string from outside stands in a code span."""
    accepted = "Accepted." if result.accepted else "**Not accepted: do not rely on this model.**"
    facts = {
        "base model": code(base_model, cell=True),
        "method": _PAPERS.get(result.method, code(result.method, cell=True)),
        "pairs": f"{code(result.inputs.get('pairs', 'unknown'), cell=True)}, {result.trained_pairs:,} trained on",
        "training steps": f"{result.steps:,} of {result.planned_steps:,}, {result.batch_size:,} pairs each",
        "seed": str(result.seed),
        "made by": f"unpoison {__version__}",
    }
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: zero-shot-image-classification\n"
        "tags:\n- unpoison\n- backdoor-defense\n---",
        "# Purified CLIP",
        f"{accepted} {code(result.reason)}",
        _table(("", ""), facts),
        "## Before and after",
        _table(("figure", "before", "after"), _figures(result)),
        *[f"- {code(warning)}" for warning in result.warnings],
        "## Inputs",
        _table(("input", "value"), {code(k, cell=True): code(v, cell=True) for k, v in result.inputs.items()}),
        "## Method configuration",
        _table(
            ("setting", "value"),
            {code(k, cell=True): code(json.dumps(v, default=str), cell=True) for k, v in result.config.items()},
        ),
        "## Limits",
        *[f"- {line}" for line in result.not_covered],
        "- A purified model is only as good as the tests above: a backdoor that none of them shows may remain.",
    ]
    return "\n\n".join(parts) + "\n"


def _figures(result: ClipPurification) -> dict[str, tuple[str, str]]:
    figures = {
        "held-out pairs that find each other, percent": (
            f"{result.held_out_before:.1f}",
            f"{result.held_out_after:.1f} (chance {result.chance:.1f}, n = {result.held_out_pairs:,})",
        ),
        "mean cosine with the given model, images": ("1", f"{result.image_cosine:.3f}"),
        "mean cosine with the given model, texts": ("1", f"{result.text_cosine:.3f}"),
    }
    if result.before is not None and result.after is not None:
        for name, key in (("C-Acc", "c_acc"), ("ASR", "asr"), ("ASR floor", "asr_floor"), ("RA", "ra")):
            pair = getattr(result.before, key), getattr(result.after, key)
            if None not in pair:
                shown = [f"{rate.value:.1f} ({rate.low:.1f} to {rate.high:.1f}), n = {rate.n:,}" for rate in pair]
                figures[f"{name}, percent"] = (shown[0], shown[1])
    return figures


def _table(head: tuple[str, ...], rows: dict[str, str] | dict[str, tuple[str, str]]) -> str:
    lines = [head, ("---",) * len(head)]
    lines += [(name, *(value if isinstance(value, tuple) else (value,))) for name, value in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
