"""Muon (Jordan et al., 2024) in float32: momentum, orthogonalised, for the matrices of a transformer.

``torch.optim.Muon`` orthogonalises in bfloat16, which is slower than float32 by a factor of three on CPUs that
emulate it. docs/decisions/0002-tiny-clip.md has the trials behind the choice.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as distributed
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose update, a matrix, is replaced by its nearest orthogonal one (Newton-Schulz)."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Where several processes train together, each orthogonalises its share and all add up the parts."""
        together = distributed.is_initialized()
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            updates = torch.zeros(sum(weight.numel() for weight in weights))
            for index, (weight, part) in enumerate(_parts(weights, updates)):
                gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.mul_(group["momentum"]).add_(gradient)
                if index % world == rank:
                    part.copy_(orthogonalise(gradient.add(buffer, alpha=group["momentum"])))
            if together:
                distributed.all_reduce(updates)
            for weight, part in _parts(weights, updates):
                tall = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(part, alpha=-group["lr"] * tall)


def _parts(weights: list[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        yield weight, part.view_as(weight)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Five steps of the quintic Newton-Schulz iteration: all singular values end between about 0.7 and 1.2."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T
