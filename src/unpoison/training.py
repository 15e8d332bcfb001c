"""An ordinary supervised training loop: makes the victims that the defenses are tried on, and the demo's."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int

from unpoison.data.pixels import Pixels, to_images
from unpoison.data.transforms import random_crop, random_flip
from unpoison.errors import DivergedError
from unpoison.models.classifier import ImageClassifier
from unpoison.runs import Run


def train_classifier(
    classifier: ImageClassifier,
    pixels: Pixels,
    labels: Int[np.ndarray, " n"],
    *,
    run: Run,
    epochs: int = 15,
    learning_rate: float = 0.1,
    batch_size: int = 128,
    augment: bool = True,
) -> ImageClassifier:
    """Train a copy on all usable pixels: SGD with Nesterov momentum 0.9, weight decay 5e-4, one-cycle linear rate.

    Labels index ``classifier.class_names``. Resumes epoch by epoch in ``run.folder``. Raises DivergedError.
    """
    trained = classifier.copy()
    net = trained.module
    rows = np.flatnonzero(pixels.usable)
    optimiser = torch.optim.SGD(net.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batch_size = min(batch_size, len(rows))
    per_epoch = len(rows) // batch_size
    total = epochs * per_epoch
    for epoch in run.progress.track(
        range(epochs), total=epochs * len(rows), what="training", weight=len(rows), unit="images"
    ):

        def one_epoch(epoch: int = epoch) -> dict[str, torch.Tensor]:
            generator = run.generator("train", epoch)
            net.train()
            order = rows[torch.randperm(len(rows), generator=generator).numpy()]
            for step in range(per_epoch):
                done = (epoch * per_epoch + step + 1) / total
                optimiser.param_groups[0]["lr"] = learning_rate * min(done / 0.2, (1 - done) / 0.8 + 1e-3)
                chosen = np.sort(order[step * batch_size : (step + 1) * batch_size])
                images = to_images(pixels.array[chosen])
                if augment:
                    images = random_flip(random_crop(images, 4, generator), generator)
                logits = trained.logits(images.to(run.device))
                loss = F.cross_entropy(logits, torch.from_numpy(labels[chosen]).to(run.device))
                if not torch.isfinite(loss):
                    raise DivergedError("Training", step=epoch * per_epoch + step, loss=float(loss.detach()))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return state_of(net, optimiser)

        with run.seeded("train", epoch):
            restore(net, optimiser, run.step(f"train-{epoch:03d}", one_epoch))
    net.eval()
    return trained


def state_of(net: torch.nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights, buffers and momenta as one flat dictionary of tensors that is safe to store."""
    state = {f"net.{name}": value.detach().clone() for name, value in net.state_dict().items()}
    for index, slots in optimiser.state_dict()["state"].items():
        state |= {
            f"opt.{index}.{name}": value.detach().clone()
            for name, value in slots.items()
            if isinstance(value, torch.Tensor)
        }
    return state


def restore(net: torch.nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`state_of` took, so that a continued run takes the same next step."""
    net.load_state_dict({name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")})
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        if name.startswith("opt."):
            _, index, slot = name.split(".", 2)
            slots.setdefault(int(index), {})[slot] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": slots})
