"""What would a pickle run? Read from its opcodes by fickling; nothing is unpickled.

fickling (Trail of Bits) interprets the opcodes symbolically. Of its analyses we leave out the three that object to
every import outside the standard library and to every call of one, as each tensor needs, and take its list of the
imports that weights need in their place: any other import, any call that it knows as a way to code, and opcodes out of
order are findings. A pickle that breaks off runs what stands before the break, so that much of it is judged.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import IO, Any, cast

Stream = IO[bytes] | io.BufferedIOBase
MAX_OPCODES = 10_000_000
_IMPORTS = frozenset({"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"})
_TORCH_MAGIC, _TORCH_PICKLES = 0x1950A86A20F9469CFC6C, 5  # of a torch file of before 1.6; raw numbers follow


@dataclass(frozen=True, kw_only=True)
class Opcodes:
    """How far a stream can be read as pickles. ``end``: where the last opcode begins, in bytes.

    ``whole``: pickles that have an end. ``imports``: something in them asks for a name; without, nothing can run.
    """

    count: int
    end: int
    whole: int
    imports: bool


@dataclass(frozen=True, kw_only=True)
class Followed:
    """``unsafe``: what weights do not need and loading would do. ``runs``: a loader comes to a call or to the end."""

    unsafe: tuple[str, ...]
    runs: bool


def read_opcodes(stream: Stream) -> Opcodes:
    """Of all pickles that stand in a row from where ``stream`` is, until an opcode is none."""
    count, end, whole, imports, legacy = 0, 0, 0, False, False
    try:
        while not (legacy and whole == _TORCH_PICKLES):
            for opcode, value, place in pickletools.genops(cast("IO[bytes]", stream)):
                count, end = count + 1, place or 0
                imports = imports or opcode.name in _IMPORTS
                legacy = legacy or (whole == 0 and value == _TORCH_MAGIC)
                if count >= MAX_OPCODES:
                    return Opcodes(count=count, end=end, whole=whole, imports=imports)
            whole += 1
    except Exception:  # whatever bytes that are no pickle make of its parser, and the streams of damaged archives
        return Opcodes(count=count, end=end, whole=whole, imports=imports)
    return Opcodes(count=count, end=end, whole=whole, imports=imports)


def follow_pickles(data: bytes, *, several: bool = False) -> Followed:
    """What fickling objects to in a pickle, or in ``several`` pickles in a row, up to where they break off."""
    with _quiet():
        from fickling.fickle import EmptyPickleError, Pickled

        said: list[str] = []
        whole, runs, legacy, stream = 0, False, False, io.BytesIO(data)
        try:
            while not (legacy and whole == _TORCH_PICKLES):
                try:
                    pickled = Pickled.load(stream, fail_on_decode_error=False)
                except EmptyPickleError:
                    break
                broken = not len(pickled) or pickled[-1].info.name != "STOP"
                if broken:
                    pickled = _that_runs(pickled)
                said += _objections(pickled)
                runs = runs or not broken or pickled.has_call
                if broken or not several:
                    break
                whole += 1
                legacy = legacy or (whole == 1 and any(opcode.arg == _TORCH_MAGIC for opcode in pickled))
        except Exception as error:  # whatever hostile opcodes make of an interpreter: not understood is not safe
            said, runs = [*said, f"its opcodes cannot be followed ({type(error).__name__})"], True
    return Followed(unsafe=tuple(dict.fromkeys(said)), runs=runs)


def _that_runs(pickled: Any) -> Any:
    """The opcodes of a pickle that breaks off, up to the first that an interpreter stumbles over."""
    from fickling.fickle import Interpreter, Pickled

    interpreter, done = Interpreter(pickled), 0
    try:
        while True:
            interpreter.step()
            done += 1
    except (StopIteration, ValueError, IndexError, RecursionError):
        return Pickled(list(pickled)[:done])


def _objections(pickled: Any) -> list[str]:
    from fickling.analysis import (
        Analysis,
        Analyzer,
        NonStandardImports,
        OvertlyBadEvals,
        Severity,
        UnusedVariables,
    )
    from fickling.ml import MLAllowlist

    too_strict = (NonStandardImports, OvertlyBadEvals, UnusedVariables)
    analyses = [analysis for analysis in Analysis.ALL if not isinstance(analysis, too_strict)]
    found = Analyzer([*analyses, MLAllowlist()]).analyze(pickled).results
    said = [result.trigger or result.message for result in found if result.severity > Severity.POSSIBLY_UNSAFE]
    return [str(reason).replace("\n", " ")[:120] for reason in said]


@contextmanager
def _quiet() -> Iterator[None]:
    """fickling warns of the code that it reads, and of opcodes out of order on stderr, which is the caller's."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
