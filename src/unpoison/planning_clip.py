"""What a training of a CLIP on pairs would do, need and take, from one probed batch. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from unpoison.clip_training import PairTrainingConfig, trainable
from unpoison.contrastive import info_nce
from unpoison.data.pairs import ImageTextPairs
from unpoison.errors import NotEnoughDataError
from unpoison.planning import Plan, PlannedStep, resident
from unpoison.results import SkippedRow
from unpoison.runs import Run
from unpoison.types import ImageTextModel

_DECODED, _TRAINED = 128, 16
_STATE = 4  # weights, two momenta and the last good weights are stored together


def plan_clip_training(clip: ImageTextModel, pairs: ImageTextPairs, config: PairTrainingConfig, *, run: Run) -> Plan:
    """The steps of ``purify`` on ``pairs``; one forward and backward pass of 16 pairs is timed, decoding of 128 images.

    Raises NotEnoughDataError where no probed image decodes, ModelError.
    """
    rows = np.random.default_rng(run.seed).permutation(len(pairs))[:_DECODED]
    decoded: list = []
    decode = _seconds(lambda: decoded.extend(pairs.decode(rows))) / len(rows)
    usable = [
        (image, row) for image, row in zip(decoded, rows, strict=True) if not isinstance(image, SkippedRow)
    ][:_TRAINED]  # fmt: skip
    if not usable:
        raise NotEnoughDataError(
            f"images of {pairs.name} that decode", have=0, need=1, hint="Check the source; its first images are bad."
        )
    images = clip.preprocess([image for image, _ in usable]).to(run.device)
    texts = [captions[0] for captions in pairs.captions([int(row) for _, row in usable])]
    with trainable(clip, run) as trained:

        def one_pass(backward: bool) -> None:
            with run.accelerator.autocast(), torch.set_grad_enabled(backward):
                embedded = trained.encode_images(images), trained.encode_texts(texts)
            if backward:
                info_nce(*embedded, trained.logit_scale).backward()

        one_pass(True)
        train = _seconds(lambda: one_pass(True)) / len(usable)
        forward = _seconds(lambda: one_pass(False)) / len(usable)
    batch = min(config.batch_size, len(pairs))
    steps = config.steps if config.steps is not None else config.epochs * (len(pairs) // batch)
    weights = 4 * sum(value.numel() for value in clip.module.parameters())
    held_out = min(config.held_out_pairs, round(config.held_out * len(pairs)))
    looks = 1 + -(-steps // config.check_every)
    chunked = batch // max(1, run.accelerator.num_processes) > config.chunk_size
    passed = steps * batch
    return Plan(
        steps=(
            PlannedStep(what="decode the images", amount=len(pairs), unit="images", seconds=decode * len(pairs)),
            PlannedStep(what=f"train {steps:,} steps of {batch:,} pairs", amount=passed, unit="pairs",
                        seconds=passed * (train + forward * (2 if chunked else 1))),
            PlannedStep(what=f"look {looks:,} times at held-out pairs", amount=looks * held_out, unit="pairs",
                        seconds=looks * held_out * forward),
        ),
        memory=resident() + (_STATE + 1) * weights,
        disk=3 * len(pairs) * clip.image_size**2 + 2 * _STATE * weights + weights,
        files=("run.json", "steps/", "purification.json", "model/", "card.md"),
    )  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-6)
