"""The files that a scan of a model leaves in its folder, in the order that makes a kill harmless."""

from __future__ import annotations

import base64
from pathlib import Path

from unpoison.api_models import ModelScanOutcome
from unpoison.outputs import save_scan
from unpoison.report.html import write_report
from unpoison.report.runs import DATA, MODEL_SCAN, read_runs
from unpoison.storage import write_atomically


def save_model_scan(outcome: ModelScanOutcome, folder: Path) -> None:
    """data/ where training data were scanned, trigger.png where a trigger was found, model-scan.json, report.html."""
    if outcome.data is not None:
        (folder / DATA).mkdir(exist_ok=True)
        found = outcome.data
        save_scan(found.scan, found.scores, found.split, found.samples, folder / DATA)
    if outcome.scan.weights.picture:
        write_atomically(folder / "trigger.png", base64.b64decode(outcome.scan.weights.picture))
    outcome.scan.save(folder / MODEL_SCAN)
    write_report(folder / "report.html", read_runs(folder))
