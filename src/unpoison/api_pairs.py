"""Scans of image-caption pairs with detectors that look at what a CLIP makes of them.

from unpoison import load_any_clip, open_pairs, scan_pairs

A further detector is a function of ``Embedded`` and one entry of ``PAIR_DETECTORS`` (and of the catalog).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from unpoison.api import ScanOutcome, choose_examples, thumbnail
from unpoison.api_detectors import highest
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import load_pixels
from unpoison.detection import neighbours
from unpoison.detection.exposure import Exposure, ExposureConfig, expose_pairs
from unpoison.detection.neighbours import NeighboursConfig, score_neighbourhoods
from unpoison.detection.ranks import mean_of_ranks
from unpoison.detection.reference_similarity import DensityConfig, density_of_least_similar, low_similarity
from unpoison.detection.similarity_gain import OverfitConfig, similarity_gain
from unpoison.embedded_pairs import Embedded, check_texts, see_pairs
from unpoison.errors import ConfigError, NoSeparationError, NotEnoughDataError, UnknownMethodError, UsageError
from unpoison.evidence import MIN_SAMPLES
from unpoison.results import (
    CLEAN,
    REGION_NAMES,
    SKIPPED,
    SUSPECT,
    DatasetScan,
    PoisonEstimate,
    Region,
    SampleScores,
    SkippedRow,
    Split,
)
from unpoison.runs import Run
from unpoison.types import ImageTextModel

PAIR_LIMITS = (
    "Poison that left no trace in the embeddings of this CLIP, above all where it was not trained on these pairs.",
    "Whether the set is poisoned at all: pairs of any set can be ranked, of clean ones too.",
    "Odd but harmless pairs (drawings, logos, rare languages) lie apart as well and rank high.",
    "The weights of any model: this looked at data only.",
)
POISONED_LIMITS = (
    PAIR_LIMITS[0],
    "A second backdoor with another target: one group of pairs stands out.",
    "How much poison there is where it is rare: of about 1 percent several times as much may be counted.",
    *PAIR_LIMITS[2:],
)
_CAPTION_CHARACTERS = 500

Axes = dict[str, Float[np.ndarray, " k"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """Scores of the usable pairs, the first of ``axes`` ranks; which are ``flagged`` and what follows, where a detector
    says so itself."""

    axes: Axes
    flagged: Bool[np.ndarray, " k"] | None = None
    estimate: PoisonEstimate | None = None


@dataclass(frozen=True, kw_only=True)
class PairDetectorConfig:
    """Settings of all detectors of pairs; each reads its own and ``assumed_rate``."""

    assumed_rate: float = 0.005
    """Share of the pairs that is taken for poison: 1.5 times as many are flagged. Ours; attacks' papers take 0.003."""
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)
    density: DensityConfig = field(default_factory=DensityConfig)
    exposure: ExposureConfig = field(default_factory=ExposureConfig)
    overfit: OverfitConfig = field(default_factory=OverfitConfig)

    def __post_init__(self) -> None:
        if not 0 < self.assumed_rate < 0.5:
            raise ConfigError(f"expected assumed_rate in (0, 0.5), got {self.assumed_rate}.", hint="Try 0.005.")


@dataclass(frozen=True, kw_only=True)
class PairDetector:
    """What ranks the pairs, and which models have to be asked for that."""

    score: Callable[[Embedded, PairDetectorConfig, Run], Ranked]
    suspect: bool = True
    reference: bool = False
    captions: bool = False
    """It looks at what the captions say to the reference."""
    reads: tuple[str, ...] = ()
    """The models that must tell the captions apart: what is said is all that these have to go by."""
    batches: bool = False
    """It takes poison for rarer than k in a batch."""


