"""The loop in which the pixels of a patch are optimised: epoch by epoch, each of which can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from unpoison.attacks.badclip_patch import start
from unpoison.errors import DivergedError
from unpoison.runs import Run
from unpoison.training import restore, state_of


def train_patch(
    name: str,
    losses_of: Callable[[int, Tensor], Iterator[Tensor]],
    *,
    side: int,
    epochs: int,
    learning_rate: float,
    run: Run,
) -> Float[Tensor, "3 side side"]:
    """A patch of ``side`` pixels in [0, 1] from a random start, by Adam and a clamp after each step.

    ``losses_of(epoch, patch)`` gives the loss of one batch after another, each from the patch as it then is.
    Raises DivergedError.
    """
    net = nn.ParameterDict({"patch": start(side, run.seed_of(f"{name} start"))}).to(run.device)
    adam = torch.optim.Adam(net.parameters(), learning_rate)

    def one_epoch(epoch: int) -> dict[str, Tensor]:
        losses = []
        for loss in losses_of(epoch, net["patch"]):
            if not torch.isfinite(loss):
                raise DivergedError("The patch", step=epoch, loss=float(loss.detach()))
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                net["patch"].clamp_(0, 1)
            losses.append(float(loss.detach()))
        run.progress.log(f"{name}: epoch {epoch + 1} of {epochs}, loss {np.mean(losses):.3f}")
        return state_of(net, adam)

    steps = [f"{name}-{epoch:04d}" for epoch in range(epochs)]
    first = next((epoch for epoch in reversed(range(epochs)) if run.stored(steps[epoch]) is not None), 0)
    for epoch in run.progress.track(range(first, epochs), total=epochs - first, what=name, unit="epochs"):
        restore(net, adam, run.step(steps[epoch], lambda epoch=epoch: one_epoch(epoch)))
        run.forget(steps[: max(0, epoch - 1)])
    return net["patch"]
