"""The files that the purification of a CLIP leaves in its folder, in the order that makes a kill harmless."""

from __future__ import annotations

from pathlib import Path

from unpoison.clip_results import ClipPurification
from unpoison.errors import UsageError
from unpoison.models.clip_files import library_of, save_clip
from unpoison.report.clip_card import clip_card
from unpoison.report.html import write_report
from unpoison.report.runs import read_runs
from unpoison.storage import write_atomically
from unpoison.types import ImageTextModel


def save_clip_purification(result: ClipPurification, clip: ImageTextModel, folder: Path, *, base_model: str) -> None:
    """The model in the format that it came in, with its card inside and beside it, purification.json, report.html.

    Raises UsageError where a file cannot be written.
    """
    model = folder / model_folder(result)
    save_clip(clip, model)
    try:
        card = clip_card(result, base_model=base_model, library=library_of(clip)).encode()
        write_atomically(model / "README.md", card)
        write_atomically(folder / "card.md", card)
        result.save(folder / "purification.json")
    except OSError as error:
        raise UsageError(
            f"{folder}: the result could not be written ({error.strerror}).",
            hint="Make room on the disk, then repeat the same command: it does not train again.",
        ) from error
    write_report(folder / "report.html", read_runs(folder))


def model_folder(result: ClipPurification) -> str:
    """A model that was not accepted gets a name that says so: nobody should take it for repaired."""
    return "model" if result.accepted else "model-not-accepted"
