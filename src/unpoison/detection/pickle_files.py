"""Would a pickle run code? Read from its opcodes by fickling; nothing is unpickled.

fickling (Trail of Bits) interprets the opcodes symbolically. Of its analyses we leave out the three that object to
every import outside the standard library and to every call of one, as each tensor needs, and take its list of the
imports that weights need in their place: any other import, any call that it knows as a way to code, and opcodes out of
order are findings.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path

import unpoison.model_results as results
from unpoison.errors import ModelError, UnsafeCheckpointError
from unpoison.models.checkpoints import check_archive, read_checkpoint

ARCHIVE, LEGACY = "torch archive (pickle)", "torch file of before 1.6 (pickle)"
MAX_PICKLE_BYTES = 64 * 1024**2
_SHOWN = 3


def check_pickled(path: Path, name: str) -> list[results.FileFinding]:
    """Findings of one pickled weights file: archive bomb, code, damage. Nothing of it is executed.

    Only a file without any finding so far is read, as tensors only, to look for damage and numbers that are not finite.
    """
    archive = zipfile.is_zipfile(path)
    if archive:
        try:
            check_archive(path)
        except UnsafeCheckpointError as error:
            kind = "code" if "TorchScript" in error.message else "archive bomb"
            return [results.FileFinding(file=name, kind=kind, reason=_without(path, error.message))]
        except ModelError as error:
            return [results.FileFinding(file=name, kind="unusable", reason=_without(path, error.message))]
    try:
        pickles = _pickles_in_archive(path) if archive else [_start_of(path)]
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        return [results.FileFinding(file=name, kind="unusable", reason=f"the archive cannot be read ({error})")]
    if any(len(data) > MAX_PICKLE_BYTES for data in pickles):
        reason = f"a pickle of more than {MAX_PICKLE_BYTES:,} bytes, which weights do not need"
        return [results.FileFinding(file=name, kind="malformed", reason=reason)]
    said = [reason for data in pickles for reason in unsafe_operations(data, several=not archive)]
    if said:
        more = f"; {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
        reason = f"loading it would run code: {'; '.join(said[:_SHOWN])}{more}"
        return [results.FileFinding(file=name, kind="code", reason=reason)]
    try:
        read_checkpoint(path)
    except UnsafeCheckpointError as error:
        return [results.FileFinding(file=name, kind="code", reason=_without(path, error.message))]
    except ModelError as error:
        return [results.FileFinding(file=name, kind="unusable", reason=_without(path, error.message))]
    return []


def unsafe_operations(data: bytes, *, several: bool = False) -> list[str]:
    """What fickling objects to in a pickle, or in ``several`` pickles in a row; empty for weights alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own parser, about the code that it reads
        from fickling.analysis import (
            Analysis,
            Analyzer,
            NonStandardImports,
            OvertlyBadEvals,
            Severity,
            UnusedVariables,
        )
        from fickling.fickle import Pickled, StackedPickle
        from fickling.ml import MLAllowlist

        too_strict = (NonStandardImports, OvertlyBadEvals, UnusedVariables)
        analyses = [analysis for analysis in Analysis.ALL if not isinstance(analysis, too_strict)]
        analyzer = Analyzer([*analyses, MLAllowlist()])
        try:
            file = io.BytesIO(data)
            pickles = list(StackedPickle.load(file)) if several else [Pickled.load(file)]
            found = [
                result
                for pickled in pickles
                for result in analyzer.analyze(pickled).results
                if result.severity > Severity.POSSIBLY_UNSAFE
            ]
        except Exception as error:  # whatever hostile opcodes make of an interpreter: not understood is not safe
            return [f"its opcodes cannot be followed ({type(error).__name__})"]
    return list(dict.fromkeys(str(result.trigger or result.message).replace("\n", " ")[:120] for result in found))


def _pickles_in_archive(path: Path) -> list[bytes]:
    """Every pickle in the archive, its first 64 MiB and a byte."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".pkl")]
        return [_read(archive, name) for name in names]


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as entry:
        return entry.read(MAX_PICKLE_BYTES + 1)


def _start_of(path: Path) -> bytes:
    """Old files hold their pickles first and the numbers after them."""
    with path.open("rb") as file:
        return file.read(MAX_PICKLE_BYTES)


def _without(path: Path, message: str) -> str:
    return message.removeprefix(f"{path}: ")
