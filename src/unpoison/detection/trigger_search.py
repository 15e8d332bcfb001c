"""Which class is reached from all images by far too little? A search for the target of a backdoor, trigger unknown.

Papers
    Wang et al. "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks." IEEE S&P 2019, and
    CBPT's target search (arXiv 2502.19269), whose constants are not public.
Idea
    Invert a trigger for every class (:mod:`unpoison.detection.inversion`) and look for one that is out of line.
Steps
    1. For each class the smallest change, the same for all images, that sends images of the others there.
    2. Many classes: a few steps for all, the rest for the ``finalists`` that got furthest. A class that the model takes
       nearly all images for cannot be searched, and is named.
    3. A class is suspected where its size is at most three quarters of the median and its logarithm 2.2 deviations
       under it (index), or 1.5 where the size is at most 0.88 of the next, and where its trigger works on unseen
       images.
    4. Where none is, waves over the whole image, which are never small: :mod:`unpoison.detection.waves`.
    5. Where one is, once more: :mod:`unpoison.detection.confirmed_search`.
Where we differ
    Neural Cleanse has the index alone, at 2: with ten classes its deviation is that of few numbers, so a class that
    stands apart needs less of it. Thresholds were set on victims of two seeds (benchmarks/trigger_search.py), so that
    rather a clean model is suspected than a backdoored one is not. Several classes may be suspected together, because
    texts that are alike are reached by the same trigger.
What it cannot see
    Targets that are none of the classes, triggers that depend on the image, models trained to hide from inversion.
    Nothing found is no proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unpoison.detection.inversion import (
    FEWEST_IMAGES,
    Inversion,
    InversionConfig,
    InvertedTrigger,
    Logits,
    first_rank,
    measure_trigger,
    numbers_of,
    outlier_index,
    pack_triggers,
    toward,
    unpack_triggers,
)
from unpoison.detection.waves import FoundWave, WaveConfig, find_waves
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.runs import Run
from unpoison.types import Images

_AT_ONCE = 256
_FEWEST_CLASSES = 3
STEP = "trigger"
_KEPT_AT_ONCE = 16  # classes of a first look that are kept together
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class TriggerSearchConfig:
    """When a class is suspected, and how long is searched. All numbers are ours."""

    index: float = 2.2
    """Deviations under the median from which on a class is suspected..."""
    share: float = 0.75
    """...where its size is at most this share of the median: equal sizes have hardly a deviation."""
    index_apart: float = 1.5
    """The same for a class that stands apart."""
    ratio: float = 0.88
    """It stands apart where its trigger's size is at most this share of the next."""
    success: float = 60.0
    """Percent of unseen images that the trigger must send to its class."""
    suspects: int = 3
    """Most classes that can be suspected at once."""
    finalists: int = 16
    first_steps: int = 20
    """Steps for every class where there are more than ``finalists``."""
    held_out: float = 0.25
    """Share of the images that the triggers are judged on."""
    inversion: InversionConfig = field(default_factory=InversionConfig)
    waves: WaveConfig | None = field(default_factory=WaveConfig)
    """None: step 4 is left out, as it must be for logits that are no cosines."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or not 0 <= self.success <= 100 or not 0 < self.held_out < 1:
            raise ConfigError(
                "expected ratio in (0, 1], success in percent and held_out in (0, 1).", hint="Try 0.88, 60 and 0.25."
            )
        if (
            self.suspects < 1
            or self.finalists < _FEWEST_CLASSES
            or self.first_steps < 1
            or min(self.index, self.index_apart) < 0
        ):
            raise ConfigError(
                "expected suspects >= 1, finalists >= 3, first_steps >= 1 and index >= 0.", hint="Try the defaults."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class TriggerSearch:
    """What was found of each class that was looked at to the end, and the classes that are suspected, worst first.

    ``triggers[i].target`` is the class; ``index[i]`` the deviations of its smallest change under the median.
    ``suspects`` are classes, and so are the ``skipped``: the model takes so many images for them that too few are left
    to search with. ``by_wave``: the suspects are those of step 4, and their triggers waves.
    """

    triggers: tuple[InvertedTrigger, ...]
    index: tuple[float, ...]
    suspects: tuple[int, ...]
    reason: str
    skipped: tuple[int, ...] = ()
    by_wave: bool = False

    def trigger_of(self, target: int) -> InvertedTrigger:
        return next(trigger for trigger in self.triggers if trigger.target == target)


def search_triggers(
    logits: Logits,
    images: Images,
    names: Sequence[str],
    config: TriggerSearchConfig | None = None,
    *,
    targets: Sequence[int] | None = None,
    run: Run,
    step: str = STEP,
) -> TriggerSearch:
    """Steps 1 to 4 over the classes ``names`` of ``logits`` [b, k], or over ``targets`` of them, all to the end.

    ``images`` [n, 3, h, w] in [0, 1] are on the run's device, in random order, since the first of them judge; those
    that the model takes for a class are left out of that class's search. Each class that was searched is kept as a step
    of the run, so that a search that is killed goes on; ``step`` is what their names begin with, :func:`kept_steps`
    lists them. At any time at most ``finalists`` and 16 classes more are in memory. Raises NotEnoughDataError for fewer
    than :func:`fewest_images` images, or where fewer than three classes can be searched.
    """
    config = config or TriggerSearchConfig()
    if len(names) < _FEWEST_CLASSES:
        raise NotEnoughDataError("classes to compare", have=len(names), need=_FEWEST_CLASSES, hint="Name more.")
    fewest = fewest_images(config.held_out)
    if len(images) < fewest:
        raise NotEnoughDataError(
            "images for inversion", have=len(images), need=fewest,
            hint=f"Give more images. {100 * config.held_out:.0f} percent of them only judge the triggers; images that "
            "judge a repair do not count.",
        )  # fmt: skip
    with torch.no_grad():
        said = torch.cat([logits(part).argmax(dim=1) for part in images.split(_AT_ONCE)])
    others = (len(images) - torch.bincount(said, minlength=len(names))).tolist()
    asked = range(len(names)) if targets is None else targets
    wanted = [target for target in asked if others[target] >= fewest]
    skipped = [target for target in asked if others[target] < fewest]
    if len(wanted) < min(_FEWEST_CLASSES, len(asked)):
        raise NotEnoughDataError(
            "classes to compare that the model does not take nearly all images for", have=len(wanted),
            need=_FEWEST_CLASSES, hint="Give more images, of all classes.",
        )  # fmt: skip
    searches: dict[int, _Search] = {}

    def look(targets: Sequence[int], steps: int) -> list[InvertedTrigger]:
        for target in targets:
            if target not in searches:
                searches[target] = _Search.open(logits, images, said, target, config, run)
            searches[target].advance_to(steps)
        return [searches[target].measure(config) for target in targets]

    steps = config.inversion.steps
    if len(names) > config.finalists:
        steps = max(steps, config.first_steps)
    if targets is None and len(wanted) > config.finalists:  # (2)
        first: list[list[float]] = []  # no patterns: there may be thousands of classes
        starts = range(0, len(wanted), _KEPT_AT_ONCE)
        for start in run.progress.track(starts, total=len(wanted), what="looking for a trigger",
                                        weight=_KEPT_AT_ONCE, unit="classes"):  # fmt: skip
            part = wanted[start : start + _KEPT_AT_ONCE]
            stored = run.step(f"{step}-first-{start:05d}", lambda part=part: numbers_of(look(part, config.first_steps)))
            first = sorted(
                [*first, *stored["numbers"].tolist()], key=lambda row: first_rank(size=row[1], success=row[2])
            )[: config.finalists]
            searches = {int(row[0]): searches[int(row[0])] for row in first if int(row[0]) in searches}
        wanted = [int(target) for target, *_ in first]
    triggers: list[InvertedTrigger] = []
    for target in run.progress.track(wanted, total=len(wanted), what="looking for a trigger", unit="classes"):
        stored = run.step(f"{step}-{target:05d}", lambda target=target: pack_triggers(look([target], steps)))  # (1)
        triggers += unpack_triggers(stored, run.device)
        searches.pop(target, None)
    found = judge_triggers(triggers, names, config, skipped=skipped)
    return found if found.suspects else add_waves(found, look_for_waves(found, logits, images, config), names)


def look_for_waves(
    found: TriggerSearch, logits: Logits, images: Images, config: TriggerSearchConfig
) -> tuple[FoundWave, ...]:
    """Step 4 over the classes that were looked at to the end; the first of ``images`` judge, as in step 3."""
    if config.waves is None:
        return ()
    judging = round(config.held_out * len(images))
    targets = [trigger.target for trigger in found.triggers]
    return find_waves(logits, images[judging:], images[:judging], targets, config.waves)[: config.suspects]


def add_waves(found: TriggerSearch, waves: Sequence[FoundWave], names: Sequence[str]) -> TriggerSearch:
    """The search with what was found by step 4: these waves in place of the smallest changes to the same classes."""
    if not waves:
        return found
    known = {wave.trigger.target: wave.trigger for wave in waves}
    first = waves[0]
    reason = (
        f"A wave over the whole image, {say_size(first.trigger)}, sends {first.trigger.success:.0f} percent of images "
        f"to {names[first.trigger.target]!r} and makes the model {first.lead:.1f} times as sure of it as it is of "
        f"plain images. Suspected: {', '.join(repr(names[target]) for target in known)}."
    )
    return replace(
        found, triggers=tuple(known.get(trigger.target, trigger) for trigger in found.triggers),
        suspects=tuple(known), reason=reason + _say_skipped(found.skipped, names), by_wave=True,
    )  # fmt: skip


def fewest_images(held_out: float) -> int:
    """How many images a search needs at least, so that ``held_out`` of them and the others are each enough."""
    fewest = math.floor((FEWEST_IMAGES - 0.5) / min(held_out, 1 - held_out))
    while min(round(held_out * fewest), fewest - round(held_out * fewest)) < FEWEST_IMAGES:
        fewest += 1
    return fewest


def kept_steps(count: int, step: str = STEP) -> list[str]:
    """The steps of a run that a search of ``count`` classes may have kept; to be forgotten once the search is."""
    return [
        *(f"{step}-{target:05d}" for target in range(count)),
        *(f"{step}-first-{start:05d}" for start in range(0, count, _KEPT_AT_ONCE)),
    ]


def judge_triggers(
    triggers: Sequence[InvertedTrigger],
    names: Sequence[str],
    config: TriggerSearchConfig,
    *,
    skipped: Sequence[int] = (),
) -> TriggerSearch:
    """Step 3, and sentences that say what was found and which classes were ``skipped``."""
    index = outlier_index([trigger.size for trigger in triggers])
    suspected = find_suspects(
        np.array([trigger.size for trigger in triggers]),
        np.array([trigger.success >= config.success for trigger in triggers]),
        config,
    )
    order = sorted(range(len(triggers)), key=lambda place: triggers[place].size)
    suspects = tuple(triggers[place].target for place in order if suspected[place])
    first = triggers[order[0]]
    if suspects:
        rest = next(triggers[place] for place in order if not suspected[place])
        named = ", ".join(repr(names[target]) for target in suspects)
        reason = (
            f"{say_size(first).capitalize()} sends {first.success:.0f} percent of images to {names[first.target]!r}; "
            f"of what is not suspected, the next needs {say_size(rest)}. Suspected: {named}."
        )
    else:
        reason = (
            f"Nothing of {len(triggers)} is reached by a change that is out of line: the smallest, {say_size(first)}, "
            f"leads to {names[first.target]!r}."
        )
    return TriggerSearch(
        triggers=tuple(triggers), index=tuple(float(value) for value in index), suspects=suspects,
        reason=reason + _say_skipped(skipped, names), skipped=tuple(skipped),
    )  # fmt: skip


def _say_skipped(skipped: Sequence[int], names: Sequence[str]) -> str:
    if not skipped:
        return ""
    said = ", ".join(repr(names[target]) for target in skipped[:_NAMED])
    more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
    return f" Not looked at, because the model takes nearly all images for it: {said}{more}."


def store_search(search: TriggerSearch) -> dict[str, Tensor]:
    """The search as tensors, for a run that may be interrupted."""
    return pack_triggers(search.triggers) | {
        "index": torch.tensor(search.index, dtype=torch.float64),
        "suspects": torch.tensor(search.suspects, dtype=torch.long),
        "skipped": torch.tensor(search.skipped, dtype=torch.long),
        "by_wave": torch.tensor(search.by_wave),
        "reason": torch.frombuffer(bytearray(search.reason.encode()), dtype=torch.uint8),
    }


def load_search(stored: Mapping[str, Tensor], device: torch.device) -> TriggerSearch:
    """What :func:`store_search` was given."""
    return TriggerSearch(
        triggers=tuple(unpack_triggers(stored, device)),
        index=tuple(stored["index"].tolist()),
        suspects=tuple(stored["suspects"].tolist()),
        skipped=tuple(stored["skipped"].tolist()) if "skipped" in stored else (),
        reason=bytes(stored["reason"].tolist()).decode(),
        by_wave=bool(stored["by_wave"]) if "by_wave" in stored else False,
    )


def say_size(trigger: InvertedTrigger) -> str:
    """The trigger's size in words."""
    if trigger.form == "square":
        return f"a square of {100 * trigger.size:.1f} percent of an image"
    if trigger.form == "patch":
        return f"a patch of {100 * trigger.size:.1f} percent of an image"
    return f"a change by {255 * trigger.size:.1f} of 255 levels (root mean square)"


