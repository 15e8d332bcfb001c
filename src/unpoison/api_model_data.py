"""The data verdict of ``scan model``: the set that a model was trained on, scanned as ``scan dataset`` does it."""

from __future__ import annotations

from unpoison.api import ScanOutcome, scan_dataset
from unpoison.api_detectors import NETWORK_DETECTORS, DetectorConfig, scan_with_detector
from unpoison.api_pairs import PAIR_DETECTORS, PairDetectorConfig, find_pair_detector, scan_pairs
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.sources import LabelledImages
from unpoison.defenses.cgd import CGDConfig
from unpoison.errors import UsageError
from unpoison.model_results import DataVerdict
from unpoison.models.any_model import AnyModel
from unpoison.models.classifier import new_classifier
from unpoison.models.clip_transformers import load_clip
from unpoison.models.image_classifier import ImageClassifier
from unpoison.planning import Plan, plan_detection, plan_scan, probe
from unpoison.planning_pairs import plan_pair_scan
from unpoison.runs import Run
from unpoison.types import ImageTextModel

CGD = "cgd"
_NO_CLIP = "Not looked at: pairs are scanned with the CLIP that was trained on them."
_NETWORK = "small-resnet"


def check_data_method(trained_on: LabelledImages | ImageTextPairs | None, method: str | None) -> None:
    """Raises UsageError for a method that is none of this kind of data."""
    if isinstance(trained_on, ImageTextPairs):
        find_pair_detector(method or "dao")
    elif trained_on is not None and method not in (None, CGD, *NETWORK_DETECTORS):
        raise UsageError(
            f"{method} is no detector of labelled images.", hint=f"Known: {CGD}, {', '.join(NETWORK_DETECTORS)}."
        )


def judge_data(
    opened: AnyModel | None,
    trained_on: LabelledImages | ImageTextPairs | None,
    method: str | None,
    clip: ImageTextModel | None,
    *,
    run: Run,
) -> tuple[DataVerdict, ScanOutcome | None]:
    """CGD's ranks or another detector on labelled images, the detectors of pairs on pairs.

    ``clip``: for CGD, and the reference for pairs; None: the bundled one. Raises what the scans raise.
    """
    check_data_method(trained_on, method)
    if trained_on is None:
        return DataVerdict(reason="No training data were given (--trained-on)."), None
    if isinstance(trained_on, ImageTextPairs):
        suspect = _suspect(opened)
        if suspect is None:
            return DataVerdict(reason=_NO_CLIP, asked=True), None
        method = method or "dao"
        reference = (clip or load_clip()) if PAIR_DETECTORS[method].reference else None
        outcome = scan_pairs(trained_on, clip=suspect, reference=reference, method=method, run=run)
    elif method in NETWORK_DETECTORS:
        outcome = scan_with_detector(trained_on, method, classifier=_classifier(opened), run=run)
    else:
        outcome = scan_dataset(trained_on, clip=clip or load_clip(), run=run)
    return DataVerdict(reason=outcome.scan.estimate.reason, scan=outcome.scan, asked=True), outcome


def plan_data(
    opened: AnyModel | None,
    trained_on: LabelledImages | ImageTextPairs,
    method: str | None,
    clip: ImageTextModel | None,
    *,
    run: Run,
) -> Plan | None:
    """What :func:`judge_data` would take, from a few probed batches; None where it would not look at the data."""
    check_data_method(trained_on, method)
    if isinstance(trained_on, ImageTextPairs):
        suspect, detector = _suspect(opened), PAIR_DETECTORS[method or "dao"]
        if suspect is None:
            return None
        reference = (clip or load_clip()) if detector.reference else None
        return plan_pair_scan(trained_on, detector, suspect, reference, PairDetectorConfig(), run=run)
    own = _classifier(opened) if method in NETWORK_DETECTORS else None
    network = own or new_classifier(_NETWORK, trained_on.class_names)
    if method in NETWORK_DETECTORS:
        config = DetectorConfig()
        passes = {"strip": config.strip.overlays, "ibd-psc": 1 + config.scaling.networks}.get(method, 1)
        rates = probe(trained_on, None, network, run=run)
        epochs = 0 if own is not None else config.epochs
        return plan_detection(len(trained_on), network.image_size, rates, epochs=epochs, passes=passes)
    separation = CGDConfig().separation
    return plan_scan(
        len(trained_on), network.image_size, probe(trained_on, clip or load_clip(), network, run=run),
        scorers=separation.scorers, scorer_epochs=separation.scorer_epochs, classes=len(trained_on.class_names),
        trained=separation.scorer_samples,
    )  # fmt: skip


def _suspect(opened: AnyModel | None) -> ImageTextModel | None:
    return None if opened is None or isinstance(opened.model, ImageClassifier) else opened.model


def _classifier(opened: AnyModel | None) -> ImageClassifier | None:
    return opened.model if opened is not None and isinstance(opened.model, ImageClassifier) else None
