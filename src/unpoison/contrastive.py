"""The contrastive loss over a global batch, its exact gradient in little memory, and what several processes need.

How the pieces keep several processes equal to one: every process holds a slice of the global batch, gathers the
embeddings of all and computes the same global loss. The gather's backward pass *sums* what all processes hand back,
which is the number of processes times the true gradient; :func:`average_gradients` divides by that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unpoison.types import Embeddings

Embed = Callable[[int, int], Sequence[Tensor]]
"""Rows ``start`` to ``stop`` of this process's slice to their embeddings, one tensor [rows, d] for each kind."""


def info_nce(first: Embeddings, second: Embeddings, logit_scale: float | Tensor) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of matched unit embeddings [b, d]: row i of one belongs to row i of the other.

    L = 1/2 mean_i [CE(s x_i . T, i) + CE(s t_i . X, i)] (Radford et al. 2021, fig. 3). ``logit_scale`` s is the
    factor on the cosine, not its logarithm.
    """
    logits = logit_scale * first @ second.T
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def gather_with_gradient(tensor: Float[Tensor, "b d"], accelerator: Accelerator) -> Float[Tensor, "n d"]:
    """The rows of all processes in the order of their ranks; gradients come back to the process that they belong to.

    All processes must hold the same number of rows. The gradient is the sum over processes (module docstring).
    """
    return tensor if accelerator.num_processes == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """accelerate's and torch's own gather cut the graph; the rule for the backward pass is the sum over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        start = torch.distributed.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def cached_gradients(
    embed: Embed,
    loss: Callable[..., Tensor],
    *,
    size: int,
    chunk: int,
    module: nn.Module,
    accelerator: Accelerator,
) -> Tensor:
    """Add the gradients of ``loss(*embed(0, size))`` to the parameters, holding the graph of ``chunk`` rows at a time.

    Gradient caching (Gao et al. 2021, arXiv 2101.06983): embed chunk by chunk without a graph, differentiate the loss
    by the embeddings alone, embed each chunk again and hand it its share. Exact where ``embed`` gives a row the same
    embedding in any chunk: no BatchNorm in training mode, augmentation that depends on the row alone. Torch's random
    state is the same in both passes of a chunk and moves on once, so that dropout draws the same masks.
    With ``chunk`` >= ``size`` rows are embedded once. ``loss`` may have parameters of its own (a temperature).
    The model is ``module``; returns the loss without a graph. Gradients are scaled where the accelerator scales (fp16).
    """
    bounds = [(start, min(start + chunk, size)) for start in range(0, size, chunk)]
    if len(bounds) == 1:
        whole = tuple(embed(0, size))
        leaves = [part.detach().requires_grad_() for part in whole]
        value = loss(*leaves)
        accelerator.backward(value)
        _hand_back(whole, [leaf.grad for leaf in leaves])
        return value.detach()
    states, parts = [], []
    with without_graph(module):  # first pass
        for start, stop in bounds:
            states.append(_random_state(accelerator.device))
            parts.append(tuple(embed(start, stop)))
    leaves = [torch.cat(kind).requires_grad_() for kind in zip(*parts, strict=True)]
    value = loss(*leaves)
    accelerator.backward(value)
    after = _random_state(accelerator.device)
    for (start, stop), state in zip(bounds, states, strict=True):  # second pass
        _set_random_state(state, accelerator.device)
        gradients = [None if leaf.grad is None else leaf.grad[start:stop] for leaf in leaves]
        _hand_back(tuple(embed(start, stop)), gradients)
    _set_random_state(after, accelerator.device)
    return value.detach()


@contextmanager
def without_graph(module: nn.Module) -> Iterator[None]:
    """No graph of ``module`` is recorded inside, though gradient mode stays on.

    Adapters choose a faster precision where gradient mode is off; both passes must compute in the same one.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over all processes, in one message per precision. One process: nothing."""
    if accelerator.num_processes == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= accelerator.num_processes
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def optimiser_step(optimiser: torch.optim.Optimizer, accelerator: Accelerator) -> bool:
    """One step on gradients that may be scaled (fp16). False where the scaler found them infinite and skipped it."""
    scaler: Any = accelerator.scaler
    if scaler is None:
        optimiser.step()
        return True
    before = scaler.get_scale()
    scaler.step(optimiser)
    scaler.update()
    return scaler.get_scale() >= before


def lower_scale(accelerator: Accelerator) -> None:
    """After gradients that were infinite and that no optimiser saw: a lower scale for the next (fp16)."""
    scaler: Any = accelerator.scaler
    if scaler is not None:
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())


def train_mode(module: nn.Module) -> None:
    """Training mode, but BatchNorm keeps its statistics: a batch must not change what one image's embedding is."""
    module.train()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


def _hand_back(embedded: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    pairs = [
        (part, gradient)
        for part, gradient in zip(embedded, gradients, strict=True)
        if part.requires_grad and gradient is not None
    ]
    if pairs:
        torch.autograd.backward([part for part, _ in pairs], [gradient for _, gradient in pairs])


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
