"""Scans of a data set with the classic detectors, which look at what a network trained on the set makes of it.

from unpoison import open_images, scan_with_detector
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from unpoison.api import ScanOutcome, describe_samples
from unpoison.data.pixels import Pixels, load_pixels
from unpoison.data.sources import LabelledImages
from unpoison.detection import activation_clustering as clusters
from unpoison.detection import ibd_psc as scaling
from unpoison.detection import spectral_signatures as spectra
from unpoison.detection import strip as overlays
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.evidence import MIN_SAMPLES, check_classes
from unpoison.models.checkpoints import hash_weights
from unpoison.models.classifier import ImageClassifier, new_classifier
from unpoison.models.features import stored_features
from unpoison.results import CLEAN, SKIPPED, SUSPECT, DatasetScan, PoisonEstimate, Region, SampleScores, Split
from unpoison.runs import Run
from unpoison.training import train_classifier

LIMITS = (
    "Poison that this network did not learn, or whose traces are not where this detector looks.",
    "Whether the set is poisoned at all: these detectors rank samples of any set, clean ones too.",
    "The weights of any model: this looked at data only.",
)


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Settings of all four; each detector reads its own and ``assumed_rate``."""

    assumed_rate: float = 0.05
    """Share of the set that is taken for poison where a detector only ranks: 1.5 times as many are flagged."""
    epochs: int = 15
    """Of the network that is trained on the set, where none is given."""
    clustering: clusters.ActivationClusteringConfig = field(default_factory=clusters.ActivationClusteringConfig)
    strip: overlays.STRIPConfig = field(default_factory=overlays.STRIPConfig)
    scaling: scaling.IBDPSCConfig = field(default_factory=scaling.IBDPSCConfig)

    def __post_init__(self) -> None:
        if not 0 < self.assumed_rate < 0.5 or self.epochs < 1:
            raise ConfigError("expected assumed_rate in (0, 0.5) and epochs >= 1.", hint="Try 0.05 and 15.")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a detector says of the usable samples: scores, those its own rule flags, and labels that it finds odd."""

    axis: str
    scores: Float[np.ndarray, " k"]
    flagged: Bool[np.ndarray, " k"]
    odd: tuple[int, ...] = ()
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A network trained on a set, and the set's usable rows with their labels."""

    classifier: ImageClassifier
    pixels: Pixels
    rows: Int[np.ndarray, " k"]
    labels: Int[np.ndarray, " k"]

    def features(self, run: Run) -> Float[np.ndarray, "k d"]:
        return stored_features(self.classifier, self.pixels, self.rows, run=run).numpy()


Detect = Callable[[Trained, DetectorConfig, Run], Found]


def _clusters(known: Trained, config: DetectorConfig, run: Run) -> Found:
    scores, verdicts = clusters.activation_clustering(known.features(run), known.labels, config.clustering)
    suspicious = tuple(entry.label for entry in verdicts if entry.suspicious)
    furthest = max(verdicts, key=lambda entry: entry.silhouette, default=None)
    detail = (
        ""
        if furthest is None
        else (
            f" The two furthest apart have silhouette {furthest.silhouette:.2f}; the smaller one holds "
            f"{100 * furthest.share:.0f} percent."
        )
    )
    return Found(
        axis=clusters.AXIS,
        scores=scores,
        flagged=(scores > 0) & np.isin(known.labels, suspicious),
        odd=suspicious,
        reason=f"{len(suspicious)} of {len(verdicts)} labels fall into two clusters of unequal size.{detail}",
    )


def _spectra(known: Trained, config: DetectorConfig, run: Run) -> Found:
    scores = spectra.spectral_signatures(known.features(run), known.labels)
    return Found(axis=spectra.AXIS, scores=scores, flagged=highest(scores, config.assumed_rate), reason=_ranked(config))


def _strip(known: Trained, config: DetectorConfig, run: Run) -> Found:
    scores = overlays.strip(known.classifier, known.pixels, known.rows, config.strip, run=run)
    return Found(
        axis=overlays.AXIS, scores=scores, flagged=highest(scores, config.assumed_rate), reason=_ranked(config)
    )


def _scaling(known: Trained, config: DetectorConfig, run: Run) -> Found:
    scores = scaling.ibd_psc(known.classifier, known.pixels, known.rows, config.scaling, run=run)
    flagged = scores >= config.scaling.threshold
    return Found(
        axis=scaling.AXIS,
        scores=scores,
        flagged=flagged,
        reason=(
            f"{100 * float(flagged.mean()):.1f} percent keep a probability of {config.scaling.threshold:g} or more for "
            "their label when the network's weights are scaled."
        ),
    )


