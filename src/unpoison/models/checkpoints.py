"""Weights from files that nobody has vouched for: read as tensors only, checked, hashed, saved as they came.

No file is ever unpickled with code. A file that asks for code is refused with :class:`UnsafeCheckpointError`.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from unpoison.errors import CheckpointMismatchError, ModelError, UnsafeCheckpointError, UsageError
from unpoison.results import write_atomically

PICKLED_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
MAX_HEADER_BYTES = 100 * 1024**2
MAX_INFLATION = 20
LFS_POINTER = b"version https://git-lfs"
"""What stands in the place of a large file that git has not fetched begins with."""
_PREFIX = "module."
_CONVERT = "Where you trust its author, load it there and save the weights as safetensors; then give that file."
_DAMAGED = "Fetch the file again, or compare its checksum with the publisher's."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights under plain keys, and what it takes to write them back as they came.

    ``wrapper`` is the path of dictionary keys that the weights lay under, ``prefix`` what all keys began with.
    ``beside`` holds the plain values (an epoch, a name) at each level of the wrapper, from outside in.
    """

    weights: dict[str, Tensor]
    wrapper: tuple[str, ...] = ()
    prefix: str = ""
    file_name: str = "model.safetensors"
    beside: tuple[dict[str, Any], ...] = ()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one weights file, on the CPU, under plain keys. Raises what :func:`read_checkpoint` raises."""
    return read_checkpoint(path).weights


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read .safetensors, or .pt, .pth, .th, .bin, .ckpt as tensors only.

    Raises UnsafeCheckpointError for a file that needs code (nothing of it has run then), a TorchScript archive
    or one that inflates beyond reason; ModelError for one that is missing, damaged, empty or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file.", hint="Check the path of the weights file.")
    check_fetched(path)
    if path.suffix == ".safetensors":
        content: object = _read_safetensors(path)
    elif path.suffix in PICKLED_SUFFIXES:
        content = read_pickled(path)
    else:
        known = ", ".join((".safetensors", *PICKLED_SUFFIXES))
        raise ModelError(f"{path}: expected a weights file ({known}).", hint="Rename it if it is one of these.")
    if not isinstance(content, Mapping):
        raise ModelError(
            f"{path}: expected a dictionary of tensors, found {type(content).__name__}.",
            hint="Save the model's state_dict() and give that file.",
        )
    weights, wrapper, prefix = normalise_keys(content)
    if not weights:
        keys = ", ".join(repr(key) for key in list(content)[:5])
        raise ModelError(
            f"{path}: no tensors were found under {keys or 'any key'}.",
            hint=f"The weights must be the file itself or lie under one of {', '.join(WRAPPERS)}.",
        )
    _check_dense(path, weights)
    check_finite(weights, name=str(path))
    beside = _plain_values(content, wrapper)
    return Checkpoint(weights=weights, wrapper=wrapper, prefix=prefix, file_name=path.name, beside=beside)


def normalise_keys(content: Mapping) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """Unwrap {"state_dict": ...} and the like, drop what is no tensor, strip a "module." common to all keys.

    Returns the weights, the wrapping keys from outside in, and the prefix that was stripped ("" if none).
    """
    wrapper: tuple[str, ...] = ()
    while inner := next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content, wrapper = content[inner], (*wrapper, inner)
    weights = {
        key: value.detach() for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    prefix = _PREFIX if weights and all(key.startswith(_PREFIX) for key in weights) else ""
    return {key.removeprefix(prefix): value for key, value in weights.items()}, wrapper, prefix


def _plain_values(content: Mapping, wrapper: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    levels = []
    for key in (*wrapper, None):
        levels.append(
            {
                name: value
                for name, value in content.items()
                if isinstance(name, str) and (value is None or isinstance(value, bool | int | float | str))
            }
        )
        content = content if key is None else content[key]
    return tuple(levels)


def load_into(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into ``module``, or change nothing and raise CheckpointMismatchError with every difference.

    BatchNorm's step counters may be absent: torch wrote none before 0.4.1.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    parts = [
        f"{len(entries)} {what}: {', '.join(entries[:5])}{', ...' if len(entries) > 5 else ''}"
        for what, entries in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if entries
    ]
    if parts:
        raise CheckpointMismatchError(
            f"The weights do not fit {type(module).__name__}: {'; '.join(parts)}.",
            missing=missing,
            unexpected=unexpected,
            hint="Give the architecture that wrote them with --arch (and the right number of classes).",
        )
    module.load_state_dict(dict(weights), strict=False)


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """BLAKE2b (16 bytes, hex) over the sorted names with their dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(path: Path, state: Mapping[str, Tensor], *, wrapper: tuple[str, ...] = ()) -> None:
    """Write plain tensors as the suffix says, whole or not at all. A file of other content is never overwritten.

    Raises UsageError for such a file and for a suffix that :func:`read_weights` would not read.
    """
    # Copies of their own: views of one storage would be written as shared, or refused by safetensors.
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    if path.suffix == ".safetensors":
        data = save(plain, metadata={"format": "pt"})
    elif path.suffix in PICKLED_SUFFIXES:
        content: dict = plain
        for key in reversed(wrapper):
            content = {key: content}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getvalue()
    else:
        raise UsageError(f"{path}: weights cannot be written under this suffix.", hint="Use .safetensors or .pth.")
    write_new(path, data)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that was not there, or that already holds these bytes. Raises UsageError for any other."""
    if path.exists() and (path.is_dir() or path.read_bytes() != data):
        raise UsageError(f"{path} exists and holds something else.", hint="Choose another output folder.")
    write_atomically(path, data)


def check_finite(weights: Mapping[str, Tensor], *, name: str) -> None:
    """Raises ModelError where a weight is NaN or infinite: no result of such a model means anything."""
    bad = [key for key, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ModelError(
            f"{name}: {len(bad)} tensors hold NaN or infinite values, the first is {bad[0]!r}.",
            hint="The training that wrote the file diverged, or the file is damaged; use an earlier checkpoint.",
        )


def check_fetched(path: Path) -> None:
    """Raises ModelError for a pointer of Git LFS, which stands where the weights were not fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(
                f"{path}: a Git LFS pointer, not the weights themselves.",
                hint="Run `git lfs pull` where the repository was cloned, then repeat the command.",
            )


