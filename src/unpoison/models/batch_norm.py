"""BatchNorm's running statistics and channel weights, for methods that have to treat them apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """The BatchNorm layers that have weights, with their names, in the order of the module."""
    return [(name, part) for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.affine]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer normalises by its batch while it is trained."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batches are normalised as before but leave no trace in the running statistics."""
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    counts = [None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone() for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum, count in zip(layers, momenta, counts, strict=True):
            layer.momentum = momentum
            if count is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(count)
