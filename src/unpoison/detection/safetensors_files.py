"""Does a safetensors file hold what its header claims? The header is read by itself before any tensor is mapped.

The format forbids what this looks for (https://github.com/huggingface/safetensors, "Format"): tensors that overlap or
leave gaps could hide a second reading of the same bytes, sizes that do not follow from the shape could make a reader
allocate or read past the end.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from unpoison.errors import ModelError, UnsafeCheckpointError
from unpoison.model_results import FileFinding, FindingKind
from unpoison.models.checkpoints import check_safetensors

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one number of each type of the format."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def check_tensors(path: Path, name: str) -> list[FileFinding]:
    """Findings of one safetensors file: its header, the tensors that it claims, numbers that are not finite."""
    try:
        check_safetensors(path)
    except UnsafeCheckpointError as error:
        return [_finding(name, "malformed", error.message.removeprefix(f"{path}: "), error.hint)]
    except ModelError as error:
        return [_finding(name, "unusable", error.message.removeprefix(f"{path}: "), error.hint)]
    try:
        entries, room = _read_header(path)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        return [_finding(name, "unusable", f"the header cannot be read ({error})")]
    found = check_layout(entries, room, name)
    if found:
        return found
    try:
        return _check_finite(path, name)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        return [_finding(name, "unusable", f"the tensors cannot be read ({error})")]


def check_layout(entries: dict[str, Any], room: int, name: str) -> list[FileFinding]:
    """Each tensor has the bytes that its shape needs; together they fill ``room`` bytes without overlap or gap."""
    end, last = 0, ""
    for key, entry in sorted(entries.items(), key=lambda item: tuple(item[1].data_offsets)):
        start, stop = entry.data_offsets
        shown = f"tensor {key[:80]!r}"
        if entry.dtype not in BITS:
            return [_finding(name, "unusable", f"{shown} is of an unknown type {entry.dtype[:20]!r}")]
        if min((start, stop, *entry.shape)) < 0:
            return [_finding(name, "malformed", f"{shown} has a negative size or place")]
        needed = -(-prod(entry.shape) * BITS[entry.dtype] // 8)
        if stop - start != needed:
            reason = f"{shown} claims {needed:,} bytes by its shape and {stop - start:,} by its place"
            return [_finding(name, "malformed", reason)]
        if start < end:
            return [_finding(name, "malformed", f"{shown} overlaps {last[:80]!r}")]
        if start > end:
            return [_finding(name, "malformed", f"{start - end:,} bytes before {shown} belong to no tensor")]
        end, last = stop, key
    if end > room:
        reason = f"truncated: the tensors need {end:,} bytes after the header, the file has {room:,}"
        return [_finding(name, "unusable", reason)]
    if end < room:
        return [_finding(name, "malformed", f"{room - end:,} bytes at the end belong to no tensor")]
    return []


def _read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    """The tensors by name, and how many bytes follow the header. Its length was checked before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = msgspec.json.decode(file.read(length), type=dict[str, Any])
    tensors = {key: msgspec.convert(entry, _Entry) for key, entry in header.items() if key != "__metadata__"}
    return tensors, path.stat().st_size - 8 - length


def _check_finite(path: Path, name: str) -> list[FileFinding]:
    """One tensor in memory at a time."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 # no mapping
            value = file.get_tensor(key)
            floats = value.float() if value.is_floating_point() and value.element_size() < 2 else value
            if floats.is_floating_point() and not bool(floats.isfinite().all()):
                return [_finding(name, "unusable", f"tensor {key[:80]!r} holds NaN or infinite values")]
    return []


def _finding(name: str, kind: FindingKind, reason: str, hint: str = "") -> FileFinding:
    return FileFinding(file=name, kind=kind, reason=reason, hint=hint)
