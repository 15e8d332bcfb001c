"""What a training on pairs did to a CLIP, as a result on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from unpoison.results import ClipEvaluation, SkippedRow
from unpoison.storage import JsonResult

ATTACK_LEFT = 5.0
"""Excess ASR, in points, from which on a tested trigger is said to still work."""


@dataclass(frozen=True, kw_only=True)
class FoundTrigger:
    """The least change of an image found that makes the model say a concept, which ``caption`` is typical of.

    ``size`` in [0, 1]: root mean square of what is added to the image. ``success``: percent of unseen images.
    ``index``: deviations under the median of all concepts' sizes. ``picture``: what is added, as a PNG in base64.
    """

    caption: str
    size: float
    success: float
    index: float
    suspected: bool
    picture: str = ""


@dataclass(frozen=True, kw_only=True)
class TriggerFinding:
    """The search for a trigger before a repair, smallest trigger first; ``reason`` says what came of it."""

    reason: str
    found: tuple[FoundTrigger, ...]

    @property
    def suspected(self) -> tuple[FoundTrigger, ...]:
        return tuple(entry for entry in self.found if entry.suspected)


@dataclass(frozen=True, kw_only=True)
class UnlearntWord:
    """A word that many suspicious captions share, and the mean cosine that leaving it out costs them."""

    word: str
    captions: int
    fall: float


@dataclass(frozen=True, kw_only=True)
class PairExposure:
    """Which of its own training pairs a CLIP's repair rests on.

    ``confirmation``: mean rank of first suspicion, in [0, 1], of unseen pairs like the ``seeds``, 0.5 by chance;
    ``misfit``: mean share of others' captions that fit these pairs' images better, None where no reference could tell;
    ``rate``: percent of the pairs that are like them, a rough count. ``judged_*``: mean cosine of ``judges`` suspicious
    pairs, kept aside, with their captions; ``level``: that of pairs that do not belong together. None where nothing was
    unlearnt.
    """

    exposed: bool
    confirmation: float
    rate: float
    seeds: int
    unlearnt: int = 0
    judges: int = 0
    level: float | None = None
    judged_before: float | None = None
    judged_after: float | None = None
    misfit: float | None = None
    words: tuple[UnlearntWord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClipPurification(JsonResult):
    """What a method did to a CLIP. ``accepted`` is about held-out pairs alone: no trigger is known to the method.

    Held-out accuracy: percent of held-out images and captions that find each other among at most 100 (``chance``: by
    guessing). ``image_cosine`` and ``text_cosine``: mean cosine of new embeddings with the given model's; what was
    built on those (an index, a head) still fits near 1 only. ``bound``: the largest fall accepted, in points.
    ``stopped`` says why the kept weights, those of ``steps``, are not those of ``planned_steps``, "" where they are.
    ``inputs`` are content hashes and versions.
    """

    schema: ClassVar[str] = "clip-purification"
    method: str
    config: dict[str, Any]
    accepted: bool
    reason: str
    protects: str
    bound: float
    steps: int
    planned_steps: int
    batch_size: int
    seconds: float
    seed: int
    held_out_before: float
    held_out_after: float
    chance: float
    image_cosine: float
    text_cosine: float
    trained_pairs: int
    held_out_pairs: int
    synthetic_pairs: int = 0
    """How many of the pairs that were opened are made up, as the caller says."""
    truncated_captions: int = 0
    """Different captions that the tokenizer cuts off."""
    stopped: str = ""
    warnings: tuple[str, ...] = ()
    skipped: tuple[SkippedRow, ...] = ()
    history: list[dict[str, float]] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    search: TriggerFinding | None = None
    """None where no trigger was looked for."""
    exposure: PairExposure | None = None
    """None where the pairs were taken to be clean."""
    left_alone: bool = False
    """Nothing suspicious was found, or it could not be unlearnt: the model is the given one, to the bit."""
    before: ClipEvaluation | None = None
    after: ClipEvaluation | None = None
    not_covered: tuple[str, ...] = ()
    command: str = ""
    """The shell command that repeats the run, "" where it was none."""

    @property
    def undecided(self) -> bool:
        """The pairs were ranked, nothing could be decided by that, and nothing was done."""
        return self.left_alone and not self.accepted and self.exposure is not None and not self.exposure.exposed

    @property
    def attack_left(self) -> bool:
        """The trigger that was tested still works on the repaired model."""
        return self.after is not None and self.after.asr_excess is not None and self.after.asr_excess > ATTACK_LEFT
