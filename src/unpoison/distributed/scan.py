"""CGD's scan of a labelled set on Ray Data: any number of machines, the answer of one.

First stage: what grows with the images is spread. A pool of workers reads, decodes and judges parts of the set, with
CLIP and with the early models, one pass over each image. The early models are trained here, on a sample of the set:
five epochs of a million images would be too many steps to stop early. A worker writes a few numbers a row into the run
folder, one parquet file a part, where it sees that folder, and else hands the file back; only which part it was, and
what it skipped, passes through this process. A part that is there is not computed again.

Second stage: ranks, evidence and regions are made here from the parts' numbers, five of each row, and its id. They do
not grow with the images, but with the rows they do.

The result is that of :func:`unpoison.scan_dataset` with the same ``scorer_samples``, but for the last bits of sums.
"""

from __future__ import annotations

import logging
import os
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
from unpoison.distributed.cluster import LOCAL, cluster, pool_size, reason_of
from unpoison.distributed.parts import Judges, encode, file_of, judge, key_of, portable, stored
from unpoison.errors import ResultError
from unpoison.evidence import check_classes
from unpoison.models.classifier import new_classifier
from unpoison.models.zero_shot import CHUNK, DEFAULT_TEMPLATES, class_embeddings, cut_off
from unpoison.results import SampleScores, SkippedRow
from unpoison.runs import Run
from unpoison.storage import partial_of, remove_partials, write_atomically
from unpoison.types import Classifier, ZeroShotModel

Skipped = tuple[tuple[int, str], ...]
"""Places in a part with the reasons why these rows cannot be used."""
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
    key = key_of(judges, source)
    spans = [slice(start, min(start + part, len(source))) for start in range(0, len(source), part)]
    skipped: list[tuple[int, SkippedRow]] = []
    made = _all_parts(ray, source, judges, folder, run, workers, spans, key)
    for start, places in run.progress.track(
        made, total=len(source), what="CLIP and early models", weight=part, unit="images"
    ):
        rows = [(start + place, reason) for place, reason in places]
        skipped += [(row, SkippedRow(id=source.ids[row], reason=reason)) for row, reason in rows]
        check_skips([row for _, row in skipped], len(source), source.name)
    skipped.sort(key=lambda entry: entry[0])
    return rank_parts(source, folder, spans, key, config, run, tuple(row for _, row in skipped))


