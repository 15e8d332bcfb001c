"""CLIP's opinion of every image: cosines with one text embedding per class, streamed and cached on disk.

Reading, hashing and decoding run ahead in one background thread while the forward pass runs. Each chunk of rows is
kept in the run's cache under a hash of everything that its cosines depend on; a killed scan continues there.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from unpoison.data.sources import LabelledImages, check_skips
from unpoison.errors import ConfigError, DataError, NoSeparationError
from unpoison.results import SkippedRow, write_atomically
from unpoison.runs import Run
from unpoison.types import Embeddings, ZeroShotModel

T = TypeVar("T")
DEFAULT_TEMPLATES = ("a photo of a {}.",)
TEMPLATES = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a bright photo of a {}.",
    "a close-up photo of a {}.",
    "a cropped photo of a {}.",
    "a photo of a large {}.",
    "a photo of a small {}.",
)
CHUNK = 2048
_VERSION = b"clip-logits-1"  # raised when preprocessing or scoring changes
_HASHED_AT_ONCE = 256  # rows; part of the chunk's key, so it never follows the batch size
_PIXELS_PER_BATCH = 256 * 64 * 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroShot:
    """Cosine of each image with each class in [-1, 1], NaN rows where the image was skipped.

    ``truncated`` are the class names that the tokenizer cuts off: CLIP judges them by their beginning.
    """

    cosines: Float[np.ndarray, "n c"]
    skipped: tuple[SkippedRow, ...] = ()
    truncated: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Rows ``start`` to ``stop``: what is to be encoded, or its stored cosines. ``chunk`` is the cache file."""

    start: int
    stop: int
    usable: np.ndarray
    images: Tensor | None = None
    cosines: np.ndarray | None = None
    skipped: tuple[SkippedRow, ...] = ()
    chunk: Path | None = None


def zero_shot_logits(
    clip: ZeroShotModel,
    source: LabelledImages,
    *,
    run: Run,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int | None = None,
) -> ZeroShot:
    """Cosines of all images with all classes. The model is moved to the run's device; its weights stay as they are.

    Memory is constant but for the result (4 bytes a row and class). ``batch_size`` None chooses by image size.
    Raises DataError for class names that CLIP cannot tell apart, SourceFormatError when over a tenth is skipped.
    """
    module = clip.module.to(run.device)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        texts = class_embeddings(clip, source.class_names, templates)
        size = batch_size or rows_at_once(clip)
        key = b"" if run.cache is None else _key_of_scorer(clip, source, templates, texts)
        result = np.full((len(source), len(source.class_names)), np.nan, dtype=np.float32)
        skipped: list[SkippedRow] = []
        work = read_ahead(_batches(clip, source, key, size, run.cache))
        for batch in run.progress.track(work, total=len(source), what="CLIP", weight=size, unit="images"):
            if batch.cosines is not None:
                result[batch.start : batch.stop] = batch.cosines
            elif batch.images is not None:
                result[batch.start + np.flatnonzero(batch.usable)] = cosines_of(clip, batch.images, texts)
            skipped += batch.skipped
            if batch.chunk is not None:
                _store(batch.chunk, result, batch.stop, skipped, source)
            check_skips(tuple(skipped), len(source), source.name)
    finally:
        for part, mode in modes.items():
            part.training = mode
    return ZeroShot(cosines=result, skipped=tuple(skipped), truncated=cut_off(clip, source.class_names, templates))


