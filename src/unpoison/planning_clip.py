"""What a training of a CLIP on pairs would do, need and take, from one probed batch. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from unpoison.clip_training import PairTrainingConfig, trainable
from unpoison.contrastive import info_nce
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.training_pairs import held_out_count
from unpoison.defenses.par import PARConfig
from unpoison.defenses.ubt import UBTConfig
from unpoison.detection.clip_triggers import ConceptSearchConfig, concept_steps
from unpoison.errors import NotEnoughDataError
from unpoison.planning import Plan, PlannedStep, resident
from unpoison.results import SkippedRow
from unpoison.runs import Run
from unpoison.types import ImageTextModel

_DECODED, _TRAINED, _FIRST = 128, 16, 2
_STATE = 4  # weights, two momenta and the last good weights are stored together


def plan_clip_training(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    config: PairTrainingConfig,
    *,
    run: Run,
    tested: int = 0,
    reference: ImageTextModel | None = None,
) -> Plan:
    """The steps of ``purify`` on ``pairs``; one forward and backward pass of 16 pairs is timed, decoding of 128 images.

    ``tested`` images are encoded by both models beside that; ``reference`` is UBT's. Raises NotEnoughDataError where no
    probed image decodes, ModelError.
    """
    rows = np.random.default_rng(run.seed).permutation(len(pairs))[:_DECODED]
    decoded: list = []
    decode = seconds_of(lambda: decoded.extend(pairs.decode(rows))) / len(rows)
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

        def one_pass(count: int, *, backward: bool) -> None:
            with run.accelerator.autocast(), torch.set_grad_enabled(backward):
                embedded = trained.encode_images(images[:count]), trained.encode_texts(texts[:count])
            if backward:
                info_nce(*embedded, trained.logit_scale).backward()

        one_pass(_FIRST, backward=True)  # with what a first pass sets up: gradients, weights touched
        low = _peak(run.device)
        one_pass(len(usable), backward=True)
        graph = max(0, _peak(run.device) - low) / max(1, len(usable) - _FIRST)  # bytes a pair
        train = seconds_of(lambda: one_pass(len(usable), backward=True)) / len(usable)
        forward = seconds_of(lambda: one_pass(len(usable), backward=False)) / len(usable)
    kept = min(len(pairs), config.keep_pairs) if isinstance(config, UBTConfig) else len(pairs)
    held_out = held_out_count(kept, share=config.held_out, most=config.held_out_pairs)
    batch = min(config.batch_size, kept - held_out)
    steps = config.steps if config.steps is not None else config.epochs * ((kept - held_out) // batch)
    weights = 4 * sum(value.numel() for value in clip.module.parameters())
    looks = 1 + -(-steps // config.check_every)
    mine = batch // run.accelerator.num_processes
    passed = steps * batch
    planned = [
        PlannedStep(what="decode the images", amount=len(pairs), unit="images", seconds=decode * len(pairs)),
        PlannedStep(what=f"train {steps:,} steps of {batch:,} pairs", amount=passed, unit="pairs",
                    seconds=passed * (train + forward * (2 if mine > config.chunk_size else 1))),
        PlannedStep(what=f"look {looks:,} times at held-out pairs", amount=looks * held_out, unit="pairs",
                    seconds=looks * held_out * forward),
    ]  # fmt: skip
    if isinstance(config, PARConfig) and config.search_concepts:
        probed = concept_steps(ConceptSearchConfig(concepts=config.search_concepts))
        planned.insert(1, PlannedStep(what="look for a trigger", amount=probed, unit="images", seconds=probed * train))
    if isinstance(config, UBTConfig):
        seen = len(pairs) * (1 if reference is None else 2)
        said = "the suspect's embeddings" + ("" if reference is None else " and the reference's")
        planned.insert(1, PlannedStep(what=said, amount=seen, unit="pairs", seconds=seen * forward))
    if tested:
        planned.append(PlannedStep(what="measure before and after", amount=2 * tested, unit="images",
                                   seconds=2 * tested * (forward + decode)))  # fmt: skip
    return Plan(
        steps=tuple(planned),
        memory=_peak(run.device) + (_STATE + 1) * weights + round(graph * min(mine, config.chunk_size)),
        disk=3 * len(pairs) * clip.image_size**2 + 2 * _STATE * weights + weights,
        files=("run.json", "steps/", "purification.json", "model/", "card.md", "report.html"),
    )


def _peak(device: torch.device) -> int:
    """Most memory so far, in bytes, where training takes it: the GPU's, else this process's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident()


def seconds_of(work: Callable[[], object]) -> float:
    """How long ``work`` takes, above 0."""
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-6)
