"""The files that the purification of a zero-shot classifier leaves in its folder."""

from __future__ import annotations

from pathlib import Path

from unpoison.errors import UsageError
from unpoison.models.zero_shot_classifier import FILE, ZeroShotClassifier
from unpoison.report.html import write_report
from unpoison.report.runs import read_run
from unpoison.zero_shot_results import ZeroShotPurification


def save_zero_shot(result: ZeroShotPurification, classifier: ZeroShotClassifier, folder: Path) -> None:
    """classifier.safetensors, purification.json and report.html. Raises UsageError where one cannot be written."""
    try:
        classifier.save(folder / classifier_file(result))
        result.save(folder / "purification.json")
    except OSError as error:
        raise UsageError(
            f"{folder}: the result could not be written ({error.strerror}).",
            hint="Make room on the disk, then repeat the same command.",
        ) from error
    write_report(folder / "report.html", [read_run(folder)])


def classifier_file(result: ZeroShotPurification) -> str:
    """A classifier that was not accepted gets a name that says so: nobody should take it for purified."""
    return FILE if result.accepted else f"not-accepted-{FILE}"
