"""What the purification of a zero-shot classifier would do and take, from one probed batch. Writes nothing."""

from __future__ import annotations

from typing import Any

import torch

from unpoison.data.sources import LabelledImages
from unpoison.defenses.baselines.rvpt import RVPTConfig
from unpoison.defenses.cbpt import CBPTConfig
from unpoison.defenses.shots import JUDGED, JUDGED_IN_ALL
from unpoison.evaluation.embeddings import ready
from unpoison.planning import Plan, PlannedStep, resident
from unpoison.planning_clip import seconds_of
from unpoison.runs import Run
from unpoison.types import ImageTextModel

_PROBED = 16


def plan_zero_shot(
    clip: ImageTextModel,
    images: LabelledImages,
    config: Any,
    *,
    target: str | None = None,
    run: Run,
    tested: int = 0,
) -> Plan:
    """The steps of ``purify cbpt``, ``rvpt`` or ``linear-probe`` on ``images``; 16 grey images are timed.

    ``tested`` images are encoded before and after beside that. Raises ModelError.
    """
    size, classes = clip.image_size, len(images.class_names)
    probed = clip.copy()
    with ready(probed, run):
        probed.module.float().requires_grad_(False)
        grey = torch.full((_PROBED, 3, size, size), 0.5, device=run.device)

        def forward() -> None:
            with torch.no_grad():
                probed.encode_images(grey)

        def both() -> None:
            probed.encode_images(grey.requires_grad_(True)).sum().backward()

        forward()
        once, there_and_back = (seconds_of(work) / _PROBED for work in (forward, both))
    learnt = min(len(images), classes * config.shots)
    judging = min(len(images) - learnt, JUDGED_IN_ALL, classes * JUDGED)
    planned = [_passes("embed the shots", learnt + 2 * judging, once)]
    if isinstance(config, CBPTConfig):
        inversion, search = config.inversion, config.search
        if target is None:
            steps = classes * search.inversion.steps
            if classes > search.finalists:
                steps = classes * search.first_steps + search.finalists * search.inversion.steps
            passed = steps * search.inversion.batch_size
            planned.append(_passes("look for a trigger", passed, there_and_back))
        several = config.dummies == "several"
        dummies, steps = len(config.loud) if several else 1, inversion.steps  # of the one that is kept aside
        if config.delta == "inverted" and several:
            steps += 2 * inversion.steps + config.loud_steps * dummies
            dummies += 2
        elif config.delta == "inverted":
            steps += sum(config.loud_steps if form == "additive" else inversion.steps for form in config.forms)
        dummies = 0 if config.delta == "none" else dummies
        planned.append(_passes("invert triggers", steps * inversion.batch_size, there_and_back))
        worn = learnt * config.views * (1 + dummies) + judging * (1 + dummies)
        planned.append(_passes("embed the shots with them", worn, once))
    if isinstance(config, RVPTConfig):
        planned.append(_passes("learn visual prompts", config.epochs * learnt, 2 * there_and_back))
    if tested:
        planned.append(_passes("measure before and after", 2 * tested, once))
    return Plan(
        steps=tuple(planned),
        memory=resident(),
        disk=3 * (learnt + judging) * size**2,
        files=("run.json", "steps/", "purification.json", "classifier.safetensors", "report.html"),
    )


def _passes(what: str, amount: int, seconds: float) -> PlannedStep:
    return PlannedStep(what=what, amount=amount, unit="images", seconds=amount * seconds)
