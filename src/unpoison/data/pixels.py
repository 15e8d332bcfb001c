"""Training reads pixels many times and decodes them once: a uint8 array at the classifier's size, kept on disk."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from unpoison.data.encoded import Overlay, Picture
from unpoison.data.sources import check_skips
from unpoison.errors import UsageError
from unpoison.results import SkippedRow, write_atomically
from unpoison.runs import Progress

_BATCH = 1024
_IN_MEMORY = 1 << 30  # bytes of pixels; more go to a temporary file when there is no cache folder
_VERSION = b"pixels-1"  # raised when decoding or resizing changes
_ABANDONED = 60  # seconds without a change after which a half-decoded file that nobody locks is a killed run's
_ZEROS = bytes(1 << 20)


@runtime_checkable
class ImageRows(Protocol):
    """Encoded images with ids: labelled images, image-text pairs, or any other set of pictures."""

    @property
    def name(self) -> str: ...

    @property
    def ids(self) -> list[str]: ...

    @property
    def overlay(self) -> Overlay | None: ...

    def __len__(self) -> int: ...

    def raw(self, indices: Iterable[int] | np.ndarray) -> list[bytes | SkippedRow]: ...

    def decode(self, indices: Iterable[int] | np.ndarray) -> list[Picture]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """RGB pixels of a set, row by row; rows that are not ``usable`` are black and listed in ``skipped``."""

    array: UInt8[np.ndarray, "n size size 3"]
    usable: Bool[np.ndarray, " n"]
    skipped: tuple[SkippedRow, ...]

    def of(self, rows: Int[np.ndarray, " k"]) -> Pixels:
        """Those of ``rows``, ascending, copied: in memory, or into a temporary file from 1 GiB on."""
        array = _scratch((len(rows), *self.array.shape[1:]))
        for part in _batches(len(rows)):
            array[part.start : part.stop] = self.array[rows[part.start : part.stop]]
        taken = np.isin(np.flatnonzero(~self.usable), rows).tolist()
        skipped = tuple(entry for entry, wanted in zip(self.skipped, taken, strict=True) if wanted)
        return Pixels(array=array, usable=self.usable[rows], skipped=skipped)


def load_pixels(source: ImageRows, size: int, *, cache: Path | None, progress: Progress) -> Pixels:
    """All images of ``source`` at ``size`` pixels: the short side scaled (bicubic), the centre kept.

    With a ``cache`` folder the array is kept there under a hash of the images' bytes, the size and the overlay, and a
    later call maps it into memory; it appears there whole or not at all. Without one it lives in memory, or in a
    temporary file from 1 GiB on. The room on the disk is taken before the first image is decoded. Raises
    SourceFormatError when more than a tenth of the rows cannot be used, UsageError when there is no room or the cache
    folder cannot be written.
    """
    shape = (len(source), size, size, 3)
    if cache is None:
        pixels = _fill(source, _scratch(shape), progress)
    else:
        path = cache / f"pixels-{_content_key(source, size)}.npy"
        stored = _stored(path, shape, source)
        pixels = stored if stored is not None else _fill_file(source, path, shape, progress)
    check_skips(pixels.skipped, len(source), source.name)
    return pixels


def to_images(array: UInt8[np.ndarray, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Pixels to images in [0, 1], channels last in memory."""
    pixels = torch.from_numpy(array if array.flags.writeable else array.copy())
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def fit(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, at ``size`` pixels (bicubic with antialiasing).

    Cropping first gives the same picture as scaling first, and a 1 x 60,000,000 picture no chance to grow.
    """
    width, height = image.size
    if width == height == size:
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def hash_images(digest: Any, source: ImageRows) -> None:
    """Feed ``digest`` with what decides the pictures, and with nothing else (not the name, labels or captions)."""
    if source.overlay is not None:  # an overlay tells images apart by their ids
        digest.update(msgspec.json.encode([source.overlay.fingerprint, source.ids]))
    for rows in _batches(len(source)):
        for content in source.raw(rows):
            data = b"" if isinstance(content, SkippedRow) else content
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)


def _content_key(source: ImageRows, size: int) -> str:
    digest = hashlib.blake2b(_VERSION, digest_size=20)
    digest.update(size.to_bytes(8, "little"))
    hash_images(digest, source)
    return digest.hexdigest()


def _fill(source: ImageRows, array: np.ndarray, progress: Progress) -> Pixels:
    size = array.shape[1]
    usable = np.ones(len(source), dtype=bool)
    skipped: list[SkippedRow] = []
    batches = progress.track(
        _batches(len(source)), total=len(source), what="decoding images", weight=_BATCH, unit="images"
    )
    for rows in batches:
        for row, image in zip(rows, source.decode(np.arange(rows.start, rows.stop)), strict=True):
            if isinstance(image, SkippedRow):
                usable[row] = False
                skipped.append(image)
            else:
                array[row] = np.asarray(fit(image, size))
    return Pixels(array=array, usable=usable, skipped=tuple(skipped))


def _fill_file(source: ImageRows, path: Path, shape: tuple[int, ...], progress: Progress) -> Pixels:
    """Decode into a file of another name, then rename: a killed run leaves nothing that looks finished."""
    size = int(np.prod(shape))
    with ExitStack() as cleanup:
        with _writing(path.parent, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path.parent)
            handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".partial", dir=path.parent)
            file, partial = cleanup.enter_context(open(handle, "w+b")), Path(name)  # noqa: PTH123 # a handle, no path
            cleanup.callback(partial.unlink, missing_ok=True)
            with suppress(OSError):  # where the file system knows no locks nobody takes the file for abandoned
                fcntl.flock(file, fcntl.LOCK_EX)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            _reserve(file, size)
            array = np.lib.format.open_memmap(partial, mode="r+")
        pixels = _fill(source, array, progress)
        rows = {str(row): pixels_row.reason for row, pixels_row in zip(
            np.flatnonzero(~pixels.usable).tolist(), pixels.skipped, strict=True
        )}  # fmt: skip
        with _writing(path.parent, size):
            array.flush()
            write_atomically(path.with_suffix(".json"), msgspec.json.encode(rows))
            partial.replace(path)
    return pixels


def _reserve(file: BinaryIO, size: int) -> None:
    """``size`` more bytes on the disk. Whoever writes through a map into a hole is killed when the disk is full."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), file.tell(), size)
        return
    for start in range(0, size, len(_ZEROS)):
        file.write(_ZEROS[: size - start])
    file.flush()


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed runs left half-decoded; a run at work holds a lock on its file."""
    for path in folder.glob(".pixels-*.partial"):
        with suppress(OSError), path.open("rb") as file:
            if time.time() - path.stat().st_mtime > _ABANDONED:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def _writing(folder: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the folder {folder} for decoded images cannot be written: {error.strerror}.",
            hint=f"They take {size / 2**20:,.0f} MiB. Make room, or choose another folder with --cache or TMPDIR.",
        ) from error


def _stored(path: Path, shape: tuple[int, ...], source: ImageRows) -> Pixels | None:
    """The pixels kept at ``path``, or None when they are absent or damaged."""
    try:
        reasons = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=dict[int, str])
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, msgspec.DecodeError):
        return None
    if array.shape != shape or array.dtype != np.uint8 or any(row >= len(source) for row in reasons):
        return None
    usable = np.ones(len(source), dtype=bool)
    usable[list(reasons)] = False
    skipped = tuple(SkippedRow(id=source.ids[row], reason=reason) for row, reason in reasons.items())
    return Pixels(array=array, usable=usable, skipped=skipped)


def _scratch(shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    if count < _IN_MEMORY:
        return np.zeros(shape, dtype=np.uint8)
    with (
        _writing(Path(tempfile.gettempdir()), count),
        tempfile.TemporaryFile(prefix="unpoison-pixels-") as file,  # gone from the disk when the array is
    ):
        _reserve(file, count)
        return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)


def _batches(total: int) -> Iterator[range]:
    for start in range(0, total, _BATCH):
        yield range(start, min(start + _BATCH, total))
