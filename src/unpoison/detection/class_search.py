"""The least change that reaches each class, in three forms, for as long as there is time.

Papers
    Wang et al. "Neural Cleanse." IEEE S&P 2019 (mask + pattern), and CBPT's inversion (arXiv 2502.19269) for the
    bounded universal form; its constants are not public. Brown et al. "Adversarial Patch." 2017 (squares).
Steps
    1. Many classes: a few steps for each, in each form; only the ``finalists`` that got furthest go on. The others are
       hopeless: what reaches a backdoor's target is found sooner and smaller.
    2. Half-way the masks and added patterns that are far larger than the median stay as they are; the others go on.
       Squares give up by themselves (:mod:`unpoison.detection.squares`).
    3. Where time is limited, all that are left advance in turns, a few steps each, so that a search that is cut short
       still compares like with like. Where it is not, they are searched one by one to the same end.
    4. Each trigger is measured on images that no search has seen.
Where we differ
    Neural Cleanse searches each class to the end. Turns and early abandonment are ours; a class that was abandoned is
    no part of the comparison, which makes the median of the rest smaller and an outlier harder to be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from unpoison.detection.anomaly import FEWEST_CLASSES, cost
from unpoison.detection.inversion import (
    FEWEST_IMAGES,
    Form,
    Inversion,
    InversionConfig,
    InvertedTrigger,
    Logits,
    Search,
    check_enough,
    first_rank,
    measure_trigger,
    pack_triggers,
    toward,
    unpack_triggers,
)
from unpoison.detection.squares import SquareInversion
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.model_results import Reach
from unpoison.runs import Run
from unpoison.types import Images

SEARCHED: tuple[Form, ...] = ("square", "patch", "additive")
Keep = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
_AT_ONCE, _KEPT_AT_ONCE = 256, 16
_PROBED_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class ClassSearchConfig:
    """How long is searched, and for which of many classes. All numbers are ours."""

    forms: tuple[Form, ...] = SEARCHED
    steps: int = 120
    """For each class and form. At 60 steps the masks were still shrinking."""
    square_steps: int = 160
    """The same for squares: 40 for each of four sides. A class that the largest does not reach takes 40."""
    turn: int = 15
    """Steps of one class before it is the next one's turn."""
    hopeless_after: int = 60
    """Steps (rounded up to whole turns) after which a mask or an added pattern is given up..."""
    hopeless: float = 2.0
    """...that costs this many times the median of its form."""
    finalists: int = 16
    first_steps: int = 15
    """Steps for every class where there are more than ``finalists``."""
    held_out: float = 0.25
    """Share of the images that the triggers are judged on."""
    inversion: InversionConfig = field(default_factory=InversionConfig)
    """``form`` and ``steps`` there are set from here."""

    def __post_init__(self) -> None:
        numbers = (self.steps, self.square_steps, self.turn, self.first_steps, self.hopeless_after, self.hopeless)
        if min(numbers) < 1 or self.finalists < FEWEST_CLASSES:
            raise ConfigError(
                "expected steps, square_steps, turn, first_steps, hopeless_after and hopeless >= 1 and finalists >= "
                f"{FEWEST_CLASSES}.",
                hint="Try the defaults.",
            )
        if not 0 < self.held_out < 1 or not self.forms or not set(self.forms) <= set(SEARCHED):
            raise ConfigError(f"expected held_out in (0, 1) and forms of {SEARCHED}.", hint="Try the defaults.")

    def steps_of(self, form: Form) -> int:
        """For each class, where it is searched to the end."""
        return self.square_steps if form == "square" else self.steps

    @property
    def mark(self) -> int:
        """Steps after which the hopeless are given up."""
        return -(-self.hopeless_after // self.turn) * self.turn

    def can_drop(self, form: Form) -> bool:
        return form != "square" and self.mark < self.steps


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchedClass:
    """A trigger with the steps that it took; ``finished``: all that were planned, so it was not given up half-way."""

    trigger: InvertedTrigger
    steps: int
    finished: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassSearch:
    """``found`` has the classes that stayed to the end, by form. ``seen`` of ``planned`` classes were looked at at all.

    ``covered``: share of the planned steps that was taken, in [0, 1]. ``unseen``: rows that no search used.
    ``cut``: the time ran out.
    """

    found: dict[Form, tuple[SearchedClass, ...]]
    unseen: Int[Tensor, " u"]
    covered: float
    seen: int
    planned: int
    cut: bool = False

    @property
    def complete(self) -> bool:
        return self.covered >= 1.0


def search_classes(
    logits: Logits,
    images: Images,
    count: int,
    config: ClassSearchConfig | None = None,
    *,
    run: Run,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    step: str | None = None,
) -> ClassSearch:
    """Steps 1 to 4 over ``count`` classes of ``logits`` [b, count], for about ``seconds`` at most.

    Without a limit each class that was searched is kept as a step of the run whose name begins with ``step``, so that
    a search that is killed goes on (:func:`kept_searches`).

    ``images`` [n, 3, h, w] in [0, 1] are on the run's device; those that the model takes for a class are left out of
    that class's search. A class that it takes nearly all images for cannot be searched and counts as not looked at.
    Raises NotEnoughDataError for too few images.
    """
    config = config or ClassSearchConfig()
    late = _Deadline(seconds, clock)
    order = torch.randperm(len(images), generator=run.generator("class search"))
    held_out = round(config.held_out * len(images))
    unseen, used = order[:held_out].to(images.device), order[held_out:].to(images.device)
    check_enough(min(len(used), len(unseen)))
    with torch.no_grad():
        said = torch.cat([logits(part).argmax(dim=1) for part in images.split(_AT_ONCE)])
    searches: dict[tuple[Form, int], _Search] = {
        (form, target): _Search(logits, images, said, used, unseen, target, form, config, run)
        for form in config.forms
        for target in range(count)
        if min(int((said[used] != target).sum()), int((said[unseen] != target).sum())) >= FEWEST_IMAGES
    }
    planned, taken, seen = _planned(count, config), 0, 0
    keep: Keep = run.step if step is not None and seconds is None else lambda _, compute: compute()
    if count > config.finalists:  # (1)
        searches, taken, seen = _finalists(searches, config, keep, step, run, late)
    left = list(searches.values())
    every, steps = _one_by_one(left, config, keep, step, run) if seconds is None else _in_turns(left, config, run, late)
    taken += steps
    found: dict[Form, tuple[SearchedClass, ...]] = {
        form: tuple(entry for entry in every if entry.trigger.form == form) for form in config.forms
    }
    seen = max(seen, *(len(classes) for classes in found.values()))
    covered = min(1.0, taken / max(planned, 1))
    return ClassSearch(found=found, unseen=unseen, covered=covered, seen=seen, planned=count, cut=late())


def seconds_of_search(
    logits: Logits, images: Images, count: int, config: ClassSearchConfig, *, run: Run
) -> tuple[int, float]:
    """How many steps :func:`search_classes` takes at most without a limit, and their seconds, from a few of them and
    from one look at what they found."""
    rows = torch.arange(len(images), device=images.device)
    said = torch.full((len(images),), -1, device=images.device)  # of no class: all images are used
    seconds, begun = 0.0, time.perf_counter()

    def since() -> float:
        nonlocal begun
        taken, begun = time.perf_counter() - begun, time.perf_counter()
        return taken

    for form in config.forms:
        search = _Search(logits, images, said, rows, rows, 0, form, config, run)
        search.advance(1)  # with what a first step sets up
        since()
        search.advance(_PROBED_STEPS)
        seconds += _planned_of(form, count, config) * since() / _PROBED_STEPS
        search.measure()
        looks = min(count, config.finalists) * (len(config.inversion.squares) if form == "square" else 2)
        looks += count if count > config.finalists and form != "square" else 0
        seconds += looks * since()
    return _planned(count, config), seconds


def kept_searches(step: str, count: int, config: ClassSearchConfig) -> list[str]:
    """The steps of a run that a search of ``count`` classes may have kept; to be forgotten once its result is."""
    return [
        *(f"{step}-{form}-{target:05d}" for form in config.forms for target in range(count)),
        *(f"{step}-{form}-{target:05d}-half" for form in config.forms for target in range(count)),
        *(f"{step}-first-{start:05d}" for start in range(0, count, _KEPT_AT_ONCE)),
    ]


def _name(step: str | None, search: _Search) -> str:
    return f"{step}-{search.form}-{search.target:05d}"


def _one_by_one(
    searches: Sequence[_Search], config: ClassSearchConfig, keep: Keep, step: str | None, run: Run
) -> tuple[list[SearchedClass], int]:
    """Steps 2 to 4 without a limit, and the steps that were planned for them."""
    device = run.device
    halves: dict[_Search, InvertedTrigger] = {}
    half_way = [search for search in searches if config.can_drop(search.form)]
    for search in run.progress.track(half_way, total=len(half_way), what="searching half-way", unit="searches"):
        stored = keep(f"{_name(step, search)}-half", lambda search=search: pack_triggers([search.to(config.mark)]))
        halves[search] = unpack_triggers(stored, device)[0]
    dropped = _hopeless(halves, config)
    every: list[SearchedClass] = []
    for search in run.progress.track(searches, total=len(searches), what="searching classes", unit="searches"):
        if search in dropped:
            every.append(SearchedClass(trigger=halves[search], steps=config.mark, finished=False))
            continue
        steps = config.steps_of(search.form)
        stored = keep(_name(step, search), lambda search=search, steps=steps: pack_triggers([search.to(steps)]))
        search.forget()
        every.append(SearchedClass(trigger=unpack_triggers(stored, device)[0], steps=steps, finished=True))
    return every, sum(config.steps_of(search.form) for search in searches)


def _in_turns(
    searches: Sequence[_Search], config: ClassSearchConfig, run: Run, late: _Deadline
) -> tuple[list[SearchedClass], int]:
    """Steps 2 to 4 for as long as there is time, and the planned steps that need not be taken any more."""
    longest = max(config.steps_of(form) for form in config.forms)
    work = [
        (done, search)
        for done in range(0, longest, config.turn)
        for search in searches
        if done < config.steps_of(search.form)
    ]
    dropped: dict[_Search, InvertedTrigger] | None = None
    for done, search in run.progress.track(work, total=len(work), what="searching classes", unit="turns"):
        if late():
            break
        if dropped is None and done >= config.mark:
            halves = {search: search.measure() for search in searches if config.can_drop(search.form)}
            dropped = _hopeless(halves, config)
        if search not in (dropped or ()):
            search.advance(min(config.turn, config.steps_of(search.form) - done))
    dropped = dropped or {}
    every = []
    for search in searches:
        if search.steps:
            finished = search.steps >= config.steps_of(search.form)
            trigger = dropped[search] if search in dropped else search.measure()
            every.append(SearchedClass(trigger=trigger, steps=search.steps, finished=finished))
    return every, sum(config.steps_of(search.form) if search in dropped else search.steps for search in searches)


def _hopeless(halves: dict[_Search, InvertedTrigger], config: ClassSearchConfig) -> dict[_Search, InvertedTrigger]:
    """Step 2: those that cost far more than the median of their form. They stay above it, whatever more steps find."""
    dropped: dict[_Search, InvertedTrigger] = {}
    for form in config.forms:
        own = [(search, trigger) for search, trigger in halves.items() if search.form == form]
        if len(own) >= FEWEST_CLASSES:
            costs = cost(form, [Reach(form=form, size=one.size, success=one.success) for _, one in own])
            limit = float(np.median(costs)) + math.log(config.hopeless)
            dropped |= {search: one for (search, one), value in zip(own, costs.tolist(), strict=True) if value > limit}
    return dropped


class _Deadline:
    def __init__(self, seconds: float | None, clock: Callable[[], float]) -> None:
        self._seconds, self._clock, self._begun = seconds, clock, clock()

    def __call__(self, share: float = 1.0) -> bool:
        """Whether this share of the time has passed."""
        return self._seconds is not None and self._clock() - self._begun >= share * self._seconds


def _planned(count: int, config: ClassSearchConfig) -> int:
    return sum(_planned_of(form, count, config) for form in config.forms)


def _planned_of(form: Form, count: int, config: ClassSearchConfig) -> int:
    first = count * config.first_steps if count > config.finalists else 0
    return first + min(count, config.finalists) * config.steps_of(form)


def _finalists(
    searches: dict[tuple[Form, int], _Search],
    config: ClassSearchConfig,
    keep: Keep,
    step: str | None,
    run: Run,
    late: _Deadline,
) -> tuple[dict[tuple[Form, int], _Search], int, int]:
    """The searches that go on, the steps taken, and how many classes were looked at, in a random order.

    Six tenths of the time are for this at most. Memory does not grow with the classes: the finalists begin anew.
    """
    targets = sorted({target for _, target in searches})
    order = [targets[place] for place in torch.randperm(len(targets), generator=run.generator("class order")).tolist()]

    def look(part: Sequence[int]) -> dict[str, Tensor]:
        """Target, size and success of each of ``part`` that there is time for, in each form."""
        rows = []
        for target in part:
            if late(0.6):
                break
            found = [searches[form, target].first_look(config.first_steps) for form in config.forms]
            rows.append([[target, size, success] for size, success in found])
        return {"looks": torch.tensor(rows, dtype=torch.float64).reshape(-1, len(config.forms), 3)}

    looks: list[Tensor] = []
    for start in run.progress.track(range(0, len(order), _KEPT_AT_ONCE), total=len(order),
                                    what="a first look at classes", weight=_KEPT_AT_ONCE, unit="classes"):  # fmt: skip
        part = order[start : start + _KEPT_AT_ONCE]
        looks.append(keep(f"{step}-first-{start:05d}", lambda part=part: look(part))["looks"])
        if len(looks[-1]) < len(part):
            break
    seen = torch.cat(looks) if looks else torch.zeros(0, len(config.forms), 3)
    kept: dict[tuple[Form, int], _Search] = {}
    for place, form in enumerate(config.forms):
        best = sorted(seen[:, place].tolist(), key=lambda row: (first_rank(size=row[1], success=row[2]), row[0]))
        kept |= {(form, int(target)): searches[form, int(target)] for target, *_ in best[: config.finalists]}
    return kept, len(seen) * len(config.forms) * config.first_steps, len(seen)


class _Search:
    """One class in one form; its tensors are made at its first step."""

    def __init__(
        self,
        logits: Logits,
        images: Images,
        said: Int[Tensor, " n"],
        used: Int[Tensor, " m"],
        unseen: Int[Tensor, " u"],
        target: int,
        form: Form,
        config: ClassSearchConfig,
        run: Run,
    ) -> None:
        self.form: Form = form
        self.target, self.steps = target, 0
        self._logits, self._images, self._run = logits, images, run
        self._rows, self._judged = used[said[used] != target], unseen[said[unseen] != target]
        self._config = replace(config.inversion, form=form, steps=config.steps_of(form))
        self._inversion: Search | None = None

    def advance(self, steps: int) -> None:
        if self._inversion is None:
            generator = self._run.generator("inversion", self.form, self.target)
            kind = SquareInversion if self.form == "square" else Inversion
            self._inversion = kind(toward(self._logits, self.target), self._images, self._rows, self._config, generator)
        self._inversion.advance(steps)
        self.steps += steps

    def measure(self) -> InvertedTrigger:
        if self._inversion is None:
            raise NotEnoughDataError("steps of the search", have=0, need=1, hint="Give it more time.")
        return measure_trigger(self._inversion, self._logits, self._images[self._judged], self.target, self._config)

    def first_look(self, steps: int) -> tuple[float, float]:
        """Size and percent of success of what so many steps find; then all of it is forgotten."""
        self.advance(steps)
        glimpse = None if self._inversion is None else self._inversion.glimpse()
        if glimpse is None:
            trigger = self.measure()
            glimpse = trigger.size, trigger.success
        self.forget()
        return glimpse

    def to(self, steps: int) -> InvertedTrigger:
        """What is found after so many steps in all."""
        self.advance(steps - self.steps)
        return self.measure()

    def forget(self) -> None:
        """Begin anew with the next step."""
        self._inversion, self.steps = None, 0
