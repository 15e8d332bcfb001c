"""A network's activations, found where they are computed, and cut off above.

Calls of torch's activation functions are met while the network runs (``TorchFunctionMode``), so that ``nn.ReLU``,
``F.relu`` and a transformer's GELU are found alike, in the order in which they run, with nothing left in the network
afterwards. A *site* is the place of a call in that order.

Not met, and so never cut: what is computed by hand (x * sigmoid(1.7 x), x.clamp(min=0)), threshold, and the functions
that are bounded above by themselves (tanh, sigmoid, hardsigmoid).
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
_CONVOLUTIONS: frozenset[Any] = frozenset({
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
})  # fmt: skip


class AtActivations(TorchFunctionMode):
    """While active, ``change(site, output)`` takes the place of each activation's output.

    ``change`` sees maps as [b, c, h, w], those too that the network has as [b, h, w, c]: four axes that a linear layer
    gave, not a convolution. Where the network works in place, the change is written there. ``sites``: how many there
    must have been when it ends; None for any. Raises UnsupportedModelError for another number.
    """

    def __init__(self, change: Callable[[int, Tensor], Tensor], *, sites: int | None = None) -> None:
        super().__init__()
        self.change = change
        self.sites = sites
        self.site = 0
        self.channels_last = False

    def __enter__(self) -> AtActivations:
        self.site = 0
        self.channels_last = False
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if error is None and self.sites is not None and self.site != self.sites:
            raise _no_fit(f"it has {self.site} sites", f"{self.sites} sites")

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = list(args), dict(kwargs or {})
        if function not in ACTIVATIONS:
            output = function(*args, **kwargs)
            if function is F.linear and output.ndim == 4:
                self.channels_last = True
            elif function in _CONVOLUTIONS:
                self.channels_last = False
            return output
        if not args:
            args = [kwargs.pop("input")]
        # What is in place works on a copy first: gradients ask that nobody overwrites what the change was made from.
        place = args[0] if _maybe_in_place(function, args, kwargs) else None
        if place is not None:
            args[0] = place.clone()
        output = function(*args, **kwargs)
        site, self.site = self.site, self.site + 1
        moved = self.channels_last and output.ndim == 4
        changed = self.change(site, output.movedim(-1, 1) if moved else output)
        changed = changed.movedim(1, -1) if moved else changed
        return place.copy_(changed) if place is not None and output is args[0] else changed


def _maybe_in_place(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call may change its input; a flag by position may be another one (rrelu's training)."""
    return function.__name__.endswith("_") or bool(kwargs.get("inplace")) or any(value is True for value in args)


def clipped(bounds: Sequence[Bound]) -> AtActivations:
    """While active, min(x, bound of the channel) at every site. Raises UnsupportedModelError for another number of
    sites or channels: then the bounds belong to another network."""

    def cut(site: int, output: Tensor) -> Tensor:
        channels = output.shape[channel_axis(output)]
        if site >= len(bounds):
            raise _no_fit(f"site {site + 1} has {channels} channels", f"{len(bounds)} sites")
        if bounds[site].numel() != channels:
            raise _no_fit(f"site {site + 1} has {channels} channels", f"{bounds[site].numel()}")
        return torch.minimum(output, over_channels(bounds[site].to(output), output))

    return AtActivations(cut, sites=len(bounds))


def _no_fit(found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The activation bounds do not fit the network: {found}, expected {expected}.",
        hint="Use the bounds with the network that they were made for.",
    )


def activations(run: Callable[[], object]) -> list[Tensor]:
    """The outputs at all sites while ``run`` runs the network once, in order, with maps as [b, c, h, w].

    They are copies, except those that a gradient flows through. Raises UnsupportedModelError where the network changes
    one of these in place later on: then it is no activation any more.
    """
    found: list[Tensor] = []
    versions: list[int | None] = []

    def keep(_: int, output: Tensor) -> Tensor:
        found.append(output if output.requires_grad else output.clone())
        versions.append(output._version if output.requires_grad else None)
        return output

    with AtActivations(keep):
        run()
    for site, (output, version) in enumerate(zip(found, versions, strict=True)):
        if version is not None and output._version != version:
            raise UnsupportedModelError(
                f"the network changes the output of its activation {site + 1} in place.",
                hint="Write y = y + x in place of y += x after the activation, or use another repair.",
            )
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
