"""Pickles in files: weights that are one, and any that lie beside them, in archives or under other names.

A loader runs a pickle whatever its file is called, so every file is read as one until its opcodes make no sense
(:mod:`unpoison.detection.pickle_code`); nothing is unpickled.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from unpoison.detection.pickle_code import MAX_OPCODES, Opcodes, Stream, follow_pickles, read_opcodes
from unpoison.errors import ModelError, UnsafeCheckpointError
from unpoison.model_results import FileFinding, FindingKind
from unpoison.models.checkpoints import check_archive, read_checkpoint

ARCHIVE, LEGACY = "torch archive (pickle)", "torch file of before 1.6 (pickle)"
PICKLE = "pickle"
PICKLE_SUFFIXES = (".pkl", ".pickle", ".joblib", ".dill", ".pk", ".p")
"""What pickles are called that hold other things than weights; joblib and pandas compress them, too."""
MAX_PICKLE_BYTES = 64 * 1024**2
ZIP = b"PK\x03\x04"
_NUMPY, _MAX_NUMPY_HEADER = b"\x93NUMPY", 1024**2
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00\x00", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda",
               b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd")  # fmt: skip
_SHOWN = 3
Open = Callable[[], AbstractContextManager[Stream]]


def check_pickled(path: Path, name: str) -> list[FileFinding]:
    """Findings of one pickled weights file: archive bomb, code, damage. Nothing of it is executed.

    Only a file without any finding so far is read, as tensors only, to look for damage and numbers that are not finite.
    """
    archive = zipfile.is_zipfile(path)
    found = check_archived(path, name) if archive else []
    if found:
        return found
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith(ZIP):  # a loader looks at the first bytes alone: what is before an archive is a pickle
        found = _check_stream(lambda: path.open("rb"), name, pickled=True)
        if found:
            return found
    if not archive and (damage := _damage(path, start)):
        return [_finding(name, "unusable", damage)]
    try:
        read_checkpoint(path)
    except UnsafeCheckpointError as error:
        return [_finding(name, "code", _without(path, error.message), error.hint)]
    except ModelError as error:
        return [_finding(name, "unusable", _without(path, error.message), error.hint)]
    return []


def check_archived(path: Path, name: str) -> list[FileFinding]:
    """Findings of a zip archive of any kind: TorchScript, a bomb, code in a pickle or an array of objects in it."""
    try:
        check_archive(path)
    except UnsafeCheckpointError as error:
        kind = "code" if "TorchScript" in error.message else "archive bomb"
        return [_finding(name, kind, _without(path, error.message), error.hint)]
    except ModelError as error:
        return [_finding(name, "unusable", _without(path, error.message), error.hint)]
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or _is_storage(entry.filename):
                    continue
                found = check_loose(lambda entry=entry: archive.open(entry), entry.filename)
                if found:
                    inside = entry.filename[:80].encode(errors="backslashreplace").decode()
                    return [_finding(name, found[0].kind, f"{inside} in it: {found[0].reason}")]
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError) as error:
        return [_finding(name, "unusable", f"the archive cannot be read ({error})")]
    return []


def check_loose(opened: Open, name: str) -> list[FileFinding]:
    """Findings of a file or an entry of an archive that is no weights file: code in it, where it can be unpickled."""
    with opened() as stream:
        start = stream.read(16)
    if start.startswith(_NUMPY):
        try:
            with opened() as stream:
                objects = _skip_header(stream).hasobject
        except Exception as error:  # numpy's parser on hostile bytes
            return [_finding(name, "unusable", f"the array's header cannot be read ({type(error).__name__})")]
        return _check_stream(opened, name, pickled=True, skip=_skip_header) if objects else []
    pickled = named_pickle(name)
    if pickled and start.startswith(_COMPRESSED):
        reason = "a compressed pickle: what loading it would run cannot be seen"
        return [_finding(name, "code", reason)]
    return _check_stream(opened, name, pickled=pickled)


def named_pickle(name: str) -> bool:
    """Whether a file is called as one, compressed or not (model.pkl, model.pkl.gz)."""
    return any(suffix.lower() in PICKLE_SUFFIXES for suffix in Path(name).suffixes[-2:])


def _check_stream(
    opened: Open, name: str, *, pickled: bool, skip: Callable[[Stream], object] = lambda _: None
) -> list[FileFinding]:
    """What a stream would run as pickles in a row. Where it is not ``pickled`` by its name, a call has to be reached:
    text may look like an import."""
    with opened() as stream:
        skip(stream)
        read = read_opcodes(stream)
    if read.count >= MAX_OPCODES:
        return [_finding(name, "malformed", f"a pickle of {MAX_OPCODES:,} opcodes or more, too long to look through")]
    if not read.imports:
        return []  # without a name nothing can be called
    if read.end > MAX_PICKLE_BYTES:
        reason = f"a pickle of more than {MAX_PICKLE_BYTES:,} bytes, which weights do not need"
        return [_finding(name, "malformed", reason)]
    with opened() as stream:
        skip(stream)
        found = follow_pickles(stream.read(MAX_PICKLE_BYTES), several=True)
    if not found.unsafe or not (pickled or found.runs):
        return []
    more = f"; {len(found.unsafe) - _SHOWN} more" if len(found.unsafe) > _SHOWN else ""
    return [_finding(name, "code", f"loading it would run code: {'; '.join(found.unsafe[:_SHOWN])}{more}")]


def _damage(path: Path, start: bytes) -> str:
    """Why a file that should be pickled weights is none; "" where it begins with a whole pickle."""
    if start.startswith(ZIP):
        return "truncated or damaged: an archive without the directory at its end; fetch it again"
    with path.open("rb") as file:
        read = read_opcodes(file)
    if read.whole:
        return ""
    if looks_like_safetensors(start, path.stat().st_size):
        return f"safetensors under another name: rename it to {path.stem}.safetensors".encode(
            errors="backslashreplace"
        ).decode()
    return _broken(read, path.stat().st_size)


def _broken(read: Opcodes, size: int) -> str:
    if not size:
        return "an empty file; fetch it again"
    if not read.count:
        return "not a pickle, and no archive: fetch it again, or compare its checksum with the publisher's"
    return f"truncated or damaged: its pickle breaks off after {read.count:,} opcodes; fetch it again"


def looks_like_safetensors(start: bytes, size: int) -> bool:
    """By the length and the brace that such a file begins with."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size


def _is_storage(entry: str) -> bool:
    """The raw numbers of a tensor in a torch archive, NAME/data/3: no loader unpickles them."""
    parts = entry.split("/")
    return len(parts) > 1 and parts[-2] == "data" and parts[-1].isdecimal()


def _skip_header(stream: Stream) -> np.dtype:
    """Read a .npy file up to where its content begins."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        return read(stream, max_header_size=_MAX_NUMPY_HEADER)[2]


def _finding(name: str, kind: FindingKind, reason: str, hint: str = "") -> FileFinding:
    return FileFinding(file=name, kind=kind, reason=reason, hint=hint)


def _without(path: Path, message: str) -> str:
    return message.removeprefix(f"{path}: ")
