"""The loop around a method's step: it resumes, is judged on held-out pairs and keeps the last good weights.

A run stops where its loss leaves the finite numbers, or where it forgets which caption belongs to which image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor, nn

from unpoison.clip_training import ClipRepair, Look, PairTrainingConfig
from unpoison.contrastive import train_mode
from unpoison.data.training_pairs import TrainingPairs
from unpoison.errors import DivergedError
from unpoison.runs import Run
from unpoison.training import restore, state_of
from unpoison.types import Embeddings, ImageTextModel

OneStep = Callable[[int, list[Look]], dict[str, Tensor]]
"""Step number and the looks so far to scalars without a graph, among them ``loss``."""

GROUP = 100  # pairs among which a caption is looked for
_PATIENCE = 2
_COUNTED = 4096  # captions tokenized at once
_LEAST_GAIN = 5.0  # points above chance at the start; under it a collapse could not be told from noise


@dataclass(kw_only=True)
class _Progress:
    """What a training has come to beside weights and momenta: all of it is stored with them."""

    history: list[Look]
    kept: dict[str, Tensor]
    kept_step: int = 0
    stopped: str = ""

    def pack(
        self, net: nn.Module, optimiser: torch.optim.Optimizer, scaler: Any, extra: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        scaling = None if scaler is None else scaler.state_dict()
        summary = msgspec.json.encode([self.history, self.kept_step, self.stopped, scaling])
        state = {name: value.cpu() for name, value in state_of(net, optimiser).items()}
        state |= {f"extra.{name}": value.cpu() for name, value in extra.items()}
        state["summary"] = torch.frombuffer(bytearray(summary), dtype=torch.uint8)
        if self.kept_step != self.history[-1]["step"]:  # else the weights themselves
            state |= {f"kept.{name}": value for name, value in self.kept.items()}
        return state

    @classmethod
    def unpack(cls, state: dict[str, Tensor], scaler: Any) -> _Progress:
        data = bytes(state["summary"].tolist())
        kind = tuple[list[Look], int, str, dict[str, Any] | None]
        history, kept_step, stopped, scaling = msgspec.json.decode(data, type=kind)
        if scaler is not None and scaling is not None:
            scaler.load_state_dict(scaling)
        prefix = "net." if kept_step == history[-1]["step"] else "kept."
        kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        return cls(history=history, kept=kept, kept_step=kept_step, stopped=stopped)


def train_steps(
    clip: ImageTextModel,
    suspect: ImageTextModel,
    optimiser: torch.optim.Optimizer,
    one_step: OneStep,
    data: TrainingPairs,
    config: PairTrainingConfig,
    *,
    name: str,
    run: Run,
    extra: dict[str, Tensor] | None = None,
    watch: Callable[[], Look] | None = None,
) -> ClipRepair:
    """Train ``clip`` (from :func:`trainable`) in place and return it with the last good weights.

    ``extra``: further tensors that steps change in place; they are stored and put back with the weights.
    ``watch``: further figures of each look, the model in eval mode; where one named ``enough`` is not 0, training ends
    there and is complete.

    Weights, momenta, looks and the last good weights are stored together every ``check_every`` steps, the two newest
    files stay: a run that is killed at any point and repeated ends with the same weights. Raises no DivergedError: the
    result says at which step training left the finite numbers.
    """
    net, total, extra = clip.module, data.steps, extra or {}
    before = held_out_embeddings(suspect, data)
    progress = _Progress(history=[_look(0, before, before, data)], kept=_weights(net))
    starts = range(0, total, config.check_every)
    names = [f"{name}-{start:06d}" for start in starts]
    first = 0
    for index in reversed(range(len(starts))):
        state = run.stored(names[index])
        if state is not None:
            run.progress.log(f"{name}: continued after step {min(starts[index] + config.check_every, total)}")
            _restore(net, optimiser, extra, state)
            progress, first = _Progress.unpack(state, run.accelerator.scaler), index + 1
            break
    done = min(first * config.check_every, total)
    steps = iter(
        run.progress.track(
            range(done, total), total=(total - done) * data.batch_size, what=name, weight=data.batch_size, unit="pairs"
        )
    )
    for index in range(first, len(starts)):
        if progress.stopped or progress.history[-1].get("enough"):
            break
        start, stop = starts[index], min(starts[index] + config.check_every, total)

        def some_steps(start: int = start, stop: int = stop, progress: _Progress = progress) -> dict[str, Tensor]:
            sums: dict[str, float] = {}
            for step in islice(steps, stop - start):
                for key, value in one_step(step, progress.history).items():
                    sums[key] = sums.get(key, 0.0) + float(value)
                if not math.isfinite(sums["loss"]):
                    raise DivergedError(name, step=step, loss=sums["loss"])
            means = {key: value / (stop - start) for key, value in sums.items()}
            net.eval()
            look = _look(stop, held_out_embeddings(clip, data), before, data) | means
            look |= {} if watch is None else watch()
            train_mode(net)
            _judge(progress, look, net, config)
            return progress.pack(net, optimiser, run.accelerator.scaler, extra)

        try:
            with run.seeded(name, start, run.accelerator.process_index):
                state = run.step(names[index], some_steps)
        except DivergedError as error:
            progress.stopped = f"{error.message} The weights of step {progress.kept_step} were kept."
            break
        _restore(net, optimiser, extra, state)
        progress = _Progress.unpack(state, run.accelerator.scaler)
        run.forget(names[: max(0, index - 1)])
    if not progress.stopped:
        next(steps, None)  # lets the progress say that it is through
        last = int(progress.history[-1]["step"])
        if progress.kept_step != last:
            progress.stopped = (
                f"The last look, step {last}, had forgotten the pairs; the weights of step {progress.kept_step} were "
                "kept."
            )
    net.load_state_dict(progress.kept)
    return ClipRepair(
        model=clip,
        history=progress.history,
        steps=progress.kept_step,
        planned=total,
        batch_size=data.batch_size,
        trained_pairs=len(data.rows),
        held_out_pairs=len(data.held_out),
        truncated=_truncated(clip, data),
        skipped=data.pixels.skipped,
        stopped=progress.stopped,
        warnings=data.warnings,
    )


def no_steps(clip: ImageTextModel, data: TrainingPairs) -> ClipRepair:
    """``clip`` as the result of no training at all, with one look at the held-out pairs; it is on the run's device."""
    before = held_out_embeddings(clip, data)
    return ClipRepair(
        model=clip,
        history=[_look(0, before, before, data)],
        steps=0,
        planned=0,
        batch_size=data.batch_size,
        trained_pairs=0,
        held_out_pairs=len(data.held_out),
        truncated=_truncated(clip, data),
        skipped=data.pixels.skipped,
        warnings=data.warnings,
    )


