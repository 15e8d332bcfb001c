"""Training reads pixels many times and decodes them once: a uint8 array at the classifier's size, kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
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


def load_pixels(source: ImageRows, size: int, *, cache: Path | None, progress: Progress) -> Pixels:
    """All images of ``source`` at ``size`` pixels: the short side scaled (bicubic), the centre kept.

    With a ``cache`` folder the array is kept there under a hash of the images' bytes, the size and the overlay, and a
    later call maps it into memory; it appears there whole or not at all. Without one it lives in memory, or in a
    temporary file from 1 GiB on. Raises SourceFormatError when more than a tenth of the rows cannot be used,
    UsageError when the cache folder cannot be written.
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise UsageError(
            f"the cache folder {path.parent} cannot be written: {error.strerror}.",
            hint="Choose a cache folder that you may write to.",
        ) from error
    os.close(handle)
    partial = Path(name)
    try:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        pixels = _fill(source, array, progress)
        array.flush()
        rows = {str(row): pixels_row.reason for row, pixels_row in zip(
            np.flatnonzero(~pixels.usable).tolist(), pixels.skipped, strict=True
        )}  # fmt: skip
        write_atomically(path.with_suffix(".json"), msgspec.json.encode(rows))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return pixels


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
    with tempfile.TemporaryFile(prefix="unpoison-pixels-") as file:  # gone from the disk when the array is
        file.truncate(count)
        return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)


def _batches(total: int) -> Iterator[range]:
    for start in range(0, total, _BATCH):
        yield range(start, min(start + _BATCH, total))
