"""CGD's scan of a labelled set on Ray Data: any number of machines, the answer of one.

What grows with the images is spread: a pool of workers reads, decodes and judges parts of the set, with CLIP and with
the early models, one pass over each image. The early models are trained here, on a sample of the set: five epochs of a
million images would be too many steps to stop early. A worker hands back a few numbers a row; they are kept in the run
folder, one parquet file a part, and a part that is there is not computed again. Ranks, evidence and regions then take
those numbers alone: memory does not grow with the images.

The result is that of :func:`unpoison.scan_dataset` with the same ``scorer_samples``, but for the last bits of sums.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import msgspec
import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from datasets.table import InMemoryTable
from jaxtyping import Float, Int
from PIL import Image

from unpoison.api import ScanOutcome, check_classes, conclude_scan, describe_samples, split_of
from unpoison.data.encoded import take
from unpoison.data.pixels import Pixels, fit, load_pixels
from unpoison.data.sources import LabelledImages, check_skips
from unpoison.defenses.cgd import CGDConfig
from unpoison.detection.cgd import (
    SeparationConfig,
    agreement,
    apply_classifier,
    first_choices,
    scores_of_losses,
    train_early_model,
    training_rows,
)
from unpoison.detection.ranks import label_cross_entropy
from unpoison.distributed.cluster import LOCAL, cluster, pool_size
from unpoison.errors import ResultError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.classifier import new_classifier
from unpoison.models.zero_shot import (
    CHUNK,
    DEFAULT_TEMPLATES,
    class_embeddings,
    cosines_of,
    cut_off,
    read_ahead,
    rows_at_once,
)
from unpoison.results import SampleScores, SkippedRow
from unpoison.runs import Run
from unpoison.storage import read_table, write_table
from unpoison.types import Classifier, ZeroShotModel

SCORER_SAMPLES = 50_000
"""What the early models are trained on unless the config says more: as many as CIFAR-10 has, the paper's own set."""
RETRIES = 3
"""How often a part whose worker is lost is tried again: an image that kills every worker ends the run."""
_SCHEMA, _VERSION = "scan-part", b"scan-part-1"  # raised when what a part holds, or how it is computed, changes


@dataclass(frozen=True, kw_only=True, eq=False)
class Judges:
    """What every worker holds: CLIP, the early models, and the factor on CLIP's cosines."""

    clip: ZeroShotModel
    early: tuple[Classifier, ...]
    clip_logit_scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """The rows from ``start`` on: losses against the given label (NaN where skipped), CLIP's choice (then -1).

    ``skipped`` are places in the part with their reasons.
    """

    start: int
    clip_loss: Float[np.ndarray, " k"]
    early_loss: Float[np.ndarray, " k"]
    choice: Int[np.ndarray, " k"]
    skipped: tuple[tuple[int, str], ...]


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
    skipped: dict[int, str] = {}
    parts = _all_parts(ray, source, judges, folder, run, workers, part)
    for found in run.progress.track(parts, total=len(source), what="CLIP and early models", weight=part, unit="images"):
        rows = slice(found.start, found.start + len(found.choice))
        clip_loss[rows], early_loss[rows], choices[rows] = found.clip_loss, found.early_loss, found.choice
        skipped |= {found.start + place: reason for place, reason in found.skipped}
        check_skips(_rows(source, skipped), len(source), source.name)
    scores = scores_of_losses(
        source,
        clip_loss,
        early_loss,
        config.separation,
        skipped=(*source.skipped, *_rows(source, skipped)),
        agreement=agreement(choices, source.labels),
    )
    return scores, choices


def judge(judges: Judges, texts: Any, source: LabelledImages, start: int, run: Run) -> Part:
    """One part: each image is decoded once, for CLIP and for the early models."""
    clip, size = judges.clip, judges.early[0].image_size
    cosines = np.full((len(source), len(source.class_names)), np.nan, dtype=np.float32)
    array = np.zeros((len(source), size, size, 3), dtype=np.uint8)
    usable = np.zeros(len(source), dtype=bool)
    skipped: list[tuple[int, str]] = []

    def decoded() -> Iterator[tuple[np.ndarray, Any]]:
        for first in range(0, len(source), rows_at_once(clip)):
            rows = np.arange(first, min(first + rows_at_once(clip), len(source)))
            good, images = [], []
            for row, picture in zip(rows.tolist(), source.decode(rows), strict=True):
                if isinstance(picture, Image.Image):
                    good.append(row)
                    images.append(picture)
                    array[row] = np.asarray(fit(picture, size))
                else:
                    skipped.append((row, picture.reason))
            if good:
                yield np.array(good), clip.preprocess(images)

    for rows, images in read_ahead(decoded()):
        cosines[rows] = cosines_of(clip, images, texts)
        usable[rows] = True
    pixels = Pixels(array=array, usable=usable, skipped=())
    logits = np.zeros(cosines.shape, dtype=np.float64)
    rows = np.flatnonzero(usable)
    for early in judges.early if len(rows) else ():
        logits[rows] += apply_classifier(early, pixels, rows, run=run)
    logits[~usable] = np.nan
    return Part(
        start=start,
        clip_loss=label_cross_entropy(judges.clip_logit_scale * cosines, source.labels),
        early_loss=label_cross_entropy(logits / len(judges.early), source.labels),
        choice=first_choices(cosines),
        skipped=tuple(skipped),
    )


