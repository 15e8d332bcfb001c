"""How often the weights verdict is wrong: figures of models that nothing was set on, by kind of model and of scan.

benchmarks/scan_model.py writes the record; without one for just these settings the answer is "not measured yet".
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from unpoison.detection.model_weights import INVERSION, WeightsConfig, search_inputs
from unpoison.evaluation.intervals import wilson
from unpoison.model_results import Measured

RECORD = Path(__file__).parents[1] / "assets" / "scan_model_measured.json"


class _Entry(msgspec.Struct):
    kind: str
    method: str
    made_up: bool
    references: int
    settings: dict[str, Any]
    clean: int
    false_alarms: int
    backdoored: int
    found: int
    named: int
    weak: tuple[str, ...] = ()


def settings_of(config: WeightsConfig, method: str) -> dict[str, Any]:
    """The settings that figures hold for, as JSON has them."""
    search = {key: value for key, value in search_inputs(config).items() if key != "code"}
    if method == INVERSION:
        own = {"images": search["images"], "search": search["search"], "anomaly": asdict(config.anomaly)}
    else:
        own = {"images": search["images"], "decree": asdict(config.decree), "reference_share": config.reference_share}
    return msgspec.json.decode(msgspec.json.encode(own))


def measured_for(
    kind: str, method: str, config: WeightsConfig, *, made_up: bool, references: bool, record: Path = RECORD
) -> Measured | None:
    """What was measured of scans like this one, None where nothing was. Any number of references counts as the same."""
    if not record.exists():
        return None
    settings = settings_of(config, method)
    for entry in msgspec.json.decode(record.read_bytes(), type=list[_Entry]):
        alike = (entry.kind, entry.method, entry.made_up, entry.references > 0) == (kind, method, made_up, references)
        if alike and entry.settings == settings:
            return Measured(
                clean=entry.clean, false_alarms=entry.false_alarms, backdoored=entry.backdoored, found=entry.found,
                named=entry.named, weak=entry.weak,
            )  # fmt: skip
    return None


def say_measured(measured: Measured | None) -> str:
    """The figures in a sentence, with 95 % intervals."""
    if measured is None:
        return "How often such a scan is wrong has not been measured yet, for models of this kind and these settings."
    parts = [
        f"of {whole} {what} models {part} were called suspicious or backdoored{_rate(part, whole)}"
        for part, whole, what in (
            (measured.false_alarms, measured.clean, "clean"), (measured.found, measured.backdoored, "backdoored"),
        )
    ]  # fmt: skip
    said = f"Measured on small models that nothing was set on: {'; '.join(parts)}"
    return f"{said}; of these the target was named in {measured.named}."


def _rate(part: int, whole: int) -> str:
    if not whole:
        return ""
    rate = wilson(part, whole)
    return f" ({rate.value:.0f} percent, 95 % interval {rate.low:.0f} to {rate.high:.0f})"