def rank_parts(
    source: LabelledImages,
    folder: Path,
    spans: list[slice],
    key: str,
    config: CGDConfig,
    run: Run,
    skipped: tuple[SkippedRow, ...],
) -> tuple[SampleScores, Int[np.ndarray, " n"]]:
    """The second stage: the parts' numbers, read one part after the other, and the ranks over all of them.

    Raises ResultError for a part that is gone or damaged.
    """
    clip_loss, early_loss = np.full((2, len(source)), np.nan)
    choices = np.full(len(source), -1, dtype=np.int64)
    for rows in spans:
        found = stored(folder, source, rows, key, run)
        if found is None:
            raise ResultError(
                f"{file_of(folder, rows)} is gone or damaged.", hint="Give the same command again: it is made anew."
            )
        clip_loss[rows], early_loss[rows], choices[rows] = found.clip_loss, found.early_loss, found.choice
    scores = scores_of_losses(
        source,
        clip_loss,
        early_loss,
        config.separation,
        skipped=(*source.skipped, *skipped),
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
    """One process of the pool: Ray Data makes it, hands it messages, takes its answers and replaces it when it dies.

    ``folder`` is where parts go, on a node that finds the file ``sign`` there.
    """

    def __init__(self, judges: Any, tries: Any, class_names: tuple[str, ...], folder: str, sign: str, key: str) -> None:
        import ray
        import ray.cloudpickle
        import torch

        on_gpu = bool(ray.get_gpu_ids())
        if not on_gpu:
            torch.set_num_threads(1)  # there is one of these for each core
        self.run = Run(accelerator=Accelerator(cpu=not on_gpu))
        self.get, self.tries = ray.get, tries
        self.folder, self.sign, self.part_key = Path(folder), sign, key
        self.pickle: Any = ray.cloudpickle
        self.judges: Judges = ray.get(judges[0])
        self.judges.clip.module.to(self.run.device).eval()
        self.texts = class_embeddings(self.judges.clip, class_names)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        made = [self.make(int(start), rows) for start, rows in zip(batch["start"], batch["rows"], strict=True)]
        return {name: [each[name] for each in made] for name in ("start", "skipped", "file")}

    def make(self, start: int, message: bytes) -> dict[str, Any]:
        """Judge a part and write it; its file goes back as bytes from a node that does not see the folder."""
        tries: Any = self.get(self.tries.begin.remote(start))
        if tries > 1 + RETRIES:
            raise RuntimeError(f"{RETRIES + 1} workers died of the rows from {start} on")
        rows = self.pickle.loads(message)
        part = judge(self.judges, self.texts, rows, start, self.run)
        file = encode(part, rows, self.part_key)
        if (self.folder / self.sign).exists():
            write_atomically(file_of(self.folder, slice(start, start + len(rows))), file)
            file = b""
        return {"start": start, "skipped": self.pickle.dumps(part.skipped), "file": file}


def _all_parts(
    ray: Any,
    source: LabelledImages,
    judges: Judges,
    folder: Path,
    run: Run,
    workers: int | None,
    spans: list[slice],
    key: str,
) -> Iterator[tuple[int, Skipped]]:
    """Where each part begins and what it skipped: those that are in the folder, then the others as they come there."""
    missing = []
    for rows in spans:
        found = stored(folder, source, rows, key, run)
        if found is None:
            missing.append(rows)
        else:
            yield found.start, found.skipped
    if not missing:
        return
    with _quiet_data(), _signed(folder) as sign:
        shared = (str(folder.absolute()), sign, key)
        yield from _made_on_ray(ray, source, judges, {rows.start: rows for rows in missing}, workers, folder, shared)


def _made_on_ray(
    ray: Any,
    source: LabelledImages,
    judges: Judges,
    missing: dict[int, slice],
    workers: int | None,
    folder: Path,
    shared: tuple[str, str, str],
) -> Iterator[tuple[int, Skipped]]:
    pool, on_gpus = pool_size(ray)
    held = ray.put(judges)  # for as long as a worker may have to be replaced
    tries = ray.remote(num_cpus=0)(Tries).remote()
    messages = [
        {"start": start, "rows": ray.cloudpickle.dumps(portable(source, rows))} for start, rows in missing.items()
    ]
    try:
        parts = ray.data.from_items(messages, override_num_blocks=len(messages)).map_batches(
            Worker,
            fn_constructor_args=([held], tries, source.class_names, *shared),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers or pool, len(missing))),
            num_cpus=1,
            num_gpus=int(on_gpus),
        )
        for row in parts.iter_rows():
            if row["file"]:
                write_atomically(file_of(folder, missing[row["start"]]), row["file"])
            yield row["start"], ray.cloudpickle.loads(row["skipped"])
    except ray.exceptions.RayError as error:
        raise ResultError(
            f"the workers cannot judge {source.name}: {reason_of(error)}.",
            hint="Every node needs this version of unpoison, and a source in files at the same path as here. Parts "
            "that were judged are kept: the same command goes on after them.",
        ) from error


@contextmanager
def _signed(folder: Path) -> Iterator[str]:
    """A file in the folder by which a node knows that it sees this very one, and no other at the same path."""
    sign = partial_of(folder / "sign").name  # a killed run's is removed with what else it left
    (folder / sign).touch()
    try:
        yield sign
    finally:
        (folder / sign).unlink(missing_ok=True)


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
    remove_partials(folder)
    yield folder


__all__ = ["SCORER_SAMPLES", "scan_dataset_on_ray"]
