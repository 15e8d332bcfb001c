"""What a method did to a zero-shot classifier, as a result on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from unpoison.clip_results import ATTACK_LEFT, TriggerFinding
from unpoison.results import ClipEvaluation, SkippedRow
from unpoison.storage import JsonResult


@dataclass(frozen=True, kw_only=True)
class DummyTrigger:
    """An inverted trigger that stood in for the true one.

    ``size`` in [0, 1]: root mean square of what is added, or the share that the mask covers; ``success``: percent of
    the images that it was found on; ``left``: points of excess ASR on held-out images afterwards. ``aside``: nothing
    was fitted to it. ``picture``: a PNG in base64.
    """

    target: str
    form: str
    size: float
    success: float
    left: float
    aside: bool
    picture: str = ""


@dataclass(frozen=True, kw_only=True)
class ZeroShotPurification(JsonResult):
    """What a method did to the classifier that a CLIP and a list of class names make. The CLIP's weights are unchanged.

    Held-out accuracy: percent of ``judging`` labelled images, to which nothing was fitted; ``learnt`` others were used.
    ``bound`` is in points. ``targets``: the classes that were suspected, or given.
    """

    schema: ClassVar[str] = "zero-shot-purification"
    method: str
    config: dict[str, Any]
    accepted: bool
    reason: str
    protects: str
    bound: float
    steps: int
    seconds: float
    seed: int
    class_names: tuple[str, ...]
    held_out_before: float
    held_out_after: float
    learnt: int
    judging: int
    class_cosine: float
    """Mean cosine of the new class embeddings with the given ones."""
    targets: tuple[str, ...] = ()
    search: TriggerFinding | None = None
    """None where no trigger was looked for."""
    dummies: tuple[DummyTrigger, ...] = ()
    left_alone: bool = False
    """Nothing suspicious was found: the class embeddings are the model's own, to the bit."""
    warnings: tuple[str, ...] = ()
    skipped: tuple[SkippedRow, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)
    before: ClipEvaluation | None = None
    after: ClipEvaluation | None = None
    not_covered: tuple[str, ...] = ()
    command: str = ""
    """The shell command that repeats the run, "" where it was none."""

    @property
    def attack_left(self) -> bool:
        """The trigger that was tested still works on the purified classifier."""
        return self.after is not None and self.after.asr_excess is not None and self.after.asr_excess > ATTACK_LEFT
