"""Embeddings of whole sets: each picture is decoded once for all models that ask, and kept on disk by content hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from unpoison.data.pixels import ImageRows, hash_images
from unpoison.data.sources import check_skips
from unpoison.errors import ModelError, NotEnoughDataError, UsageError
from unpoison.models.image_classifier import evaluation_mode
from unpoison.models.zero_shot import read_ahead
from unpoison.results import SkippedRow, write_atomically
from unpoison.runs import Run
from unpoison.types import Images, ImageTextModel

_VERSION = b"clip-embeddings-1"  # raised when preprocessing or encoding changes
_PIXELS_PER_BATCH = 256 * 64 * 64
_TEXTS = 1024

Vectors = Float[np.ndarray, "n d"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageEmbeddings:
    """Unit embeddings in float32, row by row; rows that are not ``usable`` are NaN and listed in ``skipped``."""

    array: Vectors
    usable: Bool[np.ndarray, " n"]
    skipped: tuple[SkippedRow, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """What is to be encoded of the rows from ``start`` on, once for each model."""

    start: int
    usable: np.ndarray
    images: list[Tensor]
    skipped: tuple[SkippedRow, ...]


def embed_images(
    models: Sequence[ImageTextModel],
    rows: ImageRows,
    *,
    run: Run,
    batch_size: int | None = None,
    what: str = "images",
) -> list[ImageEmbeddings]:
    """The embeddings of all images by each of ``models``, in their order. Modes are put back, weights left as they are.

    With a cache folder in ``run`` they are kept there under a hash of the model, the images' bytes and the overlay.
    ``batch_size`` None chooses by image size. Raises SourceFormatError when over a tenth of the rows is skipped,
    NotEnoughDataError when no image can be used, ModelError for embeddings that are no numbers, UsageError when the
    cache cannot be written.
    """
    places = _places(run.cache, models, rows, run)
    results = [None if place is None else _stored(place, rows) for place in places]
    missing = [index for index, result in enumerate(results) if result is None]
    if missing:
        computed = _encode([models[index] for index in missing], rows, run, batch_size, what)
        for index, result in zip(missing, computed, strict=True):
            results[index] = result
            _store(places[index], result, rows)
    found = [result for result in results if result is not None]
    check_skips(found[0].skipped, len(rows), rows.name)
    return found


def embed_texts(model: ImageTextModel, texts: Sequence[str], *, run: Run) -> Vectors:
    """Unit embeddings of at least one text. Equal texts are encoded once, and those of like length together: padding
    costs time. Raises ModelError for embeddings that are no numbers."""
    different = sorted(set(texts), key=lambda text: (len(text), text))
    starts = range(0, len(different), _TEXTS)
    with ready(model, run), torch.inference_mode():
        found = np.concatenate([_checked(model.encode_texts(different[start : start + _TEXTS])) for start in starts])
    places = {text: place for place, text in enumerate(different)}
    return found[[places[text] for text in texts]]


@contextmanager
def ready(model: ImageTextModel, run: Run) -> Iterator[None]:
    """The model on the run's device and in evaluation mode; every part's own mode again afterwards."""
    with evaluation_mode(model.module.to(run.device)):
        yield


def _encode(
    models: Sequence[ImageTextModel], rows: ImageRows, run: Run, batch_size: int | None, what: str
) -> list[ImageEmbeddings]:
    largest = max(model.image_size for model in models)
    size = batch_size or max(8, min(256, _PIXELS_PER_BATCH // largest**2))
    arrays: list[np.ndarray] = []
    usable = np.zeros(len(rows), dtype=bool)
    skipped: list[SkippedRow] = []
    with ExitStack() as modes:
        for model in models:
            modes.enter_context(ready(model, run))
        work = read_ahead(_batches(models, rows, size))
        for batch in run.progress.track(work, total=len(rows), what=what, weight=size, unit="images"):
            places = batch.start + np.flatnonzero(batch.usable)
            usable[places] = True
            skipped += batch.skipped
            vectors = [_vectors(model, images, run) for model, images in zip(models, batch.images, strict=False)]
            arrays = arrays or [np.full((len(rows), part.shape[1]), np.nan, dtype=np.float32) for part in vectors]
            for array, part in zip(arrays, vectors, strict=False):
                array[places] = part
            check_skips(skipped, len(rows), rows.name)
    if not arrays:
        raise NotEnoughDataError(f"{rows.name}: images", have=0, need=1, hint="Give a set of images that decode.")
    return [ImageEmbeddings(array=array, usable=usable, skipped=tuple(skipped)) for array in arrays]


def _batches(models: Sequence[ImageTextModel], rows: ImageRows, size: int) -> Iterator[_Batch]:
    for start in range(0, len(rows), size):
        pictures = rows.decode(np.arange(start, min(start + size, len(rows))))
        good = [picture for picture in pictures if isinstance(picture, Image.Image)]
        yield _Batch(
            start=start,
            usable=np.array([isinstance(picture, Image.Image) for picture in pictures]),
            images=[model.preprocess(good) for model in models] if good else [],
            skipped=tuple(picture for picture in pictures if isinstance(picture, SkippedRow)),
        )


@torch.inference_mode()
def _vectors(model: ImageTextModel, images: Images, run: Run) -> Vectors:
    return _checked(model.encode_images(images.to(run.device, non_blocking=True)))


def _checked(embeddings: Tensor) -> Vectors:
    vectors = embeddings.float().cpu().numpy()
    if not np.isfinite(vectors).all():
        raise ModelError(
            "The model's embeddings hold values that are no numbers.",
            hint="Its weights are damaged or its training diverged: use an earlier checkpoint.",
        )
    return vectors


def _places(cache: Path | None, models: Sequence[ImageTextModel], rows: ImageRows, run: Run) -> list[Path] | list[None]:
    if cache is None:
        return [None] * len(models)
    content = hashlib.blake2b(_VERSION, digest_size=20)
    hash_images(content, rows)
    places: list[Path] = []
    for model in models:
        key, dtype = content.copy(), str(next(model.module.parameters()).dtype)
        key.update(msgspec.json.encode((model.fingerprint, run.device.type, dtype)))
        places.append(cache / "clip-embeddings" / f"{key.hexdigest()}.safetensors")
    return places


def _store(place: Path | None, result: ImageEmbeddings, rows: ImageRows) -> None:
    if place is None:
        return
    reasons = {row.id: row.reason for row in result.skipped}
    found = [(int(row), reasons[rows.ids[row]]) for row in np.flatnonzero(~result.usable)]
    text = np.frombuffer(msgspec.json.encode(found), dtype=np.uint8)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, save({"embeddings": result.array, "skipped": text}))
    except OSError as error:
        raise UsageError(
            f"the cache folder {place.parent} cannot be written: {error.strerror}.",
            hint="Choose a cache folder that you may write to and that has room.",
        ) from error


def _stored(place: Path, rows: ImageRows) -> ImageEmbeddings | None:
    """The embeddings kept at ``place``; None where there are none or they are damaged."""
    try:
        tensors = load(place.read_bytes())
        array = tensors["embeddings"]
        found = msgspec.json.decode(tensors["skipped"].tobytes(), type=list[tuple[int, str]])
        skipped = tuple(SkippedRow(id=rows.ids[row], reason=reason) for row, reason in found)
    except (OSError, SafetensorError, KeyError, IndexError, msgspec.MsgspecError):
        return None
    usable = np.ones(len(rows), dtype=bool)
    usable[[row for row, _ in found]] = False
    if array.ndim != 2 or len(array) != len(rows) or (np.isfinite(array).all(axis=1) != usable).any():
        return None
    return ImageEmbeddings(array=array, usable=usable, skipped=skipped)