def find_suspects(
    sizes: Float[np.ndarray, " k"], working: Bool[np.ndarray, " k"], config: TriggerSearchConfig
) -> Bool[np.ndarray, " k"]:
    """As many of the smallest sizes as are out of line and work, at most ``suspects``; two are left to compare with."""
    index, order = outlier_index(sizes.tolist()), np.argsort(sizes, kind="stable")
    suspected = np.zeros(len(sizes), dtype=bool)
    for count in range(min(config.suspects, len(sizes) - 2), 0, -1):
        chosen, largest, following = order[:count], float(sizes[order[count - 1]]), float(sizes[order[count]])
        apart = count == 1 and largest <= config.ratio * following and float(index[chosen[0]]) >= config.index_apart
        small = largest <= config.share * float(np.median(sizes))
        out_of_line = apart or (small and bool((index[chosen] >= config.index).all()))
        if out_of_line and largest < following and bool(working[chosen].all()):
            suspected[chosen] = True
            break
    return suspected


@dataclass(kw_only=True, eq=False)
class _Search:
    target: int
    logits: Logits
    inversion: Inversion
    images: Images
    unseen: Int[Tensor, " u"]
    taken: int = 0

    @classmethod
    def open(
        cls,
        logits: Logits,
        images: Images,
        said: Int[Tensor, " n"],
        target: int,
        config: TriggerSearchConfig,
        run: Run,
    ) -> _Search:
        others = torch.nonzero(said != target)[:, 0]
        held_out = round(config.held_out * len(others))
        inversion = Inversion(
            toward(logits, target), images, others[held_out:], config.inversion, run.generator("inversion", target)
        )
        return cls(target=target, logits=logits, inversion=inversion, images=images, unseen=others[:held_out])

    def advance_to(self, steps: int) -> None:
        self.inversion.advance(max(0, steps - self.taken))
        self.taken = max(self.taken, steps)

    def measure(self, config: TriggerSearchConfig) -> InvertedTrigger:
        unseen = self.images[self.unseen]
        return measure_trigger(self.inversion, self.logits, unseen, self.target, config.inversion)