class Worker:
    """One process of the pool: Ray Data makes it once, hands it messages and takes its answers."""

    def __init__(self, judges: Any, class_names: tuple[str, ...]) -> None:
        import ray
        import ray.cloudpickle
        import torch

        on_gpu = bool(ray.get_gpu_ids())
        if not on_gpu:
            torch.set_num_threads(1)  # there is one of these for each core
        self.run = Run(accelerator=Accelerator(cpu=not on_gpu))
        self.pickle: Any = ray.cloudpickle
        self.judges: Judges = ray.get(judges[0])
        self.judges.clip.module.to(self.run.device).eval()
        self.texts = class_embeddings(self.judges.clip, class_names)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        found = [
            judge(self.judges, self.texts, self.pickle.loads(rows), int(start), self.run)
            for start, rows in zip(batch["start"], batch["rows"], strict=True)
        ]
        return {"part": [self.pickle.dumps(each) for each in found]}


def _all_parts(
    ray: Any, source: LabelledImages, judges: Judges, folder: Path, run: Run, workers: int | None, size: int
) -> Iterator[Part]:
    """Those that are in the folder, then the others as the workers hand them back, each kept before it is told."""
    key = _key(judges, source)
    missing = []
    for start in range(0, len(source), size):
        rows = slice(start, min(start + size, len(source)))
        stored = _stored(_file(folder, rows), source, rows, key, run)
        if stored is None:
            missing.append(rows)
        else:
            yield stored
    if not missing:
        return
    with _quiet_data():
        yield from _kept(_judged_on_ray(ray, source, judges, missing, workers), source, folder, key)


def _kept(parts: Iterator[Part], source: LabelledImages, folder: Path, key: str) -> Iterator[Part]:
    for found in parts:
        rows = slice(found.start, found.start + len(found.choice))
        columns = {
            "id": source.ids[rows],
            "label": source.labels[rows],
            "clip_loss": found.clip_loss,
            "early_loss": found.early_loss,
            "clip_label": found.choice,
        }
        write_table(_file(folder, rows), _SCHEMA, columns, {"key": key, "skipped": found.skipped})
        yield found


def _judged_on_ray(
    ray: Any, source: LabelledImages, judges: Judges, missing: list[slice], workers: int | None
) -> Iterator[Part]:
    pool, on_gpus = pool_size(ray)
    held = ray.put(judges)  # for as long as a worker may have to be replaced
    messages = [{"start": rows.start, "rows": ray.cloudpickle.dumps(portable(source, rows))} for rows in missing]
    try:
        parts = ray.data.from_items(messages, override_num_blocks=len(messages)).map_batches(
            Worker,
            fn_constructor_args=([held], source.class_names),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers or pool, len(missing))),
            num_cpus=1,
            num_gpus=int(on_gpus),
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        for row in parts.iter_rows():
            yield ray.cloudpickle.loads(row["part"])
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ResultError(
            f"the workers cannot judge {source.name}: {reason}",
            hint="Every node needs this version of unpoison, and a source in files at the same path as here. Parts "
            "that were judged are kept: the same command goes on after them.",
        ) from error


def portable(source: LabelledImages, rows: slice) -> LabelledImages:
    """These rows for another process. What is in files is named, what is in memory goes along, these rows of it."""
    part = replace(source.select(np.arange(rows.start, rows.stop)), skipped=())
    if part.dataset.cache_files:
        return part
    table = take(part.dataset.with_format("arrow"), np.arange(len(part)))
    copied = table.take(pa.array(np.arange(len(part)))).combine_chunks()  # a slice would carry the whole along
    return replace(part, dataset=datasets.Dataset(InMemoryTable(copied), info=part.dataset.info))


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


def _file(folder: Path, rows: slice) -> Path:
    return folder / f"{rows.start:010d}-{rows.stop:010d}.parquet"


def _key(judges: Judges, source: LabelledImages) -> str:
    """What a part's numbers depend on beside its rows."""
    parts = (
        judges.clip.fingerprint,
        judges.clip_logit_scale,
        source.class_names,
        [(hash_weights(early.weights()), early.image_size) for early in judges.early],
        None if source.overlay is None else source.overlay.fingerprint,
    )
    return hashlib.blake2b(_VERSION + msgspec.json.encode(parts), digest_size=16).hexdigest()


def _stored(path: Path, source: LabelledImages, rows: slice, key: str, run: Run) -> Part | None:
    """A part that an earlier run left; None where there is none, or it is damaged or of something else."""
    if not path.exists():
        return None
    try:
        table, header = read_table(path, _SCHEMA)
        found = Part(
            start=rows.start,
            clip_loss=table["clip_loss"].to_numpy(),
            early_loss=table["early_loss"].to_numpy(),
            choice=table["clip_label"].to_numpy(),
            skipped=msgspec.convert(header["skipped"], tuple[tuple[int, str], ...]),
        )
        same = table["id"].to_pylist() == source.ids[rows] and np.array_equal(table["label"], source.labels[rows])
    except (ResultError, KeyError, msgspec.ValidationError):
        same, found, header = False, None, {}
    if same and header.get("key") == key:
        return found
    run.progress.log(f"{path.name} is damaged or of another set, and is computed again")
    return None


def _rows(source: LabelledImages, skipped: dict[int, str]) -> tuple[SkippedRow, ...]:
    return tuple(SkippedRow(id=source.ids[row], reason=skipped[row]) for row in sorted(skipped))


__all__ = ["SCORER_SAMPLES", "scan_dataset_on_ray"]
