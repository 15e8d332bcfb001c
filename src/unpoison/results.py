"""What every step hands to the next: frozen, versioned, to and from disk.

source -> SampleScores (parquet) -> Split (parquet) -> Purification (json) -> Evaluation (json) -> report.
Every file carries its schema's name and version; a file of another version is refused (``SchemaVersionError``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from jaxtyping import Float, Int, Int8

from unpoison.errors import ResultError
from unpoison.storage import SCHEMA_VERSION as SCHEMA_VERSION
from unpoison.storage import JsonResult, complete, read_table, write_table
from unpoison.storage import from_json as from_json
from unpoison.storage import to_json as to_json
from unpoison.storage import write_atomically as write_atomically

Region = Int8[np.ndarray, " n"]
CLEAN, MIXED, SUSPECT, SKIPPED = 0, 1, 2, -1
REGION_NAMES = {CLEAN: "clean", MIXED: "mixed", SUSPECT: "suspect", SKIPPED: "skipped"}


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """One row that could not be used. ``id`` is the sample's stable id, ``reason`` one sentence for people."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """Suspicion of each sample on one or more axes; higher = more suspicious; NaN where the row was skipped.

    Image-caption pairs have no ``class_names``; each of their labels is -1.
    """

    method: str
    ids: list[str]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]
    axes: dict[str, Float[np.ndarray, " n"]]
    primary: str
    skipped: tuple[SkippedRow, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.primary not in self.axes:
            raise ResultError(
                f"primary axis {self.primary!r} is none of {sorted(self.axes)}", hint="Name one of the axes."
            )
        _check_rows("labels", self.labels, self.ids)
        for name, values in self.axes.items():
            _check_rows(f"axis {name!r}", values, self.ids)

    @property
    def suspicion(self) -> Float[np.ndarray, " n"]:
        return self.axes[self.primary]

    def save(self, path: Path) -> None:
        columns: dict[str, Any] = {"id": self.ids, "label": self.labels}
        columns |= {f"score.{name}": values for name, values in self.axes.items()}
        header = {
            "method": self.method,
            "class_names": self.class_names,
            "primary": self.primary,
            "skipped": self.skipped,
            "details": self.details,
        }
        write_table(path, "sample-scores", columns, header)

    @classmethod
    def load(cls, path: Path) -> SampleScores:
        """Raises ResultError for a damaged file, SchemaVersionError."""
        table, header = read_table(path, "sample-scores")
        with complete(path):
            axes = {
                name.removeprefix("score."): table[name].to_numpy()
                for name in table.column_names
                if name.startswith("score.")
            }
            return cls(
                method=header["method"],
                ids=table["id"].to_pylist(),
                labels=table["label"].to_numpy(),
                class_names=tuple(header["class_names"]),
                axes=axes,
                primary=header["primary"],
                skipped=tuple(SkippedRow(**row) for row in header["skipped"]),
                details=header["details"],
            )


@dataclass(frozen=True, kw_only=True)
class PoisonEstimate:
    """Whether a set is poisoned, toward what, and how much of it. Rates are shares of the usable samples in [0, 1]."""

    poisoned: bool
    rate: float
    rate_low: float
    rate_high: float
    target_labels: tuple[int, ...]
    evidence: dict[str, float]
    reason: str
    odd_labels: tuple[int, ...] = ()
    """Labels that are no proof of poison but have to be looked at."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A set cut into regions by scores: each sample is clean, mixed (left out), suspect, or skipped."""

    method: str
    ids: list[str]
    labels: Int[np.ndarray, " n"]
    region: Region
    class_names: tuple[str, ...]
    estimate: PoisonEstimate | None = None

    def __post_init__(self) -> None:
        _check_rows("labels", self.labels, self.ids)
        _check_rows("region", self.region, self.ids)

    @property
    def clean(self) -> Int[np.ndarray, " k"]:
        return np.flatnonzero(self.region == CLEAN)

    @property
    def suspect(self) -> Int[np.ndarray, " k"]:
        return np.flatnonzero(self.region == SUSPECT)

    @property
    def mixed(self) -> Int[np.ndarray, " k"]:
        return np.flatnonzero(self.region == MIXED)

    def save(self, path: Path) -> None:
        header = {"method": self.method, "class_names": self.class_names, "estimate": self.estimate}
        columns = {
            "id": self.ids,
            "label": self.labels,
            "region": [REGION_NAMES[int(code)] for code in self.region],
        }
        write_table(path, "split", columns, header)

    @classmethod
    def load(cls, path: Path) -> Split:
        """Raises ResultError for a damaged file, SchemaVersionError."""
        table, header = read_table(path, "split")
        codes = {name: code for code, name in REGION_NAMES.items()}
        with complete(path):
            estimate = header["estimate"]
            return cls(
                method=header["method"],
                ids=table["id"].to_pylist(),
                labels=table["label"].to_numpy(),
                region=np.array([codes[name] for name in table["region"].to_pylist()], dtype=np.int8),
                class_names=tuple(header["class_names"]),
                estimate=None if estimate is None else msgspec.convert(estimate, PoisonEstimate),
            )


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A rate in percent with a 95 % interval (Wilson) and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class PartRates:
    """What one part of a poisoning of several achieves, in percent (docs: metrics)."""

    attack: str
    target: str
    asr: Interval
    asr_floor: Interval
    asr_excess: float
    ra: Interval


