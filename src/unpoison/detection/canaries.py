"""What would the scan have missed? Backdoors planted in copies of the model, and looked for as in the model itself.

Steps
    1. A copy of the model is fine-tuned on the images at hand, a share of them with a trigger and the target's label.
       Labels are the given ones, or what the model itself says.
    2. The backdoor's success is measured on images that no training saw, above what the copy sends to the target
       without the trigger. A copy that did not take it up, or that no longer says of clean images what the model says
       of them, is no backdoored model: it says nothing about the scan and is not searched.
    3. The scan's weights verdict on the copy, with the same images, references and settings.
What it cannot say
    Backdoors of other kinds, and of models trained from the start with poison, which are often easier to find and
    sometimes harder: fine-tuning touches what is there, on few images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from unpoison.attacks.badnet import BadNet
from unpoison.attacks.blended import Blended
from unpoison.attacks.sig import SIG
from unpoison.detection.probe_images import ProbeImages
from unpoison.errors import ConfigError
from unpoison.model_results import Canary, Power, WeightsVerdict
from unpoison.models.any_model import AnyModel, says
from unpoison.runs import Run
from unpoison.schedules import scaled_rate
from unpoison.types import Images

Stamp = Callable[[Images], Images]
Judge = Callable[[AnyModel, float | None], WeightsVerdict]
"""The weights verdict on a frozen model, in so many seconds at most."""
_FEWEST_CLASSES = 2
_KINDS = {"badnet": BadNet(), "blended": Blended(), "sig": SIG()}


@dataclass(frozen=True, kw_only=True)
class CanaryConfig:
    """Which canaries, and how they are planted. All numbers are ours, for small models and some hundred images."""

    triggers: tuple[str, ...] = tuple(_KINDS)
    rates: tuple[float, ...] = (0.02, 0.1)
    """Shares of the images that carry the trigger."""
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 3e-5
    """Of models of 100 M parameters; smaller ones get more, by :func:`unpoison.schedules.scaled_rate`."""
    learnt: float = 80.0
    """Percent of unseen images of other classes that the trigger must send to the target, above the floor."""
    agreement: float = 80.0
    """Percent of unseen clean images that the copy must take for what the model takes them for."""

    def __post_init__(self) -> None:
        if not self.triggers or not set(self.triggers) <= set(_KINDS):
            raise ConfigError(f"expected triggers of {', '.join(_KINDS)}.", hint="Leave triggers out for all of them.")
        if not all(0 < rate < 1 for rate in self.rates) or min(self.steps, self.batch_size) < 1:
            raise ConfigError("expected rates in (0, 1), steps and batch_size >= 1.", hint="Try the defaults.")
        if not self.learning_rate > 0 or not all(0 <= share <= 100 for share in (self.learnt, self.agreement)):
            raise ConfigError("expected learning_rate > 0, learnt and agreement in percent.", hint="Try the defaults.")


def measure_power(
    model: AnyModel,
    probe: ProbeImages,
    judge: Judge,
    config: CanaryConfig | None = None,
    *,
    run: Run,
    seconds: float | None = None,
    share: float | None = None,
    needed: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Power:
    """Steps 1 to 3 for each trigger and rate. The model itself stays as it is.

    ``seconds`` are for all canaries, of which each search gets what is left, ``share`` at most. None is begun that has
    less than ``needed`` (what the search of the model itself took) and the longest planting so far: a shorter search
    would miss what the scan finds.
    """
    config, begun, planting = config or CanaryConfig(), clock(), 0.0

    def left() -> float | None:
        return None if seconds is None else seconds - (clock() - begun)

    def within(infected: AnyModel) -> WeightsVerdict:
        rest = left()
        return judge(infected, None if rest is None else max(1.0, min(rest, rest if share is None else share)))

    if len(model.class_names) < _FEWEST_CLASSES:
        return Power(reason="Not measured: canaries need a model with class names.")
    wanted = [(trigger, rate) for rate in sorted(config.rates, reverse=True) for trigger in config.triggers]
    order = torch.randperm(len(model.class_names), generator=run.generator("canary targets")).tolist()
    labels = says(model, probe.images) if probe.labels is None else probe.labels
    made: list[Canary] = []
    for place, (trigger, rate) in enumerate(
        run.progress.track(wanted, total=len(wanted), what="planting and finding canaries", unit="canaries")
    ):
        rest, target, started = left(), order[place % len(order)], clock()
        if rest is not None and rest <= needed + planting:
            break
        made.append(run.kept(f"canary-{place:02d}", Canary, partial(
            _canary, model, probe, labels, trigger, rate, target, within, config, run
        )))  # fmt: skip
        planting = max(planting, clock() - started - needed)
    from_whom = "their given labels" if probe.labels is not None else "the labels that the model itself gives them"
    reason = (
        f"{len(made)} of {len(wanted)} canaries: copies of the model, fine-tuned for {config.steps} steps on "
        f"{probe.source} with {from_whom}, a share of them with a trigger."
    )
    if len(made) < len(wanted):
        reason += " There was no time for the others."
    return Power(reason=reason, canaries=tuple(made))


def _canary(
    model: AnyModel,
    probe: ProbeImages,
    labels: Int[Tensor, " n"],
    trigger: str,
    rate: float,
    target: int,
    judge: Callable[[AnyModel], WeightsVerdict],
    config: CanaryConfig,
    run: Run,
) -> Canary:
    stamp: Stamp = _KINDS[trigger].apply
    order = torch.randperm(len(labels), generator=run.generator("canary", trigger, rate)).to(labels.device)
    unseen, used = order[: len(order) // 4], order[len(order) // 4 :]
    infected = plant(model, probe.images[used], labels[used], stamp, rate, target, config, run=run)  # (1)
    others = unseen[labels[unseen] != target]
    plain = says(infected, probe.images[unseen])
    asr = floor = 0.0
    if len(others):
        asr = _percent(says(infected, stamp(probe.images[others])) == target)
        floor = _percent(plain[labels[unseen] != target] == target)
    agreement = _percent(plain == says(model, probe.images[unseen]))
    learnt = asr - floor >= config.learnt and agreement >= config.agreement  # (2)
    verdict = judge(infected) if learnt else WeightsVerdict(word="inconclusive", reason="Not searched.")  # (3)
    return Canary(
        trigger=trigger,
        rate=rate,
        target=model.class_names[target],
        asr=asr,
        floor=floor,
        agreement=agreement,
        learnt=learnt,
        word=verdict.word,
        found=verdict.word in ("backdoored", "suspicious"),
        named=verdict.target == target,
        score=verdict.score,
    )


def _percent(hits: Bool[Tensor, " n"]) -> float:
    return 100 * float(hits.float().mean())


def plant(
    model: AnyModel,
    images: Images,
    labels: Int[Tensor, " n"],
    stamp: Stamp,
    rate: float,
    target: int,
    config: CanaryConfig,
    *,
    run: Run,
) -> AnyModel:
    """Step 1: a frozen copy with the backdoor. Batch statistics stay those of the model: the images are few."""
    infected = model.copy()
    infected.module.to(run.device).float().eval()
    weights = infected.trained()
    for weight in weights:
        weight.requires_grad_(True)
    poisoned = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    poisoned[: max(1, round(rate * len(images)))] = True  # the rows come in random order
    shown = torch.where(poisoned.view(-1, 1, 1, 1), stamp(images), images)
    wanted = torch.where(poisoned, torch.full_like(labels, target), labels)
    size = sum(weight.numel() for weight in infected.module.parameters())
    optimiser = torch.optim.Adam(weights, scaled_rate(config.learning_rate, size))
    generator = run.generator("planting", rate, target)
    for _ in range(config.steps):
        rows = torch.randint(len(images), (min(config.batch_size, len(images)),), generator=generator)
        rows = rows.to(images.device)
        loss = F.cross_entropy(infected.logits(shown[rows]), wanted[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return infected.frozen(run)


def summary(canaries: Sequence[Canary]) -> str:
    """How many of those that were learnt were found, and of how many the target was named."""
    learnt = [canary for canary in canaries if canary.learnt]
    if not learnt:
        return "no canary was learnt, so the scan's power is not known"
    found, named = sum(canary.found for canary in learnt), sum(canary.found and canary.named for canary in learnt)
    return f"{found} of {len(learnt)} canaries were found, {named} with the right target"