def _truncated(clip: ImageTextModel, data: TrainingPairs) -> int:
    starts = range(0, len(data.texts), _COUNTED)
    return sum(sum(clip.truncated(data.texts[start : start + _COUNTED])) for start in starts)


def _restore(
    net: nn.Module, optimiser: torch.optim.Optimizer, extra: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    restore(net, optimiser, state)
    for key, value in extra.items():
        value.copy_(state[f"extra.{key}"])


def held_out_embeddings(clip: ImageTextModel, data: TrainingPairs) -> tuple[Embeddings, Embeddings]:
    """Unit embeddings of the held-out images, as they are, and of the first caption of each."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(data.held_out), GROUP):
            rows = data.held_out[start : start + GROUP]
            images = clip.encode_images(data.images(rows).to(next(clip.module.parameters()).device))
            parts.append((images, data.encode(clip, data.first_captions(rows))))
    return torch.cat([images for images, _ in parts]), torch.cat([texts for _, texts in parts])


def matching_accuracy(images: Embeddings, texts: Embeddings, same: list[int]) -> tuple[float, float]:
    """Percent of images whose nearest text is theirs, and of texts whose nearest image is theirs, averaged; and chance.

    Within groups of at most ``GROUP`` pairs of nearly equal size; ``same`` numbers the captions, and any pair of an
    equal caption counts as right.
    """
    count = math.ceil(len(same) / GROUP)
    numbers = torch.tensor(same, device=images.device)
    right = chance = 0.0
    for rows in torch.arange(len(same), device=images.device).tensor_split(count):
        cosines = images[rows] @ texts[rows].T
        equal = numbers[rows][:, None] == numbers[rows][None, :]
        own = torch.arange(len(rows), device=images.device)
        right += float(equal[own, cosines.argmax(1)].sum() + equal[cosines.argmax(0), own].sum()) / 2
        chance += float(equal.float().mean(1).sum())
    return 100 * right / len(same), 100 * chance / len(same)


def cosine_drift(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> float:
    """Mean cosine of matching unit rows."""
    return float((first.float() * second.float()).sum(1).mean())


def _look(
    step: int, now: tuple[Embeddings, Embeddings], before: tuple[Embeddings, Embeddings], data: TrainingPairs
) -> Look:
    if not all(bool(torch.isfinite(part).all()) for part in now):
        raise DivergedError("training", step=step, loss=float("nan"))
    accuracy, chance = matching_accuracy(*now, data.first_captions(data.held_out).tolist())
    return {
        "step": float(step),
        "held_out_accuracy": accuracy,
        "chance": chance,
        "image_cosine": cosine_drift(now[0], before[0]),
        "text_cosine": cosine_drift(now[1], before[1]),
    }


def _judge(progress: _Progress, look: Look, net: nn.Module, config: PairTrainingConfig) -> None:
    """Keep the weights unless the look has collapsed; end the run where several in a row have."""
    progress.history.append(look)
    first = progress.history[0]
    gain = first["held_out_accuracy"] - first["chance"]
    least = first["chance"] + config.collapse * gain if gain > _LEAST_GAIN else 0.0
    collapsed = [entry["held_out_accuracy"] < least for entry in progress.history]
    if not collapsed[-1]:
        progress.kept, progress.kept_step = _weights(net), int(look["step"])
    elif all(collapsed[-_PATIENCE:]):
        progress.stopped = (
            f"Training forgot the pairs by step {int(look['step'])}: held-out accuracy {look['held_out_accuracy']:.1f} "
            f"percent, {first['held_out_accuracy']:.1f} at the start, {look['chance']:.1f} by chance. The weights of "
            f"step {progress.kept_step} were kept."
        )


def _weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}
