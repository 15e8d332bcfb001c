"""Any ``nn.Module`` as a :class:`unpoison.types.Classifier`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison.errors import UnsupportedModelError, UsageError
from unpoison.models.activations import clipped
from unpoison.types import Bound, Embeddings, Images, Logits

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
BOUNDS = "activation_bounds."
"""What the keys of bounds begin with in a weights file."""
_PIXELS_AT_ONCE = {"cpu": 64 * 32 * 32}
_PIXELS_ELSEWHERE = 512 * 64 * 64


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a classifier came from, so that it can be saved the same way.

    ``dtypes`` holds the checkpoint's keys (without ``prefix``) and types; None stands for the module's own.
    ``folder`` is set for transformers folders, ``file_name`` is the weights file's name.
    """

    dtypes: Mapping[str, torch.dtype] | None = None
    prefix: str = ""
    wrapper: tuple[str, ...] = ()
    file_name: str = "model.safetensors"
    folder: Path | None = None


@dataclass(eq=False, kw_only=True)
class ImageClassifier:
    """A network with what it takes to use it: class names, input size, normalisation.

    ``mean`` and ``std`` are per channel, for images in [0, 1]; they stay outside the module, so its state dict
    is the network's alone. ``build`` makes a network of the same architecture, where that is known.
    ``bounds`` cut its activations off above and stay outside the module too: the network itself knows nothing of them.
    The module's forward gives logits [b, c], as a tensor or as ``.logits`` of an object.
    """

    module: nn.Module
    class_names: tuple[str, ...]
    image_size: int = 32
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    architecture: str | None = None
    build: Callable[[], nn.Module] | None = field(default=None, repr=False)
    origin: Origin = field(default_factory=Origin, repr=False)
    bounds: tuple[Bound, ...] = field(default=(), repr=False)
    _head_name: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(set(self.class_names)) != len(self.class_names) or not self.class_names:
            raise UsageError(
                f"expected distinct class names, got {list(self.class_names)[:5]}.", hint="Give each class one name."
            )
        if not all(value > 0 for value in self.std):
            raise UsageError(f"expected std > 0, got {self.std}.", hint="Give the spread of each channel.")

    def logits(self, images: Images) -> Logits:
        """Logits [b, c] of images [b, 3, h, w] in [0, 1]. Raises UnsupportedModelError for any other output."""
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
            for values in (self.mean, self.std)
        )
        with clipped(self.bounds) if self.bounds else nullcontext():
            output = self.module(((images - mean) / std).contiguous(memory_format=torch.channels_last))
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        expected = (len(images), len(self.class_names))
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
            raise UnsupportedModelError(
                f"{type(self.module).__name__}: expected logits of shape {expected}, found {found}.",
                hint="Give as many class names as the network has outputs; its forward must return the logits.",
            )
        return logits

    def features(self, images: Images) -> Embeddings:
        """Input [b, d] of the head, by a hook that is gone again when this returns."""
        found: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["input"])

        handle = self.head().register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.logits(images)
        finally:
            handle.remove()
        return found[-1]

    def head(self) -> nn.Linear:
        """The linear layer whose output is the logits: those of its weight and bias, which are its only parameters.

        Raises UnsupportedModelError where there is none.
        """
        if self._head_name is None:
            self._head_name = self._find_head()
        head = self.module.get_submodule(self._head_name)
        assert isinstance(head, nn.Linear)  # noqa: S101 # for the type checker: _find_head looked at linear layers only
        return head

    def bounded(self, bounds: Sequence[Bound]) -> ImageClassifier:
        """The same network with its activations cut off at ``bounds``; weights are shared with this one."""
        return replace(self, bounds=tuple(bounds))

    def copy(self) -> ImageClassifier:
        """A deep copy: training it leaves this one untouched."""
        return replace(self, module=copy.deepcopy(self.module), bounds=tuple(bound.clone() for bound in self.bounds))

    def fresh(self, seed: int) -> ImageClassifier:
        """The same architecture with weights newly drawn from ``seed``; the global random state stays as it was.

        Raises UnsupportedModelError naming the parameters that nobody would draw again.
        """
        reference = next(self.module.parameters())
        module = self._rebuild(seed).to(device=reference.device, dtype=reference.dtype)
        return replace(self, module=channels_last(module).train(self.module.training), bounds=())

    def weights(self) -> dict[str, Tensor]:
        """State dict on the CPU under the keys and dtypes of the checkpoint it came from; shares no memory.

        Bounds come last, as ``activation_bounds.000`` and so on, in float32.
        """
        state = self.module.state_dict()
        dtypes = self.origin.dtypes or {key: value.dtype for key, value in state.items()}
        weights = {key: state[key].detach().to("cpu", dtype, copy=True) for key, dtype in dtypes.items()}
        bounds = {
            f"{BOUNDS}{site:03d}": bound.detach().to("cpu", torch.float32, copy=True)
            for site, bound in enumerate(self.bounds)
        }
        return {self.origin.prefix + key: value for key, value in (weights | bounds).items()}

    def _find_head(self) -> str:
        calls: list[tuple[str, Tensor, Tensor]] = []

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                calls.append((name, args[0] if args else kwargs["input"], output))

            return hook

        linear = [(name, part) for name, part in self.module.named_modules() if isinstance(part, nn.Linear)]
        handles = [part.register_forward_hook(keep(name), with_kwargs=True) for name, part in linear]
        try:
            with torch.no_grad(), evaluation_mode(self.module):
                noise = torch.rand(1, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(0))
                reference = next(self.module.parameters())
                logits = self.logits(noise.to(reference.device, reference.dtype))
        finally:
            for handle in handles:
                handle.remove()
        if not calls:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} applies no nn.Linear, so it has no head to read features from.",
                hint="End the network with an nn.Linear that gives the logits.",
            )
        name, features, output = calls[-1]
        if features.ndim != 2 or output.shape != logits.shape or not torch.equal(output, logits):
            raise UnsupportedModelError(
                f"{type(self.module).__name__}: the output of its last linear layer, {name!r}, is not the logits.",
                hint="End the network with an nn.Linear on features [b, d]; leave out the softmax.",
            )
        if not _is_plain(self.module.get_submodule(name), features, output):
            raise UnsupportedModelError(
                f"{type(self.module).__name__}: its last linear layer, {name!r}, does more than x W^T + b with a "
                "weight and a bias of its own.",
                hint="Fold a weight norm into the weight, or end the network with a plain nn.Linear.",
            )
        return name

    def _rebuild(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            if self.build is not None:
                networks = []
                for draw in (seed, seed + 1):
                    torch.manual_seed(draw)
                    networks.append(self.build())
                if _draws_anew(*networks):
                    return networks[0]
            torch.manual_seed(seed)
            return _reset(copy.deepcopy(self.module))


def channels_last(module: nn.Module) -> nn.Module:
    """The module itself with its convolutions laid out channels last, which is faster on CPUs and GPUs alike."""
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] # missing in torch's stub