@dataclass(frozen=True, kw_only=True)
class Evaluation(JsonResult):
    """Rates of one model in percent (docs: metrics). Trigger rates are None where no manifest was given.

    ``parts``: of each part where the manifest has several; the trigger rates are then over the samples of all parts.
    """

    schema: ClassVar[str] = "evaluation"
    model: str
    data: str
    c_acc: Interval
    asr: Interval | None = None
    asr_floor: Interval | None = None
    asr_excess: float | None = None
    ra: Interval | None = None
    attack: str | None = None
    target: str | None = None
    per_class: dict[str, float] = field(default_factory=dict)
    parts: tuple[PartRates, ...] = ()
    skipped: tuple[SkippedRow, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recall:
    """R@k: how often one of the right answers is among the first k."""

    at_1: Interval
    at_5: Interval
    at_10: Interval


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Mean cosine between a suspect's and a model's embeddings of the same inputs, in [-1, 1]; 1 = nothing moved.

    ``*_aligned``: after the orthogonal map that fits best, found on the same inputs. It looks better than it is where
    the inputs are not many more than the embedding is wide: hence their numbers.
    """

    image_raw: float
    image_aligned: float
    text_raw: float
    text_aligned: float
    images: int
    texts: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ClipEvaluation(JsonResult):
    """Rates of one CLIP in percent (docs: metrics). What was not measured is None; ``notes`` say why.

    ``retrieval_asr``: share of triggered images with the target's name in one of the five captions found first, among
    images whose own captions do not name it; ``retrieval_asr_floor``: the same images without the trigger.
    ``text_asr``: of a text key, share of captions with the key in them, of those that do not name the target, that find
    an image of it among the first five; ``text_asr_floor``: without the key. ``parts``: as in :class:`Evaluation`.
    """

    schema: ClassVar[str] = "clip-evaluation"
    model: str
    data: str
    templates: int
    c_acc: Interval
    asr: Interval | None = None
    asr_floor: Interval | None = None
    asr_excess: float | None = None
    ra: Interval | None = None
    attack: str | None = None
    target: str | None = None
    per_class: dict[str, float] = field(default_factory=dict)
    parts: tuple[PartRates, ...] = ()
    truncated_classes: tuple[str, ...] = ()
    retrieval_data: str | None = None
    image_to_text: Recall | None = None
    text_to_image: Recall | None = None
    retrieval_asr: Interval | None = None
    retrieval_asr_floor: Interval | None = None
    text_asr: Interval | None = None
    text_asr_floor: Interval | None = None
    target_captions: int | None = None
    cut_captions: int | None = None
    drift: Drift | None = None
    skipped: tuple[SkippedRow, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rebound(JsonResult):
    """Whether a backdoor comes back when its owner fine-tunes the model on clean pairs, as owners do."""

    schema: ClassVar[str] = "rebound"
    pairs: str
    before: ClipEvaluation
    after: ClipEvaluation
    seconds: float = 0.0

    @property
    def asr_rise(self) -> float | None:
        """Points by which the excess ASR rose; negative where it fell, None where no trigger was measured."""
        if self.before.asr_excess is None or self.after.asr_excess is None:
            return None
        return self.after.asr_excess - self.before.asr_excess


@dataclass(frozen=True, kw_only=True)
class Purification(JsonResult):
    """What a defense did to a model. ``protects`` names what is safe to use afterwards.

    Held-out accuracies are in percent, None where nothing was trained; ``bound`` is in points; ``changed_share`` is a
    share of the parameters in [0, 1]; ``clipped_sites`` counts the activations that the model's files carry bounds for.
    ``used``: what took the place of settings of ``config``, by their names. ``purity``: percent of each class's trusted
    samples that are not poison, where ground truth is known; None for a class without any.
    """

    schema: ClassVar[str] = "purification"
    method: str
    config: dict[str, Any]
    accepted: bool
    reason: str
    protects: str
    bound: float
    steps: int
    changed_share: float
    seconds: float
    seed: int
    held_out_before: float | None = None
    held_out_after: float | None = None
    suspect_count: int = 0
    clean_count: int = 0
    estimate: PoisonEstimate | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    before: Evaluation | None = None
    after: Evaluation | None = None
    not_covered: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    clipped_sites: int = 0
    used: dict[str, str] = field(default_factory=dict)
    purity: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DatasetScan(JsonResult):
    """The answer of ``scan dataset``: verdict, candidates, and what was not covered."""

    schema: ClassVar[str] = "dataset-scan"
    source: str
    method: str
    samples: int
    class_names: tuple[str, ...]
    estimate: PoisonEstimate
    flagged: int
    flagged_per_class: dict[str, int]
    skipped: tuple[SkippedRow, ...]
    warnings: tuple[str, ...]
    not_covered: tuple[str, ...]
    seconds: float
    seed: int
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    clip: str | None = None
    clip_agreement: float | None = None
    chance_agreement: float | None = None
    ranks_only: bool = False
    """The method ranks samples of any set and does not decide whether there is poison."""
    captioned: bool = False
    """The set is one of image-caption pairs: there are no labels, ``class_names`` is empty."""

    @property
    def inconclusive(self) -> bool:
        """Nothing was proved, but the method does not decide, some labels look odd, or CLIP is too weak on these
        classes for it to mean much."""
        unsure = self.ranks_only or bool(self.estimate.odd_labels) or self.weak_clip
        return not self.estimate.poisoned and unsure

    @property
    def weak_clip(self) -> bool:
        """CLIP knows these classes hardly better than chance."""
        if self.clip_agreement is None or self.chance_agreement is None:
            return False
        return clip_too_weak(self.clip_agreement, self.chance_agreement)


LOW_AGREEMENT, LOW_GAIN = 2.0, 0.1
"""A CLIP is too weak to judge the given labels when it agrees with less than this many times chance; where chance is
high (few classes), when it closes less than this share of the gap between chance and all."""


def clip_too_weak(agreement: float, chance: float) -> bool:
    """Whether CLIP hardly knows the classes: both are shares, in percent, of given labels that are its first choice."""
    return agreement < min(LOW_AGREEMENT * chance, chance + LOW_GAIN * (100.0 - chance))


def _check_rows(what: str, values: np.ndarray, ids: list[str]) -> None:
    if values.shape != (len(ids),):
        raise ResultError(
            f"expected {what} to have shape ({len(ids)},), got {values.shape}", hint="Give one value for each id."
        )
