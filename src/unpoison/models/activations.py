"""A network's activations, found where they are computed, and cut off above.

Calls of torch's activation functions are met while the network runs (``TorchFunctionMode``), so that ``nn.ReLU``,
``F.relu`` and a transformer's GELU are found alike, in the order in which they run, with nothing left in the network
afterwards. A *site* is the place of a call in that order. What is computed by hand (x * sigmoid(1.7 x)) is not met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unpoison.errors import UnsupportedModelError
from unpoison.types import Bound

ACTIVATIONS: frozenset[Any] = frozenset({
    torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu,
    F.leaky_relu, F.prelu, F.rrelu, F.softplus, F.hardswish, F.hardtanh, torch.celu, torch.selu, torch.prelu,
})  # fmt: skip


class AtActivations(TorchFunctionMode):
    """While active, ``change(site, output)`` takes the place of each activation's output."""

    def __init__(self, change: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.site = 0

    def __enter__(self) -> AtActivations:
        self.site = 0
        return super().__enter__()

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function not in ACTIVATIONS:
            return output
        site, self.site = self.site, self.site + 1
        return self.change(site, output)


def clipped(bounds: Sequence[Bound]) -> AtActivations:
    """While active, min(x, bound of the channel) at every site. Raises UnsupportedModelError for another number of
    sites or channels: then the bounds belong to another network."""

    def cut(site: int, output: Tensor) -> Tensor:
        if site >= len(bounds) or bounds[site].numel() != output.shape[channel_axis(output)]:
            found = f"site {site + 1} has {output.shape[channel_axis(output)]} channels"
            expected = f"{len(bounds)} sites" if site >= len(bounds) else f"{bounds[site].numel()}"
            raise UnsupportedModelError(
                f"The activation bounds do not fit the network: {found}, expected {expected}.",
                hint="Use the bounds with the network that they were made for.",
            )
        return torch.minimum(output, over_channels(bounds[site].to(output), output))

    return AtActivations(cut)


def activations(run: Callable[[], object]) -> list[Tensor]:
    """The outputs at all sites while ``run`` runs the network once, in order."""
    found: list[Tensor] = []

    def keep(_: int, output: Tensor) -> Tensor:
        found.append(output)
        return output

    with AtActivations(keep):
        run()
    return found


def channel_axis(output: Tensor) -> int:
    """Channels come second in maps [b, c, h, w] and last in tokens [b, t, c] and vectors [b, c]."""
    return 1 if output.ndim == 4 else output.ndim - 1


def over_channels(values: Bound, output: Tensor) -> Tensor:
    """One value per channel in a shape that broadcasts over ``output``."""
    return values.view(1, -1, 1, 1) if output.ndim == 4 else values


def channel_rows(output: Tensor) -> Float[Tensor, "rows channels"]:
    """All positions of all samples as rows."""
    return output.movedim(channel_axis(output), -1).flatten(0, -2)
