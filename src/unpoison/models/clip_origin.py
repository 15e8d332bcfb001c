"""What it takes to write a CLIP back as it came: its weights files, entry by entry, and the small files beside them.

All of it is read when the model is opened: the folder that it came from may be gone when training ends.
"""

from __future__ import annotations

import filecmp
import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unpoison.errors import CheckpointMismatchError, UsageError
from unpoison.models.checkpoints import Checkpoint, check_finite
from unpoison.models.folders import file_inside

COMPANIONS = (".json", ".txt", ".model")
_MAX_COMPANION = 64 * 1024**2
_SHAPES = ("input_resolution", "context_length", "vocab_size", "attn_mask")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightsFile:
    """One weights file: type and shape of each entry under its plain key, in the file's order.

    ``kept`` are entries that the network has no place for (position numbers, sizes): written back as they were.
    ``prefix`` is what all keys began with, ``wrapper`` the dictionary keys that the weights lay under, and ``beside``
    the plain values (an epoch, a name) at each level of the wrapper. An optimiser's state is not kept: it belongs to
    the old weights.
    """

    name: str
    entries: dict[str, tuple[torch.dtype, torch.Size]]
    kept: dict[str, Tensor] = field(default_factory=dict)
    prefix: str = ""
    wrapper: tuple[str, ...] = ()
    beside: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipOrigin:
    """The weights files and ``companions``: configuration and tokenizer files by name."""

    files: tuple[WeightsFile, ...]
    companions: dict[str, bytes]


def describe_checkpoint(checkpoint: Checkpoint) -> tuple[WeightsFile, dict[str, Tensor]]:
    """What a file looked like, and the entries of it that a network is to load."""
    kept = {key: value for key, value in checkpoint.weights.items() if _has_no_place(key)}
    weights = {key: value for key, value in checkpoint.weights.items() if key not in kept}
    file = WeightsFile(
        name=checkpoint.file_name,
        entries={key: (value.dtype, value.shape) for key, value in checkpoint.weights.items()},
        kept=kept,
        prefix=checkpoint.prefix,
        wrapper=checkpoint.wrapper,
        beside=checkpoint.beside,
    )
    return file, weights


def describe_folder(folder: Path, state: Mapping[str, Tensor]) -> ClipOrigin | None:
    """A folder of safetensors under the keys of ``state``; None where the library had to rename keys to load it."""
    files, covered = [], set()
    for path in sorted(folder.glob("model*.safetensors")):
        entries, kept = {}, {}
        with safe_open(file_inside(folder, path.name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 # no mapping
                value = file.get_tensor(key)
                entries[key] = (value.dtype, value.shape)
                if key not in state:
                    kept[key] = value.clone()
        covered |= entries.keys()
        files.append(WeightsFile(name=path.name, entries=entries, kept=kept))
    if not files or not covered >= state.keys():
        return None
    return ClipOrigin(files=tuple(files), companions=companions_of(folder))


def companions_of(folder: Path) -> dict[str, bytes]:
    """Configuration and tokenizer files of a model folder that its owner's checks have passed."""
    return {
        path.name: file_inside(folder, path.name).read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in COMPANIONS and path.stat().st_size <= _MAX_COMPANION
    }


def fit_shapes(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` with single numbers in the shape that ``state`` has them in: [] and [1] are both in use."""
    single = {key for key, value in weights.items() if value.numel() == 1 and key in state and state[key].numel() == 1}
    return {key: value.reshape(state[key].shape) if key in single else value for key, value in weights.items()}


def write_clip(origin: ClipOrigin, state: Mapping[str, Tensor], folder: Path) -> None:
    """All files of ``origin`` with the weights of ``state``, whole or not at all.

    Raises UsageError as :func:`whole_folder` does, ModelError for weights that are not finite in the type they are
    stored in, CheckpointMismatchError where ``state`` lacks an entry or has it in another shape.
    """
    with whole_folder(folder) as scratch:
        for file in origin.files:
            _write_file(scratch / file.name, file, state)
        for name, data in origin.companions.items():
            (scratch / name).write_bytes(data)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into ``folder`` at the end: a disk that fills up leaves nothing half-written.

    Raises UsageError where they cannot be written, or where a file of another content is in the way.
    """
    new = not folder.exists()
    scratch = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=".partial"))
        yield scratch
        paths = sorted(scratch.iterdir())
        for path in paths:
            _refuse_other(folder / path.name, path)
        for path in paths:
            path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{folder}: the model could not be written ({reason}). Nothing of it was left there.",
            hint="Make room on the disk or choose another folder, then repeat the command: it does not train again.",
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _write_file(path: Path, file: WeightsFile, state: Mapping[str, Tensor]) -> None:
    tensors = {file.prefix + key: _as_it_was(key, file, state) for key in file.entries}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
        return
    beside = file.beside or ({},) * (len(file.wrapper) + 1)
    content: dict[str, Any] = {**beside[-1], **tensors}
    for key, values in zip(reversed(file.wrapper), reversed(beside[:-1]), strict=True):
        content = {**values, key: content}
    # Through memory: torch's own writer turns a full disk into an error that does not say so.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def _as_it_was(key: str, file: WeightsFile, state: Mapping[str, Tensor]) -> Tensor:
    dtype, shape = file.entries[key]
    value = file.kept.get(key, state.get(key))
    if value is None or value.numel() != shape.numel():
        found = "nothing" if value is None else f"shape {tuple(value.shape)}"
        raise CheckpointMismatchError(
            f"{file.name}: expected {key} of shape {tuple(shape)} to write back, found {found}.",
            missing=[key],
            unexpected=[],
            hint="The network was changed after it was opened; save it yourself.",
        )
    # A tensor of its own: views of one storage would be written as shared, or refused by safetensors.
    stored = value.detach().to("cpu", dtype, copy=True).reshape(shape).contiguous()
    check_finite({key: stored}, name=f"{file.name} (stored as {dtype})")
    return stored


def _has_no_place(key: str) -> bool:
    return key in _SHAPES or key.endswith(".position_ids")


def _refuse_other(target: Path, path: Path) -> None:
    if target.exists() and (target.is_dir() or not filecmp.cmp(target, path, shallow=False)):
        raise UsageError(f"{target} exists and holds something else.", hint="Choose another output folder.")