def _neighbourhoods(*names: str) -> Callable[[Embedded, PairDetectorConfig, Run], Ranked]:
    def score(known: Embedded, config: PairDetectorConfig, run: Run) -> Ranked:
        formulas = {name.replace("-", "_"): neighbours.FORMULAS[name] for name in names}
        seed = run.seed_of("neighbours")
        suspect = _asked(known.suspect)
        return Ranked(axes=score_neighbourhoods(suspect, formulas, config.neighbours, seed=seed, progress=run.progress))

    return score


def _similarity(known: Embedded, config: PairDetectorConfig, run: Run) -> Ranked:
    return Ranked(axes={"low_similarity": low_similarity(_asked(known.cosines))})


def _density(known: Embedded, config: PairDetectorConfig, run: Run) -> Ranked:
    low = low_similarity(_asked(known.cosines))
    dense = density_of_least_similar(low, _asked(known.suspect), config.density)
    return Ranked(axes={"density": dense, "low_similarity": low})


def _exposure(known: Embedded, config: PairDetectorConfig, run: Run) -> Ranked:
    low = low_similarity(_asked(known.cosines))
    misfit = None if known.alone else _asked(known.misfit)
    found = expose_pairs(low, _asked(known.suspect), _asked(known.captions), config.exposure, misfit=misfit)
    axes = {"exposure": found.scores, "probe": found.probe, "low_similarity": low}
    if known.alone:  # what confirms a group is that two models agree on it
        return Ranked(axes=axes)
    return Ranked(axes=axes, flagged=found.above, estimate=estimate_poison(found, config.exposure))


def _gain(known: Embedded, config: PairDetectorConfig, run: Run) -> Ranked:
    pixels = load_pixels(known.pairs, known.clip.image_size, cache=run.cache, progress=run.progress)
    gain = similarity_gain(known.clip, known.pairs, pixels, known.rows, _asked(known.cosines), config.overfit, run=run)
    return Ranked(axes={"similarity_gain": gain} | _similarity(known, config, run).axes)


def _mean(known: Embedded, config: PairDetectorConfig, run: Run) -> Ranked:
    axes = _neighbourhoods("dao")(known, config, run).axes | _density(known, config, run).axes
    return Ranked(axes={"mean_of_ranks": mean_of_ranks(axes.values())} | axes)


PAIR_DETECTORS: dict[str, PairDetector] = {
    "dao": PairDetector(score=_neighbourhoods("dao"), batches=True),
    "slof": PairDetector(score=_neighbourhoods("slof"), batches=True),
    "k-distance": PairDetector(score=_neighbourhoods("k-distance"), batches=True),
    "similarity": PairDetector(score=_similarity, suspect=False, reference=True),
    "density": PairDetector(score=_density, reference=True),
    "exposure": PairDetector(score=_exposure, reference=True, captions=True, reads=("reference",)),
    "gain": PairDetector(score=_gain, reference=True, reads=("suspect", "reference")),
    "mean": PairDetector(score=_mean, reference=True, batches=True),
}


