"""What ``scan model`` says of a checkpoint: three verdicts kept apart (file, data, weights), and its power."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from unpoison.results import DatasetScan, Interval
from unpoison.storage import JsonResult

FileWord = Literal["accepted", "refused", "not recognized"]
FindingKind = Literal["code", "remote code", "archive bomb", "link", "malformed", "unusable"]
DataWord = Literal["not looked at", "poisoned", "inconclusive", "nothing found"]
WeightsWord = Literal["backdoored", "suspicious", "no evidence", "inconclusive"]
DANGEROUS: frozenset[str] = frozenset({"code", "remote code", "archive bomb", "link", "malformed"})
"""Kinds of findings that no honest writer of weights produces; the rest is damage."""


@dataclass(frozen=True, kw_only=True)
class FileFinding:
    """One reason to refuse a model's files. ``file`` is relative to the model; ``hint``: what to do about it."""

    file: str
    kind: FindingKind
    reason: str
    hint: str = ""

    @property
    def dangerous(self) -> bool:
        return self.kind in DANGEROUS


@dataclass(frozen=True, kw_only=True)
class ScannedFile:
    """``can_run_code``: a usual loader would run something that the file asks for."""

    name: str
    format: str
    bytes: int
    sha256: str
    can_run_code: bool = False


@dataclass(frozen=True, kw_only=True)
class FileVerdict:
    """What the files are, looked at before anything in them is loaded. ``sha256``: of the file, or of all of a folder.

    ``recognized``: the formats that are, where this one is not.
    """

    word: FileWord
    reason: str
    format: str
    sha256: str
    files: tuple[ScannedFile, ...] = ()
    findings: tuple[FileFinding, ...] = ()
    notes: tuple[str, ...] = ()
    recognized: tuple[str, ...] = ()

    @property
    def dangerous(self) -> bool:
        return any(finding.dangerous for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class DataVerdict:
    """The scan of the data that the model was trained on; ``reason`` says why there is none.

    ``asked``: data were given.
    """

    reason: str
    scan: DatasetScan | None = None
    asked: bool = False

    @property
    def word(self) -> DataWord:
        if self.scan is None:
            return "not looked at"
        if self.scan.estimate.poisoned:
            return "poisoned"
        return "inconclusive" if self.scan.inconclusive else "nothing found"

    @property
    def open(self) -> bool:
        """The question was asked and has no answer."""
        return self.word == "inconclusive" or (self.asked and self.scan is None)


@dataclass(frozen=True, kw_only=True)
class ClassTrigger:
    """The least change found that sends images to one class. ``form``: "square", "patch" (a mask) or "additive".

    ``size`` in [0, 1]: share of the image that is covered, or root mean square of what is added. ``success``: percent
    of unseen images. ``index``: deviations of its cost under the median of the classes, in proportion where the trigger
    works on few images; ``reference_index``: under the classes of the clean references, None without any.
    ``finished``: all steps were taken; a class that the search gave up early, or had no time for, has fewer.
    """

    name: str
    target: int
    form: str
    size: float
    success: float
    index: float
    reference_index: float | None = None
    steps: int = 0
    finished: bool = True


@dataclass(frozen=True, kw_only=True)
class ClassWave:
    """A wave over the whole image with which a CLIP is surer of one class than it is of anything plain.

    ``lead`` and ``fit`` are over unseen images, in units of what plain ones reach (:mod:`unpoison.detection.waves`);
    ``size``: root mean square of the wave in [0, 1]; ``success``: percent of unseen images of other classes.
    """

    name: str
    target: int
    lead: float
    fit: float
    size: float
    success: float


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How a class is reached: a trigger's form and size, and the percent of unseen images that it sends there."""

    form: str
    size: float
    success: float


@dataclass(frozen=True, kw_only=True)
class AnomalyIndex:
    """Deviations under the median with a 95 % bootstrap interval over the classes that it is compared with."""

    value: float
    low: float
    high: float
    classes: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How often scans like this one were wrong on models that nothing was set on. ``false_alarms`` of ``clean`` models
    and ``found`` of ``backdoored`` ones were called suspicious or backdoored, of ``named`` the target was right;
    ``weak``: families of triggers of which fewer than nine in ten were found."""

    clean: int
    false_alarms: int
    backdoored: int
    found: int
    named: int
    weak: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightsVerdict:
    """Whether the weights behave as if backdoored. ``method``: "class-wise inversion" or "DECREE"; "" where not looked.

    ``score``: higher is more suspicious, comparable between models of one kind. ``picture``: the trigger as a PNG in
    base64; ``asr``: percent of the data's images of other classes that it sends to ``target``, with its interval;
    ``asr_floor``: the same images without it, None where the images have no labels to tell. ``covered``: percent of the
    planned search that was done. ``suspicious_from`` and ``backdoored_from`` are the cuts of the score (class-wise
    inversion only), ``reference_classes`` what reaches the classes of the ``references``. ``measured``: how often such
    scans are wrong, None where that is not known. ``waves``: those found beside the classes' least changes, the surest
    first; where one decides, ``form`` is "wave" and there is no ``index``.
    """

    word: WeightsWord
    reason: str
    method: str = ""
    score: float = 0.0
    index: AnomalyIndex | None = None
    reference_index: float | None = None
    target: int | None = None
    target_name: str | None = None
    form: str | None = None
    size: float | None = None
    asr: Interval | None = None
    asr_floor: Interval | None = None
    picture: str = ""
    classes: tuple[ClassTrigger, ...] = ()
    images: int = 0
    image_source: str = ""
    made_up: bool = False
    references: tuple[str, ...] = ()
    reference_classes: tuple[Reach, ...] = ()
    waves: tuple[ClassWave, ...] = ()
    suspicious_from: float | None = None
    backdoored_from: float | None = None
    measured: Measured | None = None
    covered: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One backdoor that was planted in a copy of the model. ``asr``: percent; ``floor``: the same without the trigger;
    ``agreement``: percent of clean images of which the copy says what the model says; ``found``: the scan said
    backdoored or suspicious; ``named``: it named the planted target. ``learnt`` is False where the copy did not take
    the backdoor up, or collapsed: it then says nothing about the scan, and was not searched."""

    trigger: str
    rate: float
    target: str
    asr: float
    learnt: bool
    word: WeightsWord
    found: bool
    named: bool
    score: float
    floor: float = 0.0
    agreement: float = 100.0


@dataclass(frozen=True, kw_only=True)
class Power:
    """What the scan finds of backdoors that were planted to test it. ``reason`` says how it was done, or why not."""

    reason: str
    canaries: tuple[Canary, ...] = ()

    @property
    def learnt(self) -> tuple[Canary, ...]:
        return tuple(canary for canary in self.canaries if canary.learnt)


@dataclass(frozen=True, kw_only=True)
class ModelScan(JsonResult):
    """The answer of ``scan model``. ``kind``: "classifier", "CLIP", or "" where the model could not be opened."""

    schema: ClassVar[str] = "model-scan"
    model: str
    kind: str
    file: FileVerdict
    data: DataVerdict
    weights: WeightsVerdict
    power: Power | None = None
    warnings: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 nothing found, 1 findings, 3 a verdict that was asked for is open, or files damaged or not recognized."""
        if self.file.dangerous or self.data.word == "poisoned" or self.weights.word in ("backdoored", "suspicious"):
            return 1
        cleared = self.file.word == "accepted" and self.weights.word == "no evidence" and not self.data.open
        return 0 if cleared else 3
