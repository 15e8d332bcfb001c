"""CGD's scan of a labelled set on Ray Data: any number of machines, the answer of one.

What grows with the images is spread: a pool of workers reads, decodes and judges parts of the set, with CLIP and with
the early models, one pass over each image. The early models are trained here, on a sample of the set: five epochs of a
million images would be too many steps to stop early. A worker hands back a few numbers a row; they are kept in the run
folder, one parquet file a part, and a part that is there is not computed again. Ranks, evidence and regions then take
those numbers alone: memory does not grow with the images.

The result is that of :func:`unpoison.scan_dataset` with the same ``scorer_samples``, but for the last bits of sums.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from accelerate import Accelerator
from jaxtyping import Int

from unpoison.api import ScanOutcome, conclude_scan, describe_samples, split_of
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, check_skips
from unpoison.defenses.cgd import CGDConfig
from unpoison.detection.cgd import (
    SeparationConfig,
    agreement,
    scores_of_losses,
    train_early_model,
    training_rows,
)
from unpoison.distributed.cluster import LOCAL, cluster, pool_size
from unpoison.distributed.parts import Judges, Part, judge, keep, key_of, portable, stored
from unpoison.errors import ResultError
from unpoison.evidence import check_classes
from unpoison.models.classifier import new_classifier
from unpoison.models.zero_shot import CHUNK, DEFAULT_TEMPLATES, class_embeddings, cut_off
from unpoison.results import SampleScores, SkippedRow
from unpoison.runs import Run
from unpoison.types import Classifier, ZeroShotModel

SCORER_SAMPLES = 50_000
"""What the early models are trained on unless the config says more: as many as CIFAR-10 has, the paper's own set."""
RETRIES = 3
"""How often a part whose worker is lost is tried again: an image that kills every worker ends the run."""


def scan_dataset_on_ray(
    source: LabelledImages,
    *,
    clip: ZeroShotModel,
    address: str = LOCAL,
    arch: str = "small-resnet",
    image_size: int = 32,
    config: CGDConfig | None = None,
    run: Run | None = None,
    workers: int | None = None,
    part: int = CHUNK,
) -> ScanOutcome:
    """:func:`unpoison.scan_dataset` with the images read and judged by the Ray cluster at ``address``.

    "local" starts one on this machine and ends it afterwards. ``workers``: a process for each GPU of the cluster, or
    for each core where it has none, unless a number is given; each takes ``part`` rows at a time. The early models are
    trained on ``SCORER_SAMPLES`` rows unless the config says how many. A worker that is lost is replaced.
    Raises what ``scan_dataset`` does, MissingExtraError without Ray, UsageError where no cluster answers, ResultError
    where the workers cannot do it.
    """
    run, config = run or Run(), on_a_sample(config or CGDConfig())
    begun = time.monotonic()
    early = new_classifier(arch, source.class_names, image_size=image_size)
    check_classes(early, source)
    clip.module.to("cpu")  # it travels
    class_embeddings(clip, source.class_names)  # says now what every worker would say
    with cluster(address, workers if address == LOCAL else None) as ray:
        judges = Judges(
            clip=clip,
            early=train_early_models(early, source, config.separation, run),
            clip_logit_scale=config.separation.clip_logit_scale,
        )
        with _parts_folder(run) as folder:
            scores, choices = score_on_ray(ray, source, judges, config, folder, run, workers=workers, part=part)
    split = split_of(scores, replace(config, odd_labels="leave-out"))
    return conclude_scan(
        source,
        scores,
        split,
        describe_samples(source, scores, split, choices),
        clip=clip,
        arch=arch,
        config=config,
        truncated=cut_off(clip, source.class_names, DEFAULT_TEMPLATES),
        seconds=time.monotonic() - begun,
        seed=run.seed,
    )


def on_a_sample(config: CGDConfig) -> CGDConfig:
    """The config with a number of samples to train the early models on."""
    if config.separation.scorer_samples is not None:
        return config
    return replace(config, separation=replace(config.separation, scorer_samples=SCORER_SAMPLES))


def train_early_models(
    classifier: Classifier, source: LabelledImages, config: SeparationConfig, run: Run
) -> tuple[Classifier, ...]:
    """The early models of :func:`unpoison.detection.cgd.early_model_logits`, of which only the sample is decoded."""
    sample = source.select(training_rows(len(source), config, run))
    pixels = load_pixels(sample, classifier.image_size, cache=run.cache, progress=run.progress)
    rows = np.flatnonzero(pixels.usable)
    models = []
    for index in range(config.scorers):

        def train(index: int = index) -> dict[str, Any]:
            trained = train_early_model(classifier, pixels, sample.labels, rows, config, index, run=run)
            return {name: value.detach().cpu() for name, value in trained.module.state_dict().items()}

        model = classifier.fresh(0)
        model.module.load_state_dict(run.step(f"early-model-{index}", train))
        models.append(model)
    return tuple(models)


