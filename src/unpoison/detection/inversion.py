"""Trigger inversion: the least that must be done to any image for a model to say one and the same thing.

Paper
    Wang et al. "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks." IEEE S&P 2019.
Idea
    A backdoor is a shortcut: its target can be reached from all images by a change far smaller than any other class
    needs. Find for each class the smallest mask and the pattern under it that send images there, and look for a class
    whose mask is out of line.
Steps
    1. x' = (1 - m) x + m p with a mask m [1, h, w] and a pattern p [3, h, w], both sigmoids of free numbers.
    2. Minimise CE(logits(x'), target) + lambda ||m||_1 over images of other classes, with Adam.
    3. lambda grows while at least ``success`` of a batch is sent to the target, and falls while it is not; the
       smallest mask that did is kept (the last one where none did).
    4. The class whose mask is smaller than the others': index = (median log size - log size) / (1.4826 MAD).
Where we differ
    ``form = "additive"``, the default: x' = clip(x + delta) with one delta for all images, |delta| <= epsilon, whose
    root mean square takes the place of the mask's sum: triggers that lie on all of the image (a blend, a warp) have no
    small mask, and a patch has a small delta as well. Sizes are compared as logarithms: a planted trigger is several
    times smaller, not some pixels. The model's answer is any function of images to logits: a classifier's, or cosines
    with texts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.types import Images

Logits = Callable[[Images], Float[Tensor, "b k"]]
Objective = Callable[[Images, Int[Tensor, " b"]], tuple[Float[Tensor, ""], float]]
"""Changed images and the rows that they were to what is minimised, and the share of them, in [0, 1], that got there."""
Form = Literal["additive", "patch", "square"]
FORMS: tuple[Form, ...] = get_args(Form)
FEWEST_IMAGES = 8
_SMALLEST, _TINY = 1e-6, 1e-8
_RATES = {"additive": 0.02, "patch": 0.3, "square": 0.3}
_WEIGHTS = {"additive": 20.0, "patch": 1e-3 * 32 * 32, "square": 0.0}
_AT_ONCE, _SHOWN = 256, 96


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """How to search; the numbers are ours, for images of 32 pixels and few seconds a class."""

    form: Form = "additive"
    steps: int = 50
    batch_size: int = 32
    learning_rate: float | None = None
    """Of Adam; None: 0.3 for the free numbers under a patch's or a square's sigmoids, 0.02 for an additive trigger."""
    epsilon: float = 0.5
    """Largest change of a value by an additive trigger."""
    success: float = 0.9
    weight: float | None = None
    """lambda at the start; None: 1e-3 x 32 x 32 for the share of the image that a mask covers, 20 for a delta's root
    mean square."""
    weight_factor: float = 1.15
    squares: tuple[float, ...] = (6 / 32, 4 / 32, 3 / 32, 2 / 32)
    """Sides of squares (:mod:`unpoison.detection.squares`) as shares of the image's, falling."""
    keep: Literal["smallest", "last"] = "smallest"
    """Which of the triggers on the way is found: the smallest that worked, or what the last step came to."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not 0 < self.epsilon <= 1:
            raise ConfigError(
                "expected steps and batch_size of at least 1 and epsilon in (0, 1].",
                hint="The defaults suit small images.",
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}.", hint="Leave it out.")
        if not self.squares or not all(0 < side <= 1 for side in self.squares):
            raise ConfigError(f"squares must be sides in (0, 1], got {self.squares}.", hint="Try 6/32, 4/32, 3/32.")
        if not 0 < self.success <= 1 or (self.weight or 0) < 0 or self.weight_factor < 1:
            raise ConfigError("expected success in (0, 1], weight >= 0, weight_factor >= 1.", hint="Try the defaults.")

    @property
    def rate(self) -> float:
        return _RATES[self.form] if self.learning_rate is None else self.learning_rate

    @property
    def first_weight(self) -> float:
        return _WEIGHTS[self.form] if self.weight is None else self.weight


@dataclass(frozen=True, kw_only=True, eq=False)
class InvertedTrigger:
    """``mask`` [1, h, w] in [0, 1] (ones for the additive form); ``pattern`` [3, h, w]: colors, or what is added.

    A square is a mask of zeros and ones.

    ``size`` in [0, 1]: share of the image that the mask covers, or the root mean square of what is added. ``success``:
    percent of the held-out images that it sends to ``target``.
    """

    form: Form
    target: int
    mask: Float[Tensor, "1 h w"]
    pattern: Float[Tensor, "3 h w"]
    size: float
    success: float

    def apply(self, images: Images) -> Images:
        return _put_on(self.form, images, self.mask.to(images), self.pattern.to(images))


class Search:
    """A search for one trigger, which can go on where it stopped.

    ``rows`` of ``images`` [n, 3, h, w] are used: those that are not of the target. Raises NotEnoughDataError.
    """

    def __init__(
        self,
        objective: Objective,
        images: Images,
        rows: Int[Tensor, " m"],
        config: InversionConfig,
        generator: torch.Generator,
    ) -> None:
        check_enough(len(rows))
        self._objective, self._images, self._rows = objective, images, rows
        self._config, self._generator = config, generator

    def advance(self, steps: int) -> None:
        """Go on for so many steps."""
        raise NotImplementedError

    def found(self) -> tuple[Float[Tensor, "1 h w"], Float[Tensor, "3 h w"]]:
        """Mask and pattern so far."""
        raise NotImplementedError

    def glimpse(self) -> tuple[float, float] | None:
        """Size and percent of success as the last steps had them, None where only other images can tell."""
        return None

    def _drawn(self) -> Int[Tensor, " b"]:
        """The rows of the next batch."""
        order = torch.randperm(len(self._rows), generator=self._generator)[: self._config.batch_size]
        return self._rows[order.to(self._rows.device)]


class Inversion(Search):
    """Steps 1 to 3 against any objective. Raises ConfigError for squares, which are another search."""

    def __init__(
        self,
        objective: Objective,
        images: Images,
        rows: Int[Tensor, " m"],
        config: InversionConfig,
        generator: torch.Generator,
    ) -> None:
        super().__init__(objective, images, rows, config, generator)
        if config.form == "square":
            raise ConfigError("squares are searched among the classes of a model only.", hint="Use patch or additive.")
        height, width = images.shape[-2:]
        start = -2.0 if config.form == "patch" else 0.0
        self._free_mask = torch.full((1, height, width), start, device=images.device, requires_grad=True)
        self._free = torch.zeros(3, height, width, device=images.device, requires_grad=True)
        self._optimiser = torch.optim.Adam([self._free_mask, self._free], config.rate)
        self._weight = config.first_weight
        self._best: tuple[Tensor, Tensor] | None = None
        self._smallest = float("inf")

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self._step(self._drawn())

    def found(self) -> tuple[Float[Tensor, "1 h w"], Float[Tensor, "3 h w"]]:
        """Mask and pattern so far: the smallest that worked, else (or with ``keep = "last"``) the last ones."""
        mask, pattern = (self._best if self._config.keep == "smallest" else None) or self._now()
        return mask.detach(), pattern.detach()

    def _now(self) -> tuple[Tensor, Tensor]:
        if self._config.form == "patch":
            return self._free_mask.sigmoid(), self._free.sigmoid()  # (1)
        return torch.ones_like(self._free_mask), self._free.clamp(-self._config.epsilon, self._config.epsilon)

    def _step(self, rows: Int[Tensor, " b"]) -> None:
        mask, pattern = self._now()
        loss, reached = self._objective(_put_on(self._config.form, self._images[rows], mask, pattern), rows)
        size = size_of(self._config.form, mask, pattern)
        enough = reached >= self._config.success
        if enough and float(size.detach()) < self._smallest:
            self._smallest, self._best = float(size.detach()), (mask.detach().clone(), pattern.detach().clone())
        self._optimiser.zero_grad()
        (loss + self._weight * size).backward(inputs=[self._free_mask, self._free])  # (2)
        self._optimiser.step()
        self._weight *= self._config.weight_factor if enough else 1 / self._config.weight_factor  # (3)


def size_of(form: Form, mask: Float[Tensor, "1 h w"], pattern: Float[Tensor, "3 h w"]) -> Float[Tensor, ""]:
    """The share of the image that the mask covers, or the root mean square of what is added."""
    return mask.mean() if form != "additive" else (pattern.square().mean() + _TINY).sqrt()


def toward(logits: Logits, target: int) -> Objective:
    """Cross-entropy to ``target``, an index of the logits; ``logits`` must be differentiable by the images."""

    def objective(images: Images, rows: Int[Tensor, " b"]) -> tuple[Float[Tensor, ""], float]:
        del rows
        answers = logits(images)
        return _to_target(answers, target), float((answers.detach().argmax(1) == target).float().mean())

    return objective


def measure_trigger(
    inversion: Search, logits: Logits, held_out: Images, target: int, config: InversionConfig
) -> InvertedTrigger:
    """What ``inversion`` found, with its size and its success on images that it has not seen. NotEnoughDataError."""
    check_enough(len(held_out))
    mask, pattern = inversion.found()
    with torch.no_grad():
        answers = torch.cat([logits(_put_on(config.form, part, mask, pattern)) for part in held_out.split(_AT_ONCE)])
    size = float(size_of(config.form, mask, pattern))
    success = 100 * float((answers.argmax(1) == target).float().mean())
    return InvertedTrigger(form=config.form, target=target, mask=mask, pattern=pattern, size=size, success=success)


def invert_trigger(
    logits: Logits,
    images: Images,
    held_out: Float[Tensor, "n 3 h w"],
    target: int,
    config: InversionConfig,
    *,
    objective: Objective | None = None,
    generator: torch.Generator,
) -> InvertedTrigger:
    """Steps 1 to 3 for one ``target``, an index of the logits; ``images`` and ``held_out`` should not be of it.

    ``logits`` must be differentiable by the images; its weights need no gradient. ``objective``: what step 2 minimises
    in the place of the cross-entropy. Raises NotEnoughDataError.
    """
    check_enough(len(held_out))
    rows = torch.arange(len(images), device=images.device)
    inversion = Inversion(objective or toward(logits, target), images, rows, config, generator)
    inversion.advance(config.steps)
    return measure_trigger(inversion, logits, held_out, target, config)


def check_enough(count: int) -> None:
    """Raise NotEnoughDataError for fewer images than a search can go by."""
    if count < FEWEST_IMAGES:
        raise NotEnoughDataError("images for inversion", have=count, need=FEWEST_IMAGES, hint="Give more images.")


def outlier_index(sizes: Sequence[float]) -> Float[np.ndarray, " k"]:
    """Step 4 for each size: how many deviations it lies under the median, on logarithms. All zero for equal sizes."""
    logs = np.log(np.maximum(np.asarray(sizes, dtype=np.float64), _SMALLEST))
    middle = np.median(logs)
    deviation = 1.4826 * np.median(np.abs(logs - middle))
    return (middle - logs) / deviation if deviation > 0 else np.zeros(len(logs))


def first_rank(*, size: float, success: float) -> tuple[float, float]:
    """The order after a first look: triggers that work, small ones before large ones; of one size, and of those that do
    not work, what works better first."""
    return (size if success >= 50 else 1 + size - success / 100, -success)


def numbers_of(triggers: Sequence[InvertedTrigger]) -> dict[str, Tensor]:
    """Target, size, success and form of each, for a run that may be interrupted."""
    rows = [(entry.target, entry.size, entry.success, FORMS.index(entry.form)) for entry in triggers]
    return {"numbers": torch.tensor(rows, dtype=torch.float64)}


def pack_triggers(triggers: Sequence[InvertedTrigger]) -> dict[str, Tensor]:
    """The same with masks and patterns."""
    return numbers_of(triggers) | {
        "masks": torch.stack([entry.mask.cpu() for entry in triggers]),
        "patterns": torch.stack([entry.pattern.cpu() for entry in triggers]),
    }


def unpack_triggers(stored: Mapping[str, Tensor], device: torch.device) -> list[InvertedTrigger]:
    """What :func:`pack_triggers` was given."""
    return [
        InvertedTrigger(
            form=FORMS[int(form)],
            target=int(target),
            mask=mask.to(device),
            pattern=pattern.to(device),
            size=size,
            success=success,
        )
        for (target, size, success, form), mask, pattern in zip(
            stored["numbers"].tolist(), stored["masks"], stored["patterns"], strict=True
        )
    ]


def picture_of(trigger: InvertedTrigger) -> str:
    """What the trigger shows, at 96 pixels at least, as a PNG in base64; what is added is drawn on grey, stretched."""
    shown = trigger.mask * trigger.pattern
    if trigger.form == "additive":
        shown = 0.5 + trigger.pattern / (2 * trigger.pattern.abs().max().clamp_min(_TINY))
    array = (255 * shown.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    factor = -(-_SHOWN // array.shape[1])
    buffer = io.BytesIO()
    Image.fromarray(array.repeat(factor, axis=0).repeat(factor, axis=1)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _put_on(form: Form, images: Images, mask: Float[Tensor, "1 h w"], pattern: Float[Tensor, "3 h w"]) -> Images:
    if form == "additive":
        return (images + pattern).clamp(0, 1)
    return (1 - mask) * images + mask * pattern


def _to_target(answers: Float[Tensor, "b k"], target: int) -> Float[Tensor, ""]:
    return F.cross_entropy(answers, torch.full((len(answers),), target, device=answers.device))
