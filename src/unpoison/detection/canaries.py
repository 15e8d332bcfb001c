"""What would the scan have missed? Backdoors planted in copies of the model, and looked for as in the model itself.

Steps
    1. A copy of the model is fine-tuned on the images at hand, a share of them with a trigger and the target's label.
       Labels are the given ones, or what the model itself says.
    2. The backdoor's success is measured on images that no training saw. A copy that did not take it up says nothing
       about the scan.
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
from jaxtyping import Int
from torch import Tensor

from unpoison.attacks.badnet import BadNet
from unpoison.attacks.blended import Blended
from unpoison.attacks.sig import SIG
from unpoison.detection.probe_images import ProbeImages
from unpoison.errors import ConfigError
from unpoison.model_results import Canary, Power, WeightsVerdict
from unpoison.models.any_model import AnyModel, says
from unpoison.runs import Run
from unpoison.types import Images

Stamp = Callable[[Images], Images]
Judge = Callable[[AnyModel], WeightsVerdict]
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
    learning_rate: float = 1e-3
    learnt: float = 80.0
    """Percent of unseen images of other classes that the trigger must send to the target."""

    def __post_init__(self) -> None:
        if not self.triggers or not set(self.triggers) <= set(_KINDS):
            raise ConfigError(f"expected triggers of {', '.join(_KINDS)}.", hint="Leave triggers out for all of them.")
        if not all(0 < rate < 1 for rate in self.rates) or min(self.steps, self.batch_size) < 1:
            raise ConfigError("expected rates in (0, 1), steps and batch_size >= 1.", hint="Try the defaults.")


def measure_power(
    model: AnyModel,
    probe: ProbeImages,
    judge: Judge,
    config: CanaryConfig | None = None,
    *,
    run: Run,
    seconds: float | None = None,
) -> Power:
    """Steps 1 to 3 for each trigger and rate. ``judge`` is the weights verdict on a frozen model.

    After ``seconds`` no other canary is begun. The model itself stays as it is.
    """
    config, begun = config or CanaryConfig(), time.monotonic()
    if len(model.class_names) < _FEWEST_CLASSES:
        return Power(reason="Not measured: canaries need a model with class names.")
    wanted = [(trigger, rate) for rate in sorted(config.rates, reverse=True) for trigger in config.triggers]
    order = torch.randperm(len(model.class_names), generator=run.generator("canary targets")).tolist()
    labels = says(model, probe.images) if probe.labels is None else probe.labels
    made: list[Canary] = []
    for place, (trigger, rate) in enumerate(
        run.progress.track(wanted, total=len(wanted), what="planting and finding canaries", unit="canaries")
    ):
        if seconds is not None and time.monotonic() - begun >= seconds:
            break
        target = order[place % len(order)]
        made.append(run.kept(f"canary-{place:02d}", Canary, partial(
            _canary, model, probe, labels, trigger, rate, target, judge, config, run
        )))  # fmt: skip
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
    judge: Judge,
    config: CanaryConfig,
    run: Run,
) -> Canary:
    stamp: Stamp = _KINDS[trigger].apply
    order = torch.randperm(len(labels), generator=run.generator("canary", trigger, rate)).to(labels.device)
    unseen, used = order[: len(order) // 4], order[len(order) // 4 :]
    infected = plant(model, probe.images[used], labels[used], stamp, rate, target, config, run=run)  # (1)
    others = unseen[labels[unseen] != target]
    asr = 0.0
    if len(others):
        asr = 100 * float((says(infected, stamp(probe.images[others])) == target).float().mean())  # (2)
    verdict = judge(infected)  # (3)
    return Canary(
        trigger=trigger,
        rate=rate,
        target=model.class_names[target],
        asr=asr,
        learnt=asr >= config.learnt,
        word=verdict.word,
        found=verdict.word in ("backdoored", "suspicious"),
        named=verdict.target == target,
        score=verdict.score,
    )


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
    optimiser = torch.optim.Adam(weights, config.learning_rate)
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