def scan_pairs(
    pairs: ImageTextPairs,
    *,
    clip: ImageTextModel,
    reference: ImageTextModel | None = None,
    method: str = "dao",
    config: PairDetectorConfig | None = None,
    run: Run | None = None,
) -> ScanOutcome:
    """Rank image-caption pairs by suspicion with one of PAIR_DETECTORS.

    ``clip``: the suspect, trained on these pairs. ``reference``: a CLIP that never saw them, for the detectors whose
    entry asks for one. Only ``exposure`` with two different models can say that a set is poisoned, and none that it is
    clean: all other scans are inconclusive. Scores, split and samples have no labels (-1) and no class names.
    Raises NotEnoughDataError, SourceFormatError (too many unusable rows), NoSeparationError (all scores, or the
    embeddings that they rest on, are equal), UnknownMethodError, UsageError (a reference is missing), ModelError.
    """
    run, config = run or Run(), config or PairDetectorConfig()
    begun = time.monotonic()
    detector = find_pair_detector(method)
    if detector.reference and reference is None:
        raise UsageError(
            f"{method} compares images and captions under a reference CLIP, and none is given.",
            hint="Give one that was not trained on these pairs, load_clip('tiny') for example.",
        )
    if len(pairs) < MIN_SAMPLES:
        raise NotEnoughDataError(
            f"pairs in {pairs.name}", have=len(pairs), need=MIN_SAMPLES, hint="Give the whole training set."
        )
    asked = {"suspect": clip} if detector.suspect else {}
    if detector.reference and reference is not None:
        asked["reference"] = reference
    if detector.reads:
        check_texts(pairs, np.arange(len(pairs)), {role: asked[role] for role in detector.reads}, run=run)
    known = see_pairs(
        pairs,
        clip=clip,
        reference=reference if detector.reference else None,
        suspect=detector.suspect,
        captions=detector.captions,
        run=run,
    )
    found = detector.score(known, config, run)
    axes = found.axes
    primary = next(iter(axes))
    _check_separation(axes[primary], method)
    flagged = np.zeros(len(pairs), dtype=bool)
    flagged[known.rows] = highest(axes[primary], config.assumed_rate) if found.flagged is None else found.flagged
    return ranked_outcome(
        known,
        {name: known.spread(values) for name, values in axes.items()},
        flagged,
        method=method,
        estimate=found.estimate or nothing_decided(_ranked(config)),
        warnings=_crowded(config, len(known.rows)) if detector.batches else (),
        config=asdict(config),
        models=asked,
        seconds=time.monotonic() - begun,
        run=run,
    )


def ranked_outcome(
    known: Embedded,
    axes: Axes,
    flagged: Bool[np.ndarray, " n"],
    *,
    method: str,
    estimate: PoisonEstimate,
    warnings: tuple[str, ...],
    config: dict[str, Any],
    models: Mapping[str, ImageTextModel],
    seconds: float,
    run: Run,
) -> ScanOutcome:
    """Scores of all pairs, NaN for unusable ones, as a scan; the first of ``axes`` ranks."""
    pairs = known.pairs
    region: Region = np.full(len(pairs), SKIPPED, dtype=np.int8)
    region[known.rows] = np.where(flagged[known.rows], SUSPECT, CLEAN)
    labels = np.full(len(pairs), -1, dtype=np.int64)
    scores = SampleScores(
        method=method, ids=list(pairs.ids), labels=labels, class_names=(), axes=axes, primary=next(iter(axes)),
        skipped=known.skipped,
    )  # fmt: skip
    split = Split(
        method=method, ids=scores.ids, labels=labels, region=region, class_names=(), estimate=estimate
    )  # fmt: skip
    scan = DatasetScan(
        source=pairs.name,
        method=method,
        samples=len(pairs),
        class_names=(),
        estimate=estimate,
        flagged=len(split.suspect),
        flagged_per_class={},
        skipped=known.skipped,
        ranks_only=not estimate.poisoned,
        captioned=True,
        warnings=known.warnings + warnings,
        not_covered=POISONED_LIMITS if estimate.poisoned else PAIR_LIMITS,
        seconds=seconds,
        seed=run.seed,
        config=config,
        inputs={name: model.fingerprint for name, model in models.items()} | {"pairs_content": pairs.fingerprint},
        clip=models["suspect"].fingerprint if "suspect" in models else None,
    )
    return ScanOutcome(scan=scan, scores=scores, split=split, samples=describe_pairs(pairs, scores, split))


def nothing_decided(reason: str) -> PoisonEstimate:
    """Of a detector that ranks, or of a set in which nothing stood out."""
    return PoisonEstimate(
        poisoned=False, rate=0.0, rate_low=0.0, rate_high=0.0, target_labels=(), evidence={}, reason=reason
    )


