"""What a scan of image-caption pairs would do, need and take, from one probed batch. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from unpoison.api_pairs import PairDetector, PairDetectorConfig
from unpoison.data.pairs import ImageTextPairs
from unpoison.detection.neighbours import score_neighbourhoods
from unpoison.errors import NotEnoughDataError
from unpoison.evaluation.embeddings import embed_texts, ready
from unpoison.planning import Plan, PlannedStep, resident
from unpoison.results import SkippedRow
from unpoison.runs import Run
from unpoison.types import ImageTextModel

_PROBED, _COMPARED = 128, 2048
_FILES = ("run.json", "scores.parquet", "split.parquet", "scan.json", "samples.json", "report.html")


def plan_pair_scan(
    pairs: ImageTextPairs,
    detector: PairDetector,
    clip: ImageTextModel,
    reference: ImageTextModel | None,
    config: PairDetectorConfig,
    *,
    run: Run,
) -> Plan:
    """The steps of ``scan dataset`` on pairs; 128 images and their captions are encoded, 2,048 rows compared.

    Raises NotEnoughDataError where no probed image decodes, ModelError.
    """
    rows = np.random.default_rng(run.seed).permutation(len(pairs))[:_PROBED]
    decoded: list = []
    decode = _seconds(lambda: decoded.extend(pairs.decode(rows))) / len(rows)
    pictures = [image for image in decoded if not isinstance(image, SkippedRow)]
    if not pictures:
        raise NotEnoughDataError(
            f"images of {pairs.name} that decode", have=0, need=1, hint="Check the source; its first images are bad."
        )
    total = len(pairs)
    steps = [PlannedStep(what="decode the images", amount=total, unit="images", seconds=decode * total)]
    width = 0
    for role, model in (("suspect", clip if detector.suspect else None), ("reference", reference)):
        if model is None:
            continue
        seconds, width = _encoding(model, pictures, run)
        steps.append(
            PlannedStep(what=f"the {role}'s image embeddings", amount=total, unit="images", seconds=seconds * total)
        )
    if reference is not None:
        captions = [text for group in pairs.captions(rows) for text in group]
        embed_texts(reference, captions[:2], run=run)
        text = _seconds(lambda: embed_texts(reference, captions, run=run)) / len(rows)
        steps.append(
            PlannedStep(what="the reference's caption embeddings", amount=total, unit="pairs", seconds=text * total)
        )
    if detector.suspect:
        steps.append(_comparing(total, width, config))
    models = len({model.fingerprint for model in (clip, reference) if model is not None})
    embeddings = 4 * width * total * models
    return Plan(
        steps=tuple(steps), memory=resident() + 2 * embeddings, disk=embeddings + 100 * total, files=_FILES
    )  # fmt: skip


def _encoding(model: ImageTextModel, pictures: list, run: Run) -> tuple[float, int]:
    """Seconds an image, and the width of its embedding."""
    found: list[torch.Tensor] = []
    with ready(model, run), torch.inference_mode():
        model.encode_images(model.preprocess(pictures[:2]).to(run.device))
        seconds = _seconds(lambda: found.append(model.encode_images(model.preprocess(pictures).to(run.device))))
    return seconds / len(pictures), found[0].shape[1]


def _comparing(total: int, width: int, config: PairDetectorConfig) -> PlannedStep:
    """Time grows with the rows, times the rows of a batch; an inverted file is taken for an exact search."""
    batch = min(config.neighbours.batch_size or total, total)
    count = max(config.neighbours.k + 1, min(_COMPARED, total))
    random = np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)
    score_neighbourhoods(random[: config.neighbours.k + 2], config=config.neighbours)
    seconds = _seconds(lambda: score_neighbourhoods(random, config=config.neighbours)) / count
    seconds *= max(1.0, batch / min(count, batch))
    return PlannedStep(what="compare neighbours", amount=total, unit="rows", seconds=seconds * total)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-6)