def score_on_ray(
    ray: Any,
    source: LabelledImages,
    judges: Judges,
    config: CGDConfig,
    folder: Path,
    run: Run,
    *,
    workers: int | None,
    part: int,
) -> tuple[SampleScores, Int[np.ndarray, " n"]]:
    """The scores of all rows and CLIP's choices, from the parts in ``folder``; those that are not there are made."""
    clip_loss, early_loss = np.full((2, len(source)), np.nan)
    choices = np.full(len(source), -1, dtype=np.int64)
    skipped: list[tuple[int, SkippedRow]] = []
    parts = _all_parts(ray, source, judges, folder, run, workers, part)
    for found in run.progress.track(parts, total=len(source), what="CLIP and early models", weight=part, unit="images"):
        rows = slice(found.start, found.start + len(found.choice))
        clip_loss[rows], early_loss[rows], choices[rows] = found.clip_loss, found.early_loss, found.choice
        places = [(found.start + place, reason) for place, reason in found.skipped]
        skipped += [(row, SkippedRow(id=source.ids[row], reason=reason)) for row, reason in places]
        check_skips([row for _, row in skipped], len(source), source.name)
    skipped.sort(key=lambda entry: entry[0])
    scores = scores_of_losses(
        source,
        clip_loss,
        early_loss,
        config.separation,
        skipped=(*source.skipped, *(row for _, row in skipped)),
        agreement=agreement(choices, source.labels),
    )
    return scores, choices


class Tries:
    """How often each part was begun: Ray Data itself would try one that kills every worker for ever."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, start: int) -> int:
        self.begun[start] += 1
        return self.begun[start]


class Worker:
    """One process of the pool: Ray Data makes it, hands it messages, takes its answers and replaces it when it dies."""

    def __init__(self, judges: Any, tries: Any, class_names: tuple[str, ...]) -> None:
        import ray
        import ray.cloudpickle
        import torch

        on_gpu = bool(ray.get_gpu_ids())
        if not on_gpu:
            torch.set_num_threads(1)  # there is one of these for each core
        self.run = Run(accelerator=Accelerator(cpu=not on_gpu))
        self.get, self.tries = ray.get, tries
        self.pickle: Any = ray.cloudpickle
        self.judges: Judges = ray.get(judges[0])
        self.judges.clip.module.to(self.run.device).eval()
        self.texts = class_embeddings(self.judges.clip, class_names)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        found = [self.judge(int(start), rows) for start, rows in zip(batch["start"], batch["rows"], strict=True)]
        return {"part": [self.pickle.dumps(each) for each in found]}

    def judge(self, start: int, rows: bytes) -> Part:
        tries: Any = self.get(self.tries.begin.remote(start))
        if tries > 1 + RETRIES:
            raise RuntimeError(f"{RETRIES + 1} workers died of the rows from {start} on")
        return judge(self.judges, self.texts, self.pickle.loads(rows), start, self.run)


def _all_parts(
    ray: Any, source: LabelledImages, judges: Judges, folder: Path, run: Run, workers: int | None, size: int
) -> Iterator[Part]:
    """Those that are in the folder, then the others as the workers hand them back, each kept before it is told."""
    key = key_of(judges, source)
    missing = []
    for start in range(0, len(source), size):
        rows = slice(start, min(start + size, len(source)))
        found = stored(folder, source, rows, key, run)
        if found is None:
            missing.append(rows)
        else:
            yield found
    if not missing:
        return
    with _quiet_data():
        for found in _judged_on_ray(ray, source, judges, missing, workers):
            keep(folder, found, source, key)
            yield found


def _judged_on_ray(
    ray: Any, source: LabelledImages, judges: Judges, missing: list[slice], workers: int | None
) -> Iterator[Part]:
    pool, on_gpus = pool_size(ray)
    held = ray.put(judges)  # for as long as a worker may have to be replaced
    tries = ray.remote(num_cpus=0)(Tries).remote()
    messages = [{"start": rows.start, "rows": ray.cloudpickle.dumps(portable(source, rows))} for rows in missing]
    try:
        parts = ray.data.from_items(messages, override_num_blocks=len(messages)).map_batches(
            Worker,
            fn_constructor_args=([held], tries, source.class_names),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers or pool, len(missing))),
            num_cpus=1,
            num_gpus=int(on_gpus),
        )
        for row in parts.iter_rows():
            yield ray.cloudpickle.loads(row["part"])
    except ray.exceptions.RayError as error:
        raise ResultError(
            f"the workers cannot judge {source.name}: {_reason(error)}.",
            hint="Every node needs this version of unpoison, and a source in files at the same path as here. Parts "
            "that were judged are kept: the same command goes on after them.",
        ) from error


def _reason(error: Exception) -> str:
    """The error behind Ray's, which quotes whole tracebacks and adds advice."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if re.match(r"(?!ray\.)[\w.]+(Error|Exception): ", line)]
    return (named or lines or [type(error).__name__])[-1].rstrip(".")


@contextmanager
def _quiet_data() -> Iterator[None]:
    """No progress bars, log lines and usage records of Ray Data; its settings are put back."""
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    import ray.data

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


@contextmanager
def _parts_folder(run: Run) -> Iterator[Path]:
    if run.folder is None:
        with TemporaryDirectory(prefix="unpoison-parts-") as name:
            yield Path(name)
        return
    folder = run.folder.path / "parts"
    folder.mkdir(exist_ok=True)
    yield folder


__all__ = ["SCORER_SAMPLES", "scan_dataset_on_ray"]