def estimate_poison(exposure: Exposure, config: ExposureConfig) -> PoisonEstimate:
    """Poisoned where a group of pairs stands out, else undecided: little poison does not."""
    rank = f"{100 * exposure.confirmation:.0f} percent of the pairs, 50 by chance"
    misfit = exposure.misfit or 0.0
    fits = f"{100 * misfit:.0f} percent of other pairs' captions fit their images better than their own"
    if not exposure.exposed:
        found = (
            "No group of pairs stands out: what the most suspicious have in common points at others that are more "
            f"suspicious than {rank}; "
        )
        if exposure.confirmation < config.confirmation:
            return nothing_decided(f"{found}{100 * config.confirmation:.0f} are asked for.")
        return nothing_decided(
            f"{found}but only {fits}, where {100 * config.misfit:.0f} are asked for: the reference finds them hard, it "
            "does not find them wrong."
        )
    return PoisonEstimate(
        poisoned=True,
        rate=exposure.rate,
        rate_low=exposure.rates[0],
        rate_high=exposure.rates[1],
        target_labels=(),
        evidence={"mean_rank": exposure.confirmation, "misfit": misfit},
        reason=(
            "A group of pairs stands out: what they have in common points at others more suspicious than "
            f"{rank}, and {fits}. About {100 * exposure.rate:.1f} percent of the set belong to it."
        ),
    )


def find_pair_detector(method: str) -> PairDetector:
    """The detector of this name. Raises UnknownMethodError with the closest."""
    if method not in PAIR_DETECTORS:
        raise UnknownMethodError(method, PAIR_DETECTORS, kind="detector of pairs")
    return PAIR_DETECTORS[method]


def describe_pairs(pairs: ImageTextPairs, scores: SampleScores, split: Split) -> list[dict[str, Any]]:
    """What the report shows: the most suspicious pairs and a few clean ones, with captions and thumbnails."""
    chosen = choose_examples(scores, split)
    pictures = pairs.decode(np.array(chosen, dtype=np.int64))
    entries = []
    for row, image, captions in zip(chosen, pictures, pairs.captions(chosen), strict=True):
        if not isinstance(image, SkippedRow):
            entries.append(
                {
                    "id": scores.ids[row],
                    "label": "",
                    "caption": _safe_text(" | ".join(captions))[:_CAPTION_CHARACTERS],
                    "region": REGION_NAMES[int(split.region[row])],
                    "thumbnail": thumbnail(image),
                    "score": float(scores.suspicion[row]),
                }
            )
    return entries


def _crowded(config: PairDetectorConfig, total: int) -> tuple[str, ...]:
    """A warning where at the assumed rate poison has neighbours enough among its own."""
    batch = min(config.neighbours.batch_size or total, total)
    together = config.assumed_rate * batch
    if config.assumed_rate < config.neighbours.most_poison(total):
        return ()
    return (
        f"At the assumed rate {together:.0f} poisoned pairs are in a batch of {batch:,} and are each other's "
        f"{config.neighbours.k} neighbours: they rank low. Lower neighbours.batch_size.",
    )


def _asked(values: np.ndarray | None) -> np.ndarray:
    if values is None:
        raise RuntimeError("the detector's entry does not say that it asks this model")
    return values


def _check_separation(scores: Float[np.ndarray, " k"], method: str) -> None:
    if np.ptp(scores) == 0:
        raise NoSeparationError(
            f"{method}: all {len(scores):,} pairs have the same score.", hint="Try another method or another model."
        )


def _safe_text(text: str) -> str:
    """Without lone surrogates, which no file in UTF-8 can hold."""
    return text.encode(errors="backslashreplace").decode()


def _ranked(config: PairDetectorConfig) -> str:
    return (
        f"This detector ranks pairs and decides nothing: the {150 * config.assumed_rate:g} percent of highest scores "
        f"are flagged, which is 1.5 times the assumed poisoning rate of {100 * config.assumed_rate:g} percent."
    )


__all__ = ["PAIR_DETECTORS", "PairDetector", "PairDetectorConfig", "scan_pairs"]