def check_safetensors(path: Path) -> None:
    """Look at the header before anything is mapped. Raises UnsafeCheckpointError, ModelError."""
    check_fetched(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if start[:2] == b"\x80\x02" or start[:4] == b"PK\x03\x04":
        raise UnsafeCheckpointError(
            f"{path}: the name ends in .safetensors, but it is a pickle or an archive. Nothing of it was loaded.",
            hint="Get the true safetensors file from its publisher, or rename it to .pth to have it read as tensors.",
        )
    if size < 10 or length < 2:
        raise ModelError(f"{path}: not a safetensors file ({size} bytes).", hint=_DAMAGED)
    if length > MAX_HEADER_BYTES:
        raise UnsafeCheckpointError(
            f"{path}: the header claims {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read.",
            hint="This is no safetensors file of a usual model; get it from its publisher again.",
        )
    if length > size - 8:
        raise ModelError(f"{path}: truncated, its header alone needs {length + 8:,} of {size:,} bytes.", hint=_DAMAGED)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    check_safetensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: damaged or truncated safetensors file ({error}).", hint=_DAMAGED) from error


def read_pickled(path: Path) -> object:
    """What a torch file holds, by the reader that runs no code. Raises UnsafeCheckpointError, ModelError."""
    if zipfile.is_zipfile(path):
        check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice is for people who wrote the file; ours is in the errors below
            return torch.load(path, weights_only=True, map_location="cpu")
    # EOFError and the rest: what a truncated or hostile file makes of the reader. None of them runs its code.
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, IndexError,
        AttributeError, AssertionError, MemoryError, RecursionError, OverflowError, UnicodeDecodeError,
    ) as error:  # fmt: skip
        refused = _refused_name(str(error)) or _first_import(path)
        if refused is not None:
            raise UnsafeCheckpointError(
                f"{path}: loading it needs code ({refused}), so it was refused. Nothing of it was executed.",
                hint=_CONVERT,
            ) from error
        # torch puts advice on unsafe loading around the reason.
        reason = (str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: damaged, truncated or no torch file ({reason[:200]}).", hint=_DAMAGED) from error


def check_archive(path: Path) -> None:
    """Refuse TorchScript and archives that inflate, from the directory of the archive alone.

    Raises UnsafeCheckpointError, ModelError for a damaged archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ModelError(f"{path}: damaged archive ({error}).", hint=_DAMAGED) from error
    parts = [entry.filename.split("/") for entry in entries]
    if any("code" in names[1:-1] or names[-1] == "constants.pkl" for names in parts):
        raise UnsafeCheckpointError(
            f"{path}: a TorchScript archive, which holds code. Nothing of it was executed.",
            hint="Where you trust its author: torch.jit.load(...).state_dict(), saved as safetensors; then give that.",
        )
    inflated = sum(entry.file_size for entry in entries)
    if inflated > MAX_INFLATION * path.stat().st_size:
        raise UnsafeCheckpointError(
            f"{path}: {path.stat().st_size:,} bytes claim to hold {inflated:,}; weights do not shrink like that.",
            hint="Do not use this file; get the weights from their publisher.",
        )


def _refused_name(message: str) -> str | None:
    """The import that torch refused, from its message."""
    if ".tar format" in message:
        return "the legacy .tar format"
    found = re.search(r"GLOBAL ([\w.]*\w)|(?:unrecognized function|but got) (.{1,80})", message)
    return None if found is None else found[1] or found[2]


def _first_import(path: Path) -> str | None:
    """The first import outside torch that a pickle asks for, read from its opcodes; None where there is none.

    Covers the opcodes that torch's reader does not know and so reports as damage.
    """
    strings: list[str] = []
    try:
        with _open_pickle(path) as file:
            while True:  # old torch files are several pickles in a row
                for opcode, value, _ in pickletools.genops(file):
                    if isinstance(value, str):
                        strings.append(value)
                    if opcode.name in ("GLOBAL", "INST"):
                        name = str(value).replace(" ", ".")
                    elif opcode.name == "STACK_GLOBAL":
                        name = ".".join(strings[-2:])
                    else:
                        continue
                    if not name.startswith(("torch.", "collections.")):
                        return name
    # Damage: no pickle any more, so no import of it can be named. RuntimeError: an encrypted archive.
    except (ValueError, KeyError, IndexError, StopIteration, OSError, RuntimeError, struct.error, zipfile.BadZipFile):
        return None


def _open_pickle(path: Path) -> io.BytesIO:
    """The pickle of a file or of the archive that it is; its first 64 MiB, where every import has its place."""
    limit = 64 * 1024**2
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return io.BytesIO(file.read(limit))
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(name) as entry:
            return io.BytesIO(entry.read(limit))


def _check_dense(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A stride of zero lets a small file claim a tensor larger than memory: look at the claim before using it."""
    odd = [
        key for key, value in weights.items() if value.layout != torch.strided or value.is_meta or value.is_quantized
    ]
    if odd:
        raise ModelError(f"{path}: {odd[0]!r} is no dense tensor.", hint="Save dense float weights.")
    claimed = sum(value.numel() * value.element_size() for value in weights.values())
    if claimed > MAX_INFLATION * path.stat().st_size:
        raise UnsafeCheckpointError(
            f"{path}: {path.stat().st_size:,} bytes claim tensors of {claimed:,} bytes.",
            hint="Do not use this file; get the weights from their publisher.",
        )
