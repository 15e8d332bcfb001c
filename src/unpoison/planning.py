"""What a run would do, need and take, from a few probed batches. Writes nothing."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from unpoison.data.sources import LabelledImages
from unpoison.demo import DemoConfig
from unpoison.models.image_classifier import ImageClassifier
from unpoison.results import SkippedRow
from unpoison.runs import Run
from unpoison.types import ZeroShotModel

_PROBED = 128  # images; enough to pass the first, slower batch
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """``amount`` things of ``unit``, ``seconds`` in all."""

    what: str
    amount: int
    unit: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a run in order, its peak memory and new disk space in bytes, and the files it would write."""

    steps: tuple[PlannedStep, ...]
    memory: int
    disk: int
    files: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Images per second of each kind of work on this machine, for this source and these models."""

    decode: float
    clip: float
    forward: float
    train: float


def probe(source: LabelledImages, clip: ZeroShotModel | None, classifier: ImageClassifier, *, run: Run) -> Rates:
    """Time decoding, CLIP's forward pass (endless where there is no CLIP), and the classifier's two passes."""
    rows = np.random.default_rng(run.seed).permutation(len(source))[:_PROBED]
    decoded: list = []
    decode = _rate(lambda: decoded.extend(source.decode(rows)), len(rows))
    pictures = [image for image in decoded if not isinstance(image, SkippedRow)][:_BATCH]
    clip_rate = float("inf")
    if clip is not None and pictures:
        images = clip.preprocess(pictures).to(run.device)
        with torch.no_grad():
            clip.encode_images(images)
            clip_rate = _rate(lambda: clip.encode_images(images), len(pictures))
    probed = classifier.fresh(0)
    size = probed.image_size
    noise = torch.rand(_BATCH, 3, size, size, generator=torch.Generator().manual_seed(0)).to(run.device)
    probed.module.to(run.device)

    def forward() -> None:
        with torch.no_grad():
            probed.logits(noise)

    def train() -> None:
        labels = torch.zeros(_BATCH, dtype=torch.long, device=run.device)
        F.cross_entropy(probed.logits(noise).float(), labels).backward()

    forward()
    train()
    return Rates(decode=decode, clip=clip_rate, forward=_rate(forward, _BATCH), train=_rate(train, _BATCH))


def plan_scan(
    samples: int,
    size: int,
    rates: Rates,
    *,
    scorers: int,
    scorer_epochs: int,
    classes: int,
    trained: int | None = None,
) -> Plan:
    """The steps of ``scan dataset`` with CGD on ``samples`` images at ``size`` pixels, ``trained`` of them (None: all)
    for the scorers."""
    trained = min(trained or samples, samples)
    steps = (
        _step("decode the images", samples, rates.decode),
        _step("CLIP's opinion of every label", samples, rates.clip),
        _step(f"train {scorers} scorers, {scorer_epochs} epochs each", trained * scorers * scorer_epochs, rates.train),
        _step("score with them", samples * scorers, rates.forward),
    )
    files = ("run.json", "scores.parquet", "split.parquet", "scan.json", "samples.json", "report.html")
    return Plan(
        steps=steps,
        memory=resident() + samples * classes * 4 * 4,
        disk=samples * (3 * size * size + classes * 4 + 200),
        files=files,
    )


def on_workers(plan: Plan, samples: int, size: int, workers: int) -> Plan:
    """A scan's plan with all but the training spread over ``workers`` processes, of as many cores as were probed.

    Memory is that of one process; nothing in it but a few numbers a row and class grows with the images.
    """
    steps = tuple(
        step if "train" in step.what else replace(step, seconds=step.seconds / workers) for step in plan.steps
    )
    files = (*plan.files[:1], "parts/", *plan.files[1:])
    return replace(plan, steps=steps, memory=resident() + samples * 512, disk=samples * 200, files=files)


def plan_detection(samples: int, size: int, rates: Rates, *, epochs: int, passes: int) -> Plan:
    """The steps of ``scan dataset`` with a detector that needs a trained network; ``epochs`` 0 where one is given."""
    steps = (
        _step("decode the images", samples, rates.decode),
        *([_step(f"train a network, {epochs} epochs", samples * epochs, rates.train)] if epochs else []),
        _step("score with it", samples * passes, rates.forward),
    )
    files = ("run.json", "scores.parquet", "split.parquet", "scan.json", "samples.json", "report.html")
    return Plan(steps=steps, memory=resident() + samples * 2048, disk=samples * (3 * size * size + 200), files=files)


def plan_purification(
    samples: int, size: int, rates: Rates, *, scorers: int, scorer_epochs: int, classes: int, repaired: int,
    passed: int = 0, attempts: int = 1,
) -> Plan:  # fmt: skip
    """:func:`plan_scan`, then ``repaired`` images of further training and ``passed`` ones that are only looked at.

    ``attempts``: how often that happens at most; the plan counts one, and says so.
    """
    scan = plan_scan(samples, size, rates, scorers=scorers, scorer_epochs=scorer_epochs, classes=classes)
    tries = f", one attempt of at most {attempts}" if attempts > 1 else ""
    repair = PlannedStep(
        what=f"repair the model{tries}", amount=repaired + passed, unit="images",
        seconds=repaired / rates.train + passed / rates.forward,
    )  # fmt: skip
    files = ("run.json", "scores.parquet", "split.parquet", "samples.json", "purification.json", "model/", "card.md")
    return Plan(
        steps=(*scan.steps, repair),
        memory=scan.memory,
        disk=scan.disk,
        files=(*files, "report.html"),
    )


def plan_demo(config: DemoConfig, classes: int, size: int, rates: Rates) -> Plan:
    """The steps of ``demo``."""
    separation = config.cgd.separation
    repair = plan_purification(
        config.train,
        size,
        rates,
        scorers=separation.scorers,
        scorer_epochs=separation.scorer_epochs,
        classes=classes,
        repaired=config.cgd.steps * config.cgd.batch_size,
    )
    steps = (
        _step("train the model to be repaired", config.train * config.epochs, rates.train),
        *repair.steps,
        _step("measure before and after", 4 * config.test, rates.forward),
    )
    files = ("poisoned/", "victim/", *repair.files)
    return Plan(steps=steps, memory=repair.memory, disk=3 * repair.disk, files=files)


def plan_attack(source: LabelledImages, poisoned: int, *, manifest_only: bool) -> Plan:
    """The steps of ``attack`` on ``source``; ``poisoned`` images are decoded, triggered and encoded again."""
    if manifest_only:
        return Plan(steps=(), memory=resident(), disk=64 * poisoned, files=("manifest.json",))
    rows = np.linspace(0, len(source) - 1, min(_PROBED, len(source))).astype(np.int64)
    sizes = [len(data) for data in source.raw(rows) if isinstance(data, bytes)]
    decode = _rate(lambda: source.decode(rows), len(rows))
    copy = _rate(lambda: source.raw(rows), len(rows))
    steps = (
        _step("decode, trigger, encode", poisoned, decode / 3),
        _step("copy the others", len(source) - poisoned, copy),
    )
    disk = int(np.mean(sizes or [0])) * len(source) + 64 * poisoned
    return Plan(steps=steps, memory=resident(), disk=disk, files=("data.parquet", "manifest.json"))


def _step(what: str, amount: int, rate: float) -> PlannedStep:
    return PlannedStep(what=what, amount=amount, unit="images", seconds=amount / rate)


def _rate(work: Callable[[], object], amount: int) -> float:
    began = time.perf_counter()
    work()
    return amount / max(time.perf_counter() - began, 1e-6)


def resident() -> int:
    """This process's peak so far, in bytes: the models are loaded and one batch went through them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