def images_at_once(device: torch.device, size: int) -> int:
    """How many images of ``size`` pixels a forward pass takes: on a CPU few, so that its caches hold them.

    A small ResNet at 32 pixels ran 1.5 times as fast with 64 images as with 512 (one thread of a Xeon).
    """
    return max(8, min(512, _PIXELS_AT_ONCE.get(device.type, _PIXELS_ELSEWHERE) // size**2))


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and every part's own mode again afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def _is_plain(head: nn.Module, features: Tensor, output: Tensor) -> bool:
    """Whether a layer is linear in more than name: no weight norm, no cosine in its place."""
    if not {name for name, _ in head.named_parameters()} <= {"weight", "bias"} or not isinstance(head, nn.Linear):
        return False
    return torch.allclose(F.linear(features, head.weight, head.bias).float(), output.float(), rtol=1e-3, atol=1e-4)


def _draws_anew(first: nn.Module, second: nn.Module) -> bool:
    """Whether a constructor draws its weights: one that loads them gives the same for two seeds."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return not any(a.ndim > 1 and a.unique().numel() > 1 and torch.equal(a, b) for a, b in pairs)


def _reset(module: nn.Module) -> nn.Module:
    stale = []
    for name, part in module.named_modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
        else:
            stale += [f"{name}.{key}".lstrip(".") for key, _ in part.named_parameters(recurse=False)]
    if stale:
        raise UnsupportedModelError(
            f"{type(module).__name__}: nothing draws {', '.join(stale[:5])} anew ({len(stale)} parameters).",
            hint="Give the architecture with --arch package.module:callable, or define reset_parameters there.",
        )
    return module


def check_names(class_names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The names as a tuple, or "0", "1", ... for ``count`` classes where none are given."""
    return tuple(class_names) if class_names is not None else tuple(map(str, range(count)))
