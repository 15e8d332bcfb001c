"""A few labelled images of each class: which of them are learnt from, which judge, and how good class embeddings are.

What CBPT, RVPT and the linear probe share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from unpoison.data.pixels import load_pixels, to_images
from unpoison.data.sources import LabelledImages
from unpoison.errors import ModelError, NoSeparationError, NotEnoughDataError
from unpoison.results import SkippedRow
from unpoison.runs import Run
from unpoison.types import Embeddings, Images, ImageTextModel

FEWEST = 2
JUDGED = 64
"""At most this many images of each class judge a result..."""
JUDGED_IN_ALL = 4096
"""...and about this many together."""
SEARCHED_AT_MOST = 640
"""Images that a search for a trigger looks at, however many there are to learn from."""
_AT_ONCE, _PIXELS_AT_ONCE = 256, 256 * 64 * 64
_HELD_OUT = 0.25
_SPREAD = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Shots:
    """``rows`` of ``pixels`` [n, s, s, 3], which may lie on disk, with labels [b] into ``names``; all clean."""

    pixels: UInt8[np.ndarray, "n s s 3"]
    rows: Int[np.ndarray, " b"]
    labels: Int[Tensor, " b"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, chosen: Int[Tensor, " c"] | None = None) -> Images:
        """Images in [0, 1] on the labels' device: all, or those at the places ``chosen``."""
        rows = self.rows if chosen is None else self.rows[chosen.cpu().numpy()]
        return to_images(self.pixels[rows]).to(self.labels.device)

    def of(self, chosen: Int[Tensor, " _"]) -> Shots:
        return replace(self, rows=self.rows[chosen.cpu().numpy()], labels=self.labels[chosen])

    def joined(self, other: Shots) -> Shots:
        """These and then those of ``other``, which are rows of the same pixels."""
        return replace(
            self, rows=np.concatenate([self.rows, other.rows]), labels=torch.cat([self.labels, other.labels])
        )

    def batches(self) -> Iterator[Int[Tensor, " _"]]:
        """All places in parts that fit into memory."""
        size = max(8, min(_AT_ONCE, _PIXELS_AT_ONCE // self.pixels.shape[1] ** 2))
        yield from torch.arange(len(self), device=self.labels.device).split(size)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenShots:
    """``learnt``: at most ``shots`` images a class; ``judging``: others, at most 64 a class and 4,096 in all, that
    nothing is fitted to; ``spare``: what is left, as many again at most.

    ``fewest``: the least number of images to learn from that a class has.
    """

    learnt: Shots
    judging: Shots
    spare: Shots
    fewest: int
    skipped: tuple[SkippedRow, ...]


def choose_shots(source: LabelledImages, shots: int, image_size: int, *, searched: int = 0, run: Run) -> ChosenShots:
    """``shots`` images of each class at random to learn from, others to judge; on the run's device.

    A quarter of a class's images judges where it has no more than ``shots``. ``searched``: how many images a search for
    a trigger wants; where those to learn from are fewer, up to half of the others do not judge. Raises
    NotEnoughDataError for a class with fewer than two usable images, SourceFormatError.
    """
    rng = np.random.default_rng(run.seed_of("shots"))
    order = rng.permutation(len(source))
    judges = max(1, min(JUDGED, JUDGED_IN_ALL // len(source.class_names)))
    wanted = [order[source.labels[order] == label][: shots + 2 * judges] for label in range(len(source.class_names))]
    rows = np.concatenate(wanted)
    pixels = load_pixels(source.select(rows), image_size, cache=run.cache, progress=run.progress)
    labels = source.labels[rows]
    learnt, judging, spare, counts = [], [], [], []
    for label, name in enumerate(source.class_names):
        usable = np.flatnonzero((labels == label) & pixels.usable)
        if len(usable) < FEWEST:
            raise NotEnoughDataError(
                f"{source.name}: usable images of {name!r}", have=len(usable), need=FEWEST,
                hint="Give a few labelled images of every class, or leave the class out of the list.",
            )  # fmt: skip
        count = min(shots, len(usable) - max(1, round(_HELD_OUT * len(usable))))
        others = len(usable) - count
        wanted_more = max(0, -(-searched // len(source.class_names)) - count)
        judged = min(judges, others - min(others // 2, wanted_more))
        counts.append(count)
        learnt.append(usable[:count])
        judging.append(usable[count : count + judged])
        spare.append(usable[count + judged :])

    def part(chosen: list[np.ndarray]) -> Shots:
        places = np.concatenate(chosen)
        return Shots(
            pixels=pixels.array,
            rows=places,
            labels=torch.from_numpy(labels[places]).to(run.device),
            names=tuple(source.class_names),
        )

    return ChosenShots(
        learnt=part(learnt), judging=part(judging), spare=part(spare), fewest=min(counts), skipped=pixels.skipped
    )


@torch.no_grad()
def embed(clip: ImageTextModel, shots: Shots, change: Callable[[Images], Images] = lambda images: images) -> Embeddings:
    """Unit embeddings [b, d] of all shots, each batch changed by ``change`` first."""
    return torch.cat([clip.encode_images(change(shots.images(part))).float() for part in shots.batches()])


def check_embeddings(embedded: Float[Tensor, "b d"], *, what: str = "images") -> None:
    """Raises ModelError for embeddings that are no numbers, NoSeparationError where all are the same."""
    if not bool(embedded.isfinite().all()):
        raise ModelError(
            f"The embeddings of {what} hold NaN or infinite values.",
            hint="The model is damaged or overflows; use an earlier checkpoint.",
        )
    spread = float((embedded - embedded.mean(dim=0)).norm(dim=1).max())
    if spread < _SPREAD:
        raise NoSeparationError(
            f"The model gives all {len(embedded)} {what} the same embedding (largest distance to their mean "
            f"{spread:.1e}): no class can be told from another.",
            hint="Give a model that knows these images, or images that are not all the same.",
        )


def accuracy(
    clip: ImageTextModel, shots: Shots, classes: Float[Tensor, "k d"], *, seen: Float[Tensor, "b d"] | None = None
) -> float:
    """Percent of ``shots`` whose nearest class is theirs. ``seen``: their embeddings, where they are known already."""
    said = ((embed(clip, shots) if seen is None else seen) @ classes.T).argmax(dim=1)
    return 100 * float((said == shots.labels).float().mean())


def few_shots_warning(chosen: ChosenShots, shots: int, names: Sequence[str]) -> tuple[str, ...]:
    """A sentence where some class has fewer images to learn from than were asked for."""
    if chosen.fewest >= shots:
        return ()
    counts = torch.bincount(chosen.learnt.labels, minlength=len(names)).tolist()
    low = [f"{name!r} ({count})" for name, count in zip(names, counts, strict=True) if count < shots]
    more = f" and {len(low) - 5} more" if len(low) > 5 else ""
    return (f"Fewer than {shots} images to learn from: {', '.join(low[:5])}{more}.",)
