"""What a method needs to know about the run it is part of, and the folder that makes a run resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from unpoison.errors import ResultError, RunFolderMismatchError, UsageError
from unpoison.results import write_atomically

T = TypeVar("T")
_INPUTS = "run.json"
_FINISHED = "finished.json"


@runtime_checkable
class Progress(Protocol):
    """Where a method tells how far it is. The command line draws it; libraries may ignore it."""

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[T]:
        """Yield ``items`` and count each as ``weight`` units of ``total``."""
        ...

    def log(self, message: str) -> None: ...


class Silent:
    """The default progress: none."""

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, weight: int = 1, unit: str = ""
    ) -> Iterator[T]:
        yield from items

    def log(self, message: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A folder that remembers the inputs of its run and the steps that are done.

    Files appear whole or not at all; nothing in it is ever deleted but a stored step that a later one replaces.
    """

    path: Path

    @classmethod
    def open(cls, path: Path, inputs: Mapping[str, Any]) -> RunFolder:
        """Create the folder, or continue in it when it was begun with the same ``inputs``.

        Raises UsageError for a folder that holds anything else or cannot be written, ResultError where its list of
        inputs is damaged, RunFolderMismatchError with the difference for one begun with other inputs.
        """
        wanted = msgspec.json.decode(msgspec.json.encode(dict(inputs), enc_hook=str))
        marker = path / _INPUTS
        try:
            path.mkdir(parents=True, exist_ok=True)
            if marker.exists():
                _check_same(path, _read_inputs(marker), wanted)
            elif any(entry for entry in path.iterdir() if not entry.name.endswith(".partial")):
                raise UsageError(
                    f"{path} is not empty and was not begun by unpoison.",
                    hint="Choose another -o folder; nothing there was touched.",
                )
            else:
                write_atomically(marker, msgspec.json.format(msgspec.json.encode(wanted), indent=2))
            (path / "steps").mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written: {error.strerror}.",
                hint="Choose an -o folder that you may write to.",
            ) from error
        return cls(path=path)

    @property
    def finished(self) -> bool:
        return (self.path / _FINISHED).exists()

    def finish(self) -> None:
        """Mark the run as complete: the same command then only shows its result. Raises UsageError on a full disk."""
        _write(self.path / _FINISHED, b"{}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Carries the accelerator, the seed, progress, the cache folder and (optionally) the resumable run folder."""

    accelerator: Accelerator = field(default_factory=lambda: Accelerator())
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    cache: Path | None = None
    folder: RunFolder | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def generator(self, *stream: object) -> torch.Generator:
        """A CPU generator of its own for each named stream: order of use never changes a draw."""
        return torch.Generator().manual_seed(self.seed_of(*stream))

    def seed_of(self, *stream: object) -> int:
        """A 63-bit seed derived from the run's seed and the stream's name."""
        digest = hashlib.blake2b(repr((self.seed, *stream)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    @contextmanager
    def seeded(self, *stream: object) -> Iterator[None]:
        """Torch's global state seeded for this stream inside (dropout draws from it), and as it was afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed_of(*stream))
            yield

    def step(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """``compute()``, or what an earlier, interrupted run of the same folder stored for this step."""
        if self.folder is None:
            return compute()
        stored = self.stored(name)
        if stored is not None:
            self.progress.log(f"{name}: continued from {self._step_file(name).name}")
            return stored
        result = {key: value.contiguous() for key, value in compute().items()}
        _write(self._step_file(name), save(result))
        return result

    def agreed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of several processes, each with its own ``state``, the main one's in all: none may decide by its rounding.

        Returns when every process has come so far.
        """
        if self.accelerator.num_processes == 1:
            return state
        self.accelerator.wait_for_everyone()
        held = [{key: value.cpu() for key, value in state.items()}]
        return broadcast_object_list(held)[0]

    def stored(self, name: str) -> dict[str, Tensor] | None:
        """What an earlier, interrupted run of the same folder stored for this step, if it did and it can be read."""
        if self.folder is None or not self._step_file(name).exists():
            return None
        try:
            return load(self._step_file(name).read_bytes())
        except FileNotFoundError:  # another process has forgotten it since
            return None
        except SafetensorError:
            self.progress.log(f"{self._step_file(name).name} is damaged and is computed again")
            return None

    def kept(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        """``compute()``, a dataclass of plain values, or what an earlier run of this folder stored for the step."""
        if self.folder is None:
            return compute()
        path = self.folder.path / "steps" / f"{name}.json"
        if path.exists():
            try:
                stored = msgspec.json.decode(path.read_bytes(), type=kind)
            except msgspec.DecodeError:
                self.progress.log(f"{path.name} is damaged and is computed again")
            else:
                self.progress.log(f"{name}: continued from {path.name}")
                return stored
        result = compute()
        _write(path, msgspec.json.encode(result))
        return result

    def forget(self, names: Iterable[str]) -> None:
        """Remove what is stored for these steps: a later state replaces them."""
        if self.folder is not None and self.accelerator.is_main_process:
            for name in names:
                self._step_file(name).unlink(missing_ok=True)

    def _step_file(self, name: str) -> Path:
        if self.folder is None:
            raise UsageError("this run has no folder.", hint="Open one with RunFolder.open.")
        return self.folder.path / "steps" / f"{name}.safetensors"


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UsageError(
            f"{path} could not be written: {error.strerror}.",
            hint=f"It takes {len(data) / 2**20:,.0f} MiB. Make room there and repeat the same command: it continues "
            "after the last step that was stored.",
        ) from error


def _read_inputs(marker: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(marker.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{marker} is damaged ({error}).", hint="Choose another -o folder.") from error


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    difference = [
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if difference:
        raise RunFolderMismatchError(str(path), difference)
