"""unpoison finds and removes backdoors: in labelled image sets, in classifiers, and in CLIP models.

The public names below are imported when they are first used (PEP 562), so that ``import unpoison`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unpoison.api import PurifyOutcome, ScanOutcome, purify_with_cgd, scan_dataset
    from unpoison.api_clip import (
        ClipPurifyOutcome,
        purify_with_clean_clip,
        purify_with_fine_tuning,
        purify_with_par,
    )
    from unpoison.api_detectors import DetectorConfig, scan_with_detector
    from unpoison.api_models import ModelScanConfig, ModelScanOutcome, scan_model
    from unpoison.api_pairs import PairDetectorConfig, scan_pairs
    from unpoison.api_repairs import purify_with_classic, purify_with_pad_ft
    from unpoison.api_ubt import UBTOutcome, purify_with_abl_clip, purify_with_ubt
    from unpoison.api_zero_shot import (
        ZeroShotOutcome,
        purify_with_cbpt,
        purify_with_linear_probe,
        purify_with_rvpt,
    )
    from unpoison.attacks.poison import apply_poisoning, plan_poisoning
    from unpoison.data.pairs import join_pairs, open_pairs
    from unpoison.data.pixels import load_pixels
    from unpoison.data.shapes import make_shapes
    from unpoison.data.sources import open_images
    from unpoison.data.synthetic import render_pairs
    from unpoison.defenses.baselines.abl_clip import ABLClipConfig
    from unpoison.defenses.baselines.clean_clip import CleanClipConfig
    from unpoison.defenses.baselines.fine_tuning import FineTuningConfig
    from unpoison.defenses.baselines.linear_probe import LinearProbeConfig
    from unpoison.defenses.baselines.rvpt import RVPTConfig
    from unpoison.defenses.cbpt import CBPTConfig
    from unpoison.defenses.cgd import CGDConfig
    from unpoison.defenses.pad_ft import PADFTConfig
    from unpoison.defenses.par import PARConfig
    from unpoison.defenses.ubt import UBTConfig
    from unpoison.detection.cgd import SeparationConfig
    from unpoison.evaluation.classifier import evaluate_classifier
    from unpoison.evaluation.clip import evaluate_clip
    from unpoison.keep import select_clean, write_clean_copy
    from unpoison.models.classifier import load_classifier, new_classifier, save_classifier
    from unpoison.models.clip_files import load_any_clip, save_clip
    from unpoison.models.clip_transformers import load_clip
    from unpoison.models.zero_shot_classifier import ZeroShotClassifier, load_zero_shot
    from unpoison.report.html import write_report
    from unpoison.report.runs import read_run
    from unpoison.runs import Run, RunFolder
    from unpoison.training import train_classifier

__version__ = "0.1.0"

_HOMES = {
    "ABLClipConfig": "unpoison.defenses.baselines.abl_clip",
    "CBPTConfig": "unpoison.defenses.cbpt",
    "CGDConfig": "unpoison.defenses.cgd",
    "CleanClipConfig": "unpoison.defenses.baselines.clean_clip",
    "ClipPurifyOutcome": "unpoison.api_clip",
    "DetectorConfig": "unpoison.api_detectors",
    "FineTuningConfig": "unpoison.defenses.baselines.fine_tuning",
    "LinearProbeConfig": "unpoison.defenses.baselines.linear_probe",
    "ModelScanConfig": "unpoison.api_models",
    "ModelScanOutcome": "unpoison.api_models",
    "PADFTConfig": "unpoison.defenses.pad_ft",
    "PARConfig": "unpoison.defenses.par",
    "PairDetectorConfig": "unpoison.api_pairs",
    "PurifyOutcome": "unpoison.api",
    "RVPTConfig": "unpoison.defenses.baselines.rvpt",
    "Run": "unpoison.runs",
    "RunFolder": "unpoison.runs",
    "ScanOutcome": "unpoison.api",
    "SeparationConfig": "unpoison.detection.cgd",
    "UBTConfig": "unpoison.defenses.ubt",
    "UBTOutcome": "unpoison.api_ubt",
    "ZeroShotClassifier": "unpoison.models.zero_shot_classifier",
    "ZeroShotOutcome": "unpoison.api_zero_shot",
    "apply_poisoning": "unpoison.attacks.poison",
    "evaluate_classifier": "unpoison.evaluation.classifier",
    "evaluate_clip": "unpoison.evaluation.clip",
    "join_pairs": "unpoison.data.pairs",
    "load_any_clip": "unpoison.models.clip_files",
    "load_classifier": "unpoison.models.classifier",
    "load_clip": "unpoison.models.clip_transformers",
    "load_pixels": "unpoison.data.pixels",
    "load_zero_shot": "unpoison.models.zero_shot_classifier",
    "make_shapes": "unpoison.data.shapes",
    "new_classifier": "unpoison.models.classifier",
    "open_images": "unpoison.data.sources",
    "open_pairs": "unpoison.data.pairs",
    "plan_poisoning": "unpoison.attacks.poison",
    "purify_with_cbpt": "unpoison.api_zero_shot",
    "purify_with_cgd": "unpoison.api",
    "purify_with_classic": "unpoison.api_repairs",
    "purify_with_clean_clip": "unpoison.api_clip",
    "purify_with_fine_tuning": "unpoison.api_clip",
    "purify_with_linear_probe": "unpoison.api_zero_shot",
    "purify_with_pad_ft": "unpoison.api_repairs",
    "purify_with_par": "unpoison.api_clip",
    "purify_with_abl_clip": "unpoison.api_ubt",
    "purify_with_rvpt": "unpoison.api_zero_shot",
    "purify_with_ubt": "unpoison.api_ubt",
    "read_run": "unpoison.report.runs",
    "render_pairs": "unpoison.data.synthetic",
    "save_classifier": "unpoison.models.classifier",
    "save_clip": "unpoison.models.clip_files",
    "scan_dataset": "unpoison.api",
    "scan_model": "unpoison.api_models",
    "scan_pairs": "unpoison.api_pairs",
    "scan_with_detector": "unpoison.api_detectors",
    "select_clean": "unpoison.keep",
    "train_classifier": "unpoison.training",
    "write_clean_copy": "unpoison.keep",
    "write_report": "unpoison.report.html",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "ABLClipConfig",
    "CBPTConfig",
    "CGDConfig",
    "CleanClipConfig",
    "ClipPurifyOutcome",
    "DetectorConfig",
    "FineTuningConfig",
    "LinearProbeConfig",
    "ModelScanConfig",
    "ModelScanOutcome",
    "PADFTConfig",
    "PARConfig",
    "PairDetectorConfig",
    "PurifyOutcome",
    "RVPTConfig",
    "Run",
    "RunFolder",
    "ScanOutcome",
    "SeparationConfig",
    "UBTConfig",
    "UBTOutcome",
    "ZeroShotClassifier",
    "ZeroShotOutcome",
    "apply_poisoning",
    "evaluate_classifier",
    "evaluate_clip",
    "join_pairs",
    "load_any_clip",
    "load_classifier",
    "load_clip",
    "load_pixels",
    "load_zero_shot",
    "make_shapes",
    "new_classifier",
    "open_images",
    "open_pairs",
    "plan_poisoning",
    "purify_with_abl_clip",
    "purify_with_cbpt",
    "purify_with_cgd",
    "purify_with_classic",
    "purify_with_clean_clip",
    "purify_with_fine_tuning",
    "purify_with_linear_probe",
    "purify_with_pad_ft",
    "purify_with_par",
    "purify_with_rvpt",
    "purify_with_ubt",
    "read_run",
    "render_pairs",
    "save_classifier",
    "save_clip",
    "scan_dataset",
    "scan_model",
    "scan_pairs",
    "scan_with_detector",
    "select_clean",
    "train_classifier",
    "write_clean_copy",
    "write_report",
]