def rows_at_once(clip: ZeroShotModel) -> int:
    """How many images one forward pass takes, by their size."""
    return max(8, min(256, _PIXELS_PER_BATCH // clip.image_size**2))


def class_embeddings(
    clip: ZeroShotModel, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> Embeddings:
    """One unit embedding [c, d] per class: the mean of its templates' unit embeddings, scaled to length 1.

    Source: Radford et al., Learning transferable visual models from natural language supervision, ICML 2021, 3.1.4.
    Raises ConfigError for a template without {}, DataError for names that give the same embedding, NoSeparationError
    where all of them do.
    """
    prompts = _prompts(class_names, templates)
    with torch.inference_mode():
        each = clip.encode_texts([text for texts in prompts for text in texts])
        each = each.view(len(class_names), len(templates), -1)
        embeddings = torch.nn.functional.normalize(each.mean(dim=1), dim=-1)
    _refuse_twins(class_names, each)
    return embeddings.clone()


def cut_off(clip: ZeroShotModel, class_names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """The class names that at least one template loses a part of."""
    return tuple(
        name
        for name, texts in zip(class_names, _prompts(class_names, templates), strict=True)
        if any(clip.truncated(texts))
    )


def read_ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield ``items``, computing up to ``depth`` of them ahead in one background thread; errors arrive in order."""
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        pending = deque(pool.submit(next, items, end) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, items, end))
                yield item  # pyright: ignore[reportReturnType] # `end` has just been ruled out
        finally:
            for future in pending:
                future.cancel()


def _batches(
    clip: ZeroShotModel, source: LabelledImages, key: bytes, size: int, cache: Path | None
) -> Iterator[_Batch]:
    folder = None if cache is None else cache / "clip-logits"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(source), CHUNK):
        last = min(first + CHUNK, len(source))
        path = None
        if folder is not None:
            path = folder / f"{_key_of_chunk(source, key, first, last)}.safetensors"
            stored = _stored(path, source, first, last)
            if stored is not None:
                yield from _split(stored, size)
                continue
        for start in range(first, last, size):
            stop = min(start + size, last)
            yield _read(clip, source, start, stop, chunk=path if stop == last else None)


def _read(clip: ZeroShotModel, source: LabelledImages, start: int, stop: int, *, chunk: Path | None) -> _Batch:
    pictures = source.decode(np.arange(start, stop))
    good = [picture for picture in pictures if isinstance(picture, Image.Image)]
    return _Batch(
        start=start,
        stop=stop,
        usable=np.array([isinstance(picture, Image.Image) for picture in pictures]),
        images=clip.preprocess(good) if good else None,
        skipped=tuple(picture for picture in pictures if isinstance(picture, SkippedRow)),
        chunk=chunk,
    )


@torch.inference_mode()
def cosines_of(clip: ZeroShotModel, images: Tensor, texts: Tensor) -> Float[np.ndarray, "b c"]:
    """Cosines of preprocessed images [b, 3, h, w] with class embeddings [c, d], both unit vectors to this CLIP."""
    embeddings = clip.encode_images(images.to(texts.device, non_blocking=True))
    return (embeddings @ texts.T).float().cpu().numpy()


def _prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    if not templates or not all("{}" in template for template in templates):
        raise ConfigError(
            f"expected templates that hold {{}}, got {list(templates)}.", hint="Write 'a photo of a {}.', for example."
        )
    # Not str.format: braces in a class name or elsewhere in the template stay what they are.
    return [[template.replace("{}", name) for template in templates] for name in class_names]


def _refuse_twins(class_names: Sequence[str], each: Tensor) -> None:
    """Texts that reach the text tower as the same tokens have the same embedding but for rounding."""
    flat = torch.nn.functional.normalize(each.flatten(1).double(), dim=-1)
    alike = (flat @ flat.T).triu(diagonal=1) > 1 - 1e-9
    if len(class_names) > 1 and int(alike.sum()) == math.comb(len(class_names), 2):
        raise NoSeparationError(
            f"CLIP gives all {len(class_names)} class names ({class_names[0]!r}, {class_names[1]!r}, ...) the same "
            "embedding: no class can be told from another.",
            hint="Give names that differ in more than case or what the tokenizer cuts off, or another model.",
        )
    twins = [f"{class_names[i]!r} and {class_names[j]!r}" for i, j in alike.nonzero().tolist()]
    if twins:
        raise DataError(
            f"CLIP cannot tell these class names apart: {'; '.join(twins[:5])} ({len(twins)} pairs).",
            hint="Give shorter, distinct class names: the tokenizer cuts long ones off and ignores case.",
        )


def _key_of_scorer(clip: ZeroShotModel, source: LabelledImages, templates: Sequence[str], texts: Tensor) -> bytes:
    overlay = None if source.overlay is None else source.overlay.fingerprint
    device = (texts.device.type, str(next(clip.module.parameters()).dtype))
    parts = (clip.fingerprint, _prompts(source.class_names, templates), overlay, device)
    return _VERSION + msgspec.json.encode(parts)


def _key_of_chunk(source: LabelledImages, key: bytes, first: int, last: int) -> str:
    digest = hashlib.blake2b(key, digest_size=20)
    if source.overlay is not None:  # an overlay tells images apart by their ids
        digest.update(msgspec.json.encode(source.ids[first:last]))
    for start in range(first, last, _HASHED_AT_ONCE):
        rows = source.raw(np.arange(start, min(start + _HASHED_AT_ONCE, last)))
        content = [row if isinstance(row, bytes) else row.reason.encode() for row in rows]
        kinds = [(isinstance(row, bytes), len(text)) for row, text in zip(rows, content, strict=True)]
        digest.update(msgspec.json.encode(kinds))
        digest.update(b"".join(content))
    return digest.hexdigest()


def _store(path: Path, result: np.ndarray, last: int, skipped: Sequence[SkippedRow], source: LabelledImages) -> None:
    first = (last - 1) // CHUNK * CHUNK
    reasons = {row.id: row.reason for row in skipped}
    found = [(place, reasons[name]) for place, name in enumerate(source.ids[first:last]) if name in reasons]
    text = np.frombuffer(msgspec.json.encode(found), dtype=np.uint8)
    write_atomically(path, save({"cosines": result[first:last], "skipped": text}))


def _stored(path: Path, source: LabelledImages, first: int, last: int) -> _Batch | None:
    """A chunk from the cache; None where there is none or it is damaged, and then it is computed again."""
    try:
        tensors = load(path.read_bytes())
        cosines = tensors["cosines"]
        skipped = msgspec.json.decode(tensors["skipped"].tobytes(), type=list[tuple[int, str]])
        rows = tuple(SkippedRow(id=source.ids[first + place], reason=reason) for place, reason in skipped)
    except (OSError, SafetensorError, KeyError, IndexError, msgspec.MsgspecError):
        return None
    usable = np.ones(last - first, dtype=bool)
    usable[[place for place, _ in skipped]] = False
    if cosines.shape != (last - first, len(source.class_names)) or (np.isfinite(cosines).all(axis=1) != usable).any():
        return None
    return _Batch(start=first, stop=last, usable=usable, cosines=cosines, skipped=rows)


def _split(batch: _Batch, size: int) -> Iterator[_Batch]:
    """A stored chunk in batches, so that progress counts the same images however they were come by."""
    assert batch.cosines is not None  # noqa: S101 # for the type checker
    for start in range(batch.start, batch.stop, size):
        stop = min(start + size, batch.stop)
        part = slice(start - batch.start, stop - batch.start)
        yield _Batch(
            start=start,
            stop=stop,
            usable=batch.usable[part],
            cosines=batch.cosines[part],
            skipped=batch.skipped if start == batch.start else (),
        )
