"""The files that a scan and a purification leave in their folder, in the order that makes a kill harmless."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from unpoison.errors import UnsupportedModelError
from unpoison.models.classifier import save_classifier
from unpoison.models.image_classifier import ImageClassifier
from unpoison.report.card import model_card
from unpoison.report.html import write_report
from unpoison.report.runs import read_run
from unpoison.results import DatasetScan, Purification, SampleScores, Split, write_atomically
from unpoison.types import Classifier


def save_scan(
    scan: DatasetScan, scores: SampleScores, split: Split, samples: Sequence[dict[str, Any]], folder: Path
) -> None:
    """scores.parquet, split.parquet, samples.json, scan.json, report.html."""
    _save_separation(scores, split, samples, folder)
    scan.save(folder / "scan.json")
    save_report(folder)


def save_purification(
    purification: Purification,
    classifier: Classifier,
    scores: SampleScores,
    split: Split,
    samples: Sequence[dict[str, Any]],
    folder: Path,
    *,
    base_model: str,
) -> None:
    """The files of the separation, the model with its card, purification.json, report.html.

    Raises UnsupportedModelError for a classifier of a kind that we cannot save.
    """
    if not isinstance(classifier, ImageClassifier):
        raise UnsupportedModelError(
            f"{type(classifier).__name__} cannot be saved here.", hint="Wrap the network in an ImageClassifier."
        )
    _save_separation(scores, split, samples, folder)
    save_classifier(classifier, folder / model_folder(purification))
    card = model_card(
        purification,
        base_model=base_model,
        class_names=classifier.class_names,
        architecture=classifier.architecture,
        image_size=classifier.image_size,
    )
    write_atomically(folder / "card.md", card.encode())
    purification.save(folder / "purification.json")
    save_report(folder)


def save_report(folder: Path) -> None:
    """``report.html`` of a run folder's results, in that folder."""
    write_report(folder / "report.html", [read_run(folder)])


def model_folder(purification: Purification) -> str:
    """A model that was not accepted gets a name that says so: nobody should take it for repaired."""
    return "model" if purification.accepted else "model-not-accepted"


def _save_separation(scores: SampleScores, split: Split, samples: Sequence[dict[str, Any]], folder: Path) -> None:
    scores.save(folder / "scores.parquet")
    split.save(folder / "split.parquet")
    write_atomically(folder / "samples.json", msgspec.json.encode(samples))
