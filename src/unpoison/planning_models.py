"""What ``scan model`` would do, need and take, from a few probed steps. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from unpoison.api_model_data import plan_data
from unpoison.api_models import ModelScanConfig, files_of, try_to_open
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.sources import LabelledImages
from unpoison.detection.canaries import plant
from unpoison.detection.class_search import seconds_of_search
from unpoison.detection.decree import decree
from unpoison.detection.model_files import judge_files
from unpoison.detection.model_weights import fast_logits
from unpoison.detection.probe_images import ProbeImages, gather_images
from unpoison.models.any_model import AnyModel, Opening
from unpoison.planning import Plan, PlannedStep, resident
from unpoison.runs import Run
from unpoison.types import ImageTextModel

_FILES = ("run.json", "trigger.png", "model-scan.json", "report.html")
_PROBED, _STEPS, _LEAST_CLASSES = 64, 3, 2
_STATE = 4  # of a canary: weights, gradients and Adam's two momenta


def plan_model_scan(
    model: str | Path,
    *,
    images: LabelledImages | None = None,
    class_names: Sequence[str] | None = None,
    references: int = 0,
    trained_on: LabelledImages | ImageTextPairs | None = None,
    data_method: str | None = None,
    clip: ImageTextModel | None = None,
    opening: Opening | None = None,
    power: bool = False,
    config: ModelScanConfig | None = None,
    run: Run | None = None,
) -> Plan:
    """The steps of ``scan_model`` with these arguments. Files are judged; only those that are accepted are opened, and
    some steps of each kind of search are timed on made-up images.

    ``references`` are how many there are: each is taken to need what the model needs. Without a budget; a model whose
    classes are hopeless soon takes less. Raises ModelError where there is no such model, UsageError, and what the plan
    of a scan of the data raises.
    """
    run, config = replace(run or Run(), cache=None), config or ModelScanConfig()
    found = []
    seconds = _seconds(lambda: found.append(judge_files(files_of(model))))
    file = found[0]
    steps = [
        PlannedStep(
            what=f"file verdict: {file.word} ({file.format})", amount=len(file.files), unit="files", seconds=seconds
        )
    ]
    opened: AnyModel | None = None
    if file.word == "accepted":
        opened, why = try_to_open(model, class_names, images, opening or Opening(), run)
        if opened is None:
            what = f"weights: not looked at, the model cannot be opened ({why})"
            steps.append(PlannedStep(what=what, amount=0, unit="steps", seconds=0.0))
    needed = 0
    if opened is not None:
        looked, needed = _weights(opened, images, references, config, power, run)
        steps += looked
    files, disk = _FILES, 0
    if trained_on is not None:
        plan = plan_data(opened, trained_on, data_method, clip, run=run)
        if plan is not None:
            steps += [replace(step, what=f"data: {step.what}") for step in plan.steps]
            files, disk, needed = (*_FILES, "data/"), plan.disk, max(needed, plan.memory - resident())
    return Plan(steps=tuple(steps), memory=resident() + max(0, needed), disk=disk, files=files)


def _weights(
    opened: AnyModel,
    images: LabelledImages | None,
    references: int,
    config: ModelScanConfig,
    power: bool,
    run: Run,
) -> tuple[list[PlannedStep], int]:
    """The steps of the weights verdict and of the canaries, and the bytes that they need beside what is loaded."""
    frozen = opened.frozen(run)
    probe = gather_images(None, frozen.class_names, frozen.image_size, _PROBED, run=run)
    count = config.weights.images
    steps: list[PlannedStep] = []
    if images is not None:
        rows = torch.randperm(len(images), generator=run.generator("probe"))[:_PROBED].numpy()
        decode = _seconds(lambda: images.decode(rows)) / len(rows)
        count = min(count, len(images))
        steps.append(PlannedStep(what="decode the images", amount=count, unit="images", seconds=decode * count))
    needed = 4 * count * probe.images[0].numel()
    if frozen.class_names:
        amount, seconds = seconds_of_search(
            fast_logits(frozen, run), probe.images, len(frozen.class_names), config.weights.search, run=run
        )
        forms = ", ".join(config.weights.search.forms)
        what = f"weights: search {len(frozen.class_names)} classes in each form ({forms})"
    else:
        amount = config.weights.decree.steps
        short = replace(config.weights.decree, steps=_STEPS)
        seconds = _seconds(lambda: decree(frozen.encode, probe.images, short, run=run)) / _STEPS * amount
        what = "weights: DECREE, for an encoder without class names"
    steps.append(PlannedStep(what=what, amount=amount, unit="steps", seconds=seconds))
    if references:
        more = f"the same for {references} clean {'reference' if references == 1 else 'references'}"
        more += " (none for those in the cache)"
        steps.append(PlannedStep(what=more, amount=amount * references, unit="steps", seconds=seconds * references))
    if power and len(frozen.class_names) >= _LEAST_CLASSES:
        canaries = len(config.canaries.triggers) * len(config.canaries.rates)
        planting = _planting(frozen, probe, config, run)
        what = f"power: {canaries} canaries of {config.canaries.steps} training steps, each scanned as the model is"
        steps.append(
            PlannedStep(
                what=what, amount=canaries * (config.canaries.steps + amount), unit="steps",
                seconds=canaries * (planting + seconds),
            )
        )  # fmt: skip
        needed += _STATE * 4 * sum(value.numel() for value in frozen.module.parameters())
    return steps, needed


def _planting(frozen: AnyModel, probe: ProbeImages, config: ModelScanConfig, run: Run) -> float:
    """Seconds to plant one canary, from a few training steps."""
    short = replace(config.canaries, steps=_STEPS)
    labels = torch.zeros(len(probe.images), dtype=torch.long, device=probe.images.device)
    taken = _seconds(lambda: plant(frozen, probe.images, labels, lambda part: part, 0.1, 0, short, run=run))
    return taken / _STEPS * config.canaries.steps


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-6)