NETWORK_DETECTORS: dict[str, Detect] = {
    "activation-clustering": _clusters,
    "spectral-signatures": _spectra,
    "strip": _strip,
    "ibd-psc": _scaling,
}


def scan_with_detector(
    source: LabelledImages,
    method: str,
    *,
    classifier: ImageClassifier | None = None,
    arch: str = "small-resnet",
    image_size: int = 32,
    config: DetectorConfig | None = None,
    run: Run | None = None,
) -> ScanOutcome:
    """Score every sample with one of NETWORK_DETECTORS, by a network trained on the set.

    Without ``classifier`` one of ``arch`` is trained on it first. None of them decides whether a set is poisoned: they
    rank samples of any set, and the scan is inconclusive. Raises NotEnoughDataError, SourceFormatError,
    DataError, UnsupportedModelError, DivergedError.
    """
    run, config = run or Run(), config or DetectorConfig()
    begun = time.monotonic()
    if len(source) < MIN_SAMPLES:
        raise NotEnoughDataError(
            f"samples in {source.name}", have=len(source), need=MIN_SAMPLES, hint="Give the whole training set."
        )
    if classifier is None:
        seed = run.seed_of("network") % 2**32
        network = new_classifier(arch, source.class_names, image_size=image_size, seed=seed)
    else:
        network = classifier.copy()
    check_classes(network, source)
    pixels = load_pixels(source, network.image_size, cache=run.cache, progress=run.progress)
    if classifier is None:
        network = train_classifier(network, pixels, source.labels, epochs=config.epochs, run=run)
    rows = np.flatnonzero(pixels.usable)
    found = NETWORK_DETECTORS[method](
        Trained(classifier=network, pixels=pixels, rows=rows, labels=source.labels[rows]), config, run
    )
    values = np.full(len(source), np.nan)
    values[rows] = found.scores
    region: Region = np.full(len(source), SKIPPED, dtype=np.int8)
    region[rows] = np.where(found.flagged, SUSPECT, CLEAN)
    skipped = tuple({row.id: row for row in (*source.skipped, *pixels.skipped)}.values())
    scores = SampleScores(
        method=method, ids=list(source.ids), labels=source.labels, class_names=source.class_names,
        axes={found.axis: values}, primary=found.axis, skipped=skipped,
    )  # fmt: skip
    estimate = PoisonEstimate(
        poisoned=False, rate=0.0, rate_low=0.0, rate_high=0.0, target_labels=(), odd_labels=found.odd, evidence={},
        reason=found.reason,
    )  # fmt: skip
    split = Split(
        method=method, ids=scores.ids, labels=scores.labels, region=region, class_names=scores.class_names,
        estimate=estimate,
    )  # fmt: skip
    flagged = Counter(source.class_names[label] for label in split.labels[split.suspect])
    scan = DatasetScan(
        source=source.name,
        method=method,
        samples=len(source),
        class_names=source.class_names,
        estimate=estimate,
        flagged=len(split.suspect),
        flagged_per_class={name: flagged.get(name, 0) for name in source.class_names},
        skipped=skipped,
        ranks_only=True,
        warnings=(),
        not_covered=LIMITS,
        seconds=time.monotonic() - begun,
        seed=run.seed,
        config=asdict(config),
        inputs={"network": arch if classifier is None else hash_weights(classifier.weights())},
    )
    return ScanOutcome(scan=scan, scores=scores, split=split, samples=describe_samples(source, scores, split, None))


def highest(scores: Float[np.ndarray, " k"], assumed_rate: float) -> Bool[np.ndarray, " k"]:
    """The 1.5 ``assumed_rate`` highest scores of the whole set. Spectral signatures' authors remove that share of each
    label; a set that is poisoned toward one label has most of its poison there."""
    count = round(1.5 * assumed_rate * len(scores))
    flagged = np.zeros(len(scores), dtype=bool)
    flagged[np.argsort(-scores, kind="stable")[:count]] = True
    return flagged


def _ranked(config: DetectorConfig) -> str:
    return (
        f"This detector ranks samples and decides nothing: the {150 * config.assumed_rate:.1f} percent of highest "
        f"scores are flagged, which is 1.5 times the assumed poisoning rate of {100 * config.assumed_rate:g} percent."
    )


__all__ = ["NETWORK_DETECTORS", "DetectorConfig", "scan_with_detector"]
