"""What the methods that train a CLIP on image-caption pairs share: config, result, the two copies of the model.

The step itself stands in each method's file, the loop around it in :mod:`unpoison.clip_loop`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from unpoison.contrastive import gather_with_gradient, train_mode
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels, load_pixels
from unpoison.data.training_pairs import Batch, TrainingPairs, prepare_pairs, process_slice
from unpoison.errors import ConfigError, ModelError, UnsupportedModelError, UsageError
from unpoison.models.checkpoints import check_finite
from unpoison.results import SkippedRow
from unpoison.runs import Run
from unpoison.schedules import scaled_rate
from unpoison.types import Embeddings, Images, ImageTextModel, Tower

Config = TypeVar("Config", bound="PairTrainingConfig")
Look = dict[str, float]
"""Figures of one look at the held-out pairs, by name."""
SMALLEST_BATCH, FEWEST_STEPS, BATCHES_AN_EPOCH = 32, 600, 32


@dataclass(frozen=True, kw_only=True)
class PairTrainingConfig:
    """What every training on pairs can be told. A batch is the global one, over all processes."""

    epochs: int = 10
    steps: int | None = None
    """Optimiser steps; None: ``epochs`` times the whole batches of the pairs."""
    batch_size: int = 64
    chunk_size: int = 512
    """Most pairs whose graph is held at a time in one process; the gradient does not depend on it."""
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    """On matrices and kernels; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    held_out: float = 0.05
    """Share of the pairs kept aside, at most ``held_out_pairs``. Ours."""
    held_out_pairs: int = 1000
    check_every: int = 100
    """Steps between looks at the held-out pairs, also the unit of resume. Ours."""
    collapse: float = 0.1
    """A look counts as collapsed when less than this share of the held-out accuracy above chance is left; two in a row
    end the run, and one at its end is no result to accept. Ours."""
    bound: float = 10.0
    """Largest fall of held-out accuracy, in points, that is accepted; never over half of what is above chance. Ours."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "chunk_size", "learning_rate", "epsilon", "held_out_pairs", "check_every")
        for name in (*positive, "bound"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be positive, got {self.steps}.", hint="Raise steps or leave it out.")
        if self.batch_size < 2:
            raise ConfigError("batch_size must be at least 2.", hint="A contrast needs a second pair.")
        if self.weight_decay < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"expected weight_decay >= 0 and betas in [0, 1), got {self.weight_decay} and {self.betas}.",
                hint="Try 0.1 and [0.9, 0.999].",
            )
        for name in ("held_out", "collapse"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.", hint="Try 0.05.")

    @property
    def trains(self) -> tuple[Tower, ...]:
        """The towers whose weights are changed."""
        return ("image", "text")

    @classmethod
    def scaled(cls: type[Config], *, parameters: int, samples: int, **more: object) -> Config:
        """The config for a model of ``parameters`` parameters and ``samples`` pairs. Our choice, not the paper's.

        Rate: :func:`unpoison.schedules.scaled_rate`, which leaves models of 100 M parameters and more as published.
        Batch: the largest power of two, from 32 to the published size, that leaves 32 batches an epoch.
        Steps: the published epochs, but at least 600 steps: forgetting and recovery take steps, not epochs. Where
        ``more`` names ``epochs``, these are taken as they are.
        ``more`` are keys that override the result; the others follow them.
        """
        published = cls()
        batch = published.batch_size
        if samples < batch * BATCHES_AN_EPOCH:
            batch = min(batch, max(SMALLEST_BATCH, 2 ** int(math.log2(max(1, samples // BATCHES_AN_EPOCH)))))
        chosen = more.get("batch_size", batch)
        each = max(1, samples // max(1, chosen if isinstance(chosen, int) else batch))
        values: dict[str, object] = {
            "batch_size": batch,
            "steps": None if "epochs" in more else max(FEWEST_STEPS, published.epochs * each),
            "learning_rate": scaled_rate(published.learning_rate, parameters),
        }
        return cls(**(values | more))  # pyright: ignore[reportArgumentType] - checked by __post_init__ and msgspec

    @classmethod
    def recommended(cls: type[Config], *, parameters: int, samples: int, **more: object) -> Config:
        """What the verbs use where nothing else is said: :meth:`scaled`, unless a method has something better."""
        return cls.scaled(parameters=parameters, samples=samples, **more)

    @classmethod
    def paper(cls: type[Config], *, parameters: int, samples: int, **more: object) -> Config:
        """The paper's method for this model and so many pairs: what ``--paper`` and a grid's ``published`` mean."""
        return cls.scaled(parameters=parameters, samples=samples, **more)


@dataclass(frozen=True, kw_only=True)
class ClipRepair:
    """A trained copy as it was after ``steps`` of the ``planned`` steps, and the looks at held-out pairs on the way.

    Each look: ``step``, ``held_out_accuracy`` (percent), ``chance`` (percent), ``image_cosine`` and ``text_cosine``
    (mean cosine with the given model's embeddings of the same pairs: 1 = nothing moved), and the means of the step's
    own figures since the look before. ``stopped`` says why the weights are not those of the last planned step, "" where
    they are.
    """

    model: ImageTextModel
    history: list[Look]
    steps: int
    planned: int
    batch_size: int
    trained_pairs: int
    held_out_pairs: int
    truncated: int = 0
    """Different captions that the tokenizer cuts off."""
    skipped: tuple[SkippedRow, ...] = ()
    stopped: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def kept(self) -> Look:
        """The look at the weights that were kept."""
        return next(look for look in self.history if look["step"] == self.steps)

    @property
    def held_out_before(self) -> float:
        return self.history[0]["held_out_accuracy"]

    @property
    def held_out_after(self) -> float:
        return self.kept["held_out_accuracy"]


def open_training(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    config: PairTrainingConfig,
    *,
    run: Run,
    pixels: Pixels | None = None,
) -> TrainingPairs:
    """Decode the images at the model's size, unless their ``pixels`` are at hand, and split the pairs.

    Raises UsageError as :func:`check_precision`, ModelError for weights that are not finite, NotEnoughDataError,
    SourceFormatError.
    """
    check_precision(run)
    check_finite(clip.module.state_dict(), name="the model")
    if pixels is None:
        pixels = load_pixels(pairs, clip.image_size, cache=run.cache, progress=run.progress)
    return prepare_pairs(
        pairs,
        pixels,
        batch_size=config.batch_size,
        epochs=config.epochs,
        steps=config.steps,
        held_out=config.held_out,
        held_out_pairs=config.held_out_pairs,
        run=run,
    )


@contextlib.contextmanager
def trainable(clip: ImageTextModel, run: Run) -> Iterator[ImageTextModel]:
    """A copy of ``clip`` on the run's device, in float32 and training mode; at the end in eval mode, as it came.

    Raises ModelError for towers that disagree.
    """
    copy = clip.copy()
    net = copy.module.to(run.device)
    kinds = {name: value.dtype for name, value in (*net.named_parameters(), *net.named_buffers())}
    wanted = {name: value.requires_grad for name, value in net.named_parameters()}
    net.float()
    check_towers(copy, run)
    train_mode(net)
    try:
        yield copy
    finally:
        net.eval()
        for name, value in net.named_buffers():
            value.data = value.data.to(kinds[name])
        for name, value in net.named_parameters():
            value.data = value.data.to(kinds[name])
            value.grad = None
            value.requires_grad_(wanted[name])


def frozen_copy(clip: ImageTextModel, run: Run) -> ImageTextModel:
    """A copy on the run's device, in eval mode and float32, whose parameters take no gradient."""
    copy = clip.copy()
    copy.module.to(run.device).float().eval().requires_grad_(False)
    return copy


def choose_weights(clip: ImageTextModel, towers: list[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters to be trained; every other one of ``clip`` takes no gradient."""
    clip.module.requires_grad_(False)
    for _, parameter in towers:
        parameter.requires_grad_(True)
    return [parameter for _, parameter in towers]


class Suspect:
    """The given model's embeddings of a step's global batch, each computed once and where it can be for all steps.

    :meth:`see` may be called for the same rows twice (gradient caching): the second call costs nothing. ``plain``: the
    suspect's embeddings of the images without augmentation are asked for as well.
    """

    def __init__(self, clip: ImageTextModel, data: TrainingPairs, run: Run, *, plain: bool) -> None:
        self._clip, self._data, self._run, self._plain = clip, data, run, plain
        self._text_table = data.text_table(clip, run)
        self._plain_table = data.image_table(clip, run) if plain else None

    def begin(self, batch: Batch) -> None:
        """Forget the step before."""
        self._batch = batch
        self._seen: dict[int, Tensor] = {}
        self._seen_plain: dict[int, Tensor] = {}
        self._texts: Tensor | None = None

    def see(self, start: int, images: Images, plain: Images) -> None:
        """Embed augmented and plain images of this process's rows from ``start`` on, in ascending order."""
        if start in self._seen:
            return
        with self._run.accelerator.autocast():
            self._seen[start] = self._clip.encode_images(images)
            if self._plain and self._plain_table is None:
                self._seen_plain[start] = self._clip.encode_images(plain)

    def images(self) -> Embeddings:
        """Of the augmented images of all processes."""
        return gather_with_gradient(torch.cat(list(self._seen.values())), self._run.accelerator)

    def plain_images(self) -> Embeddings:
        """Of the plain images of all processes."""
        if self._plain_table is None:
            return gather_with_gradient(torch.cat(list(self._seen_plain.values())), self._run.accelerator)
        return self._plain_table[torch.from_numpy(self._batch.rows).to(self._run.device)]

    def texts(self) -> Embeddings:
        """Of the captions of all processes."""
        if self._texts is None:
            captions = self._batch.captions
            if self._text_table is not None:
                self._texts = self._text_table[torch.from_numpy(captions).to(self._run.device)]
            else:
                with self._run.accelerator.autocast():
                    mine = self._data.encode(self._clip, captions[process_slice(len(captions), self._run)])
                self._texts = gather_with_gradient(mine, self._run.accelerator)
        return self._texts


def check_precision(run: Run) -> None:
    """Raise UsageError for fp16 where gradients are not scaled, as on a CPU: small ones would vanish."""
    if run.accelerator.mixed_precision == "fp16" and run.accelerator.scaler is None:
        raise UsageError(
            f"fp16 does not train on the device {run.device.type!r}: nothing scales the gradients there.",
            hint="Use --precision bf16, or no for float32 (in Python: Accelerator(mixed_precision='bf16')).",
        )


def check_towers(clip: ImageTextModel, run: Run) -> None:
    """Raise ModelError where the towers' embeddings differ in width."""
    probe = torch.zeros(1, 3, clip.image_size, clip.image_size, device=run.device)
    with torch.no_grad():
        image, text = clip.encode_images(probe), clip.encode_texts(["a"])
    if image.shape != text.shape:
        raise ModelError(
            f"the towers disagree: images have {image.shape[-1]} dimensions, texts {text.shape[-1]}.",
            hint="Both towers must project into one space; take them from one checkpoint.",
        )


def temperature(clip: ImageTextModel) -> nn.Parameter:
    """The logarithm of the logit scale: the one scalar in neither tower. Raises UnsupportedModelError."""
    towers = {id(value) for tower in ("image", "text") for _, value in clip.tower(tower)}
    scale = clip.logit_scale
    scalars = [value for value in clip.module.parameters() if value.numel() == 1 and id(value) not in towers]
    found = [value for value in scalars if math.isclose(float(value.detach().exp()), scale, rel_tol=1e-4)]
    if len(found) != 1:
        raise UnsupportedModelError(
            "this model has no logit scale that could be trained.", hint="Set train_logit_scale to false."
        )
    return found[0]
