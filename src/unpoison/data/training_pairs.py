"""Image-caption pairs made ready for training: pixels once, captions as numbers, batches that depend on the step alone.

Every process draws the whole global batch, which costs a few numbers a pair, and works on its own slice of it: the
same seed gives the same batches on one process and on several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.data.pixels import Pixels, to_images
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.runs import Run
from unpoison.types import Embeddings, ImageTextModel

FEWEST = 16
_TABLE_BYTES = 1 << 30  # of embeddings kept in memory
_TABLE_BATCH = 256


@runtime_checkable
class Captioned(Protocol):
    """What is needed of pairs beside their pixels."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[tuple[str, ...]]:
        """The captions of each row: at least one, none empty."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One global batch: image rows in ascending order, and the number of the caption drawn for each."""

    rows: Int[np.ndarray, " b"]
    captions: Int[np.ndarray, " b"]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPairs:
    """Pairs split into ``rows`` to train on and rows ``held_out``; ``texts`` are the different captions.

    Row r has the captions ``text_ids[offsets[r] : offsets[r + 1]]``. ``steps`` batches of ``batch_size`` are planned.
    """

    pixels: Pixels
    rows: Int[np.ndarray, " k"]
    held_out: Int[np.ndarray, " m"]
    texts: tuple[str, ...]
    text_ids: Int[np.ndarray, " c"]
    offsets: Int[np.ndarray, " n1"]
    batch_size: int
    steps: int
    warnings: tuple[str, ...] = ()

    def batch(self, step: int, run: Run) -> Batch:
        """The pairs of a step: each epoch is a new order, the remainder that fills no batch is left out of it."""
        epoch, place = divmod(step, len(self.rows) // self.batch_size)
        order = torch.randperm(len(self.rows), generator=run.generator("pair order", epoch)).numpy()
        rows = np.sort(self.rows[order[place * self.batch_size : (place + 1) * self.batch_size]])
        share = torch.rand(len(rows), generator=run.generator("captions", step), dtype=torch.float64).numpy()
        count = self.offsets[rows + 1] - self.offsets[rows]
        return Batch(rows=rows, captions=self.text_ids[self.offsets[rows] + (share * count).astype(np.int64)])

    def images(self, rows: Int[np.ndarray, " b"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1] as they are, on the CPU."""
        return to_images(self.pixels.array[rows])

    def first_captions(self, rows: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        return self.text_ids[self.offsets[rows]]

    def encode(self, clip: ImageTextModel, captions: Int[np.ndarray, " b"]) -> Embeddings:
        """Unit embeddings of captions by number; an equal caption goes through the tower once."""
        different, places = np.unique(captions, return_inverse=True)
        embedded = clip.encode_texts([self.texts[number] for number in different])
        return embedded[torch.from_numpy(places).to(embedded.device)]

    def text_table(self, clip: ImageTextModel, run: Run) -> Embeddings | None:
        """Embeddings [captions, d] of all captions by a model that will not change; None where it does not pay.

        It pays where a run draws more captions than there are, and where they fit into 1 GiB.
        """
        return self._table(len(self.texts), lambda numbers: clip.encode_texts([self.texts[i] for i in numbers]), run)

    def image_table(self, clip: ImageTextModel, run: Run) -> Embeddings | None:
        """Embeddings [n, d] of the images to train on as they are, at their rows; None where it does not pay."""

        def embed(places: range) -> Embeddings:
            return clip.encode_images(self.images(self.rows[places.start : places.stop]).to(run.device))

        embedded = self._table(len(self.rows), embed, run)
        if embedded is None:
            return None
        table = embedded.new_zeros(len(self.pixels.usable), embedded.shape[1])
        table[torch.from_numpy(self.rows).to(run.device)] = embedded
        return table

    def _table(self, count: int, embed: Callable[[range], Embeddings], run: Run) -> Embeddings | None:
        if count > self.steps * self.batch_size:
            return None
        parts: list[Tensor] = []
        for start in range(0, count, _TABLE_BATCH):
            with run.accelerator.autocast():
                parts.append(embed(range(start, min(start + _TABLE_BATCH, count))))
            if 4 * parts[0].shape[1] * count > _TABLE_BYTES:
                return None
        return torch.cat(parts)


def process_slice(batch_size: int, run: Run) -> slice:
    """The part of each global batch that belongs to this process."""
    share = batch_size // run.accelerator.num_processes
    return slice(run.accelerator.process_index * share, (run.accelerator.process_index + 1) * share)


def held_out_count(usable: int, *, share: float, most: int) -> int:
    """How many of ``usable`` pairs are kept aside: a share of them, no fewer than 8 and no more than a quarter."""
    return min(max(8, round(share * usable)), usable // 4, max(1, most))


def prepare_pairs(
    pairs: Captioned,
    pixels: Pixels,
    *,
    batch_size: int,
    epochs: int,
    steps: int | None,
    held_out: float,
    held_out_pairs: int,
    run: Run,
) -> TrainingPairs:
    """Hold pairs out, number the captions and settle on a batch size that the pairs and the processes allow.

    Fewer pairs than a batch make the batch smaller, which is said in ``warnings``; of rows that cannot be used none is
    drawn. Raises ConfigError for a batch that has no pair for some process, NotEnoughDataError for fewer than 16 usable
    pairs, or than four pairs a process.
    """
    usable = np.flatnonzero(pixels.usable)
    processes = run.accelerator.num_processes
    if batch_size < processes:
        raise ConfigError(
            f"a batch of {batch_size} cannot be shared by {processes} processes.",
            hint=f"Raise batch_size to {processes} or more, or start fewer processes.",
        )
    need = max(FEWEST, 4 * processes)
    if len(usable) < need:
        raise NotEnoughDataError(
            f"usable image-caption pairs in {pairs.name}",
            have=len(usable),
            need=need,
            hint="Give more pairs; a few thousand are a sensible least.",
        )
    order = usable[torch.randperm(len(usable), generator=run.generator("hold-out")).numpy()]
    count = held_out_count(len(usable), share=held_out, most=held_out_pairs)
    held, rows = np.sort(order[:count]), np.sort(order[count:])
    size = min(batch_size, len(rows))
    size -= size % processes
    warnings = []
    if size != batch_size:
        warnings.append(
            f"The batch is {size} instead of {batch_size}: there are {len(rows)} pairs to train on"
            + (f" and {processes} processes." if processes > 1 else ".")
        )
        run.progress.log(warnings[-1])
    captions = pairs.captions(np.arange(len(pairs)))
    numbers: dict[str, int] = {}
    text_ids = [numbers.setdefault(text, len(numbers)) for texts in captions for text in texts]
    return TrainingPairs(
        pixels=pixels,
        rows=rows,
        held_out=held,
        texts=tuple(numbers),
        text_ids=np.array(text_ids, dtype=np.int64),
        offsets=np.cumsum([0, *(len(texts) for texts in captions)], dtype=np.int64),
        batch_size=size,
        steps=steps if steps is not None else epochs * (len(rows) // size),
        warnings=tuple(warnings),
    )
