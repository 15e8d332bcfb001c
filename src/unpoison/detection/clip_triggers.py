"""Does anything small, put on any image, make this CLIP say one and the same? A search with nothing but pairs.

Steps
    1. Concepts: k-means of the captions' embeddings; a concept is the mean direction of its captions.
    2. The search for a trigger (:mod:`unpoison.detection.trigger_search`) with the concepts as classes.
    3. What it suspects is searched for once more, on other images; judged is the geometric mean of both sizes. The
       size that a search ends with is partly chance, and of many clean models one would be suspected by it. Waves are
       tried one by one, without chance, and are not looked for again.
What it cannot see
    A target that no caption comes near, and encoders trained to hide their trigger from such a search. Nothing found is
    no proof.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels, load_pixels, to_images
from unpoison.detection.confirmed_search import kept_twice, search_twice
from unpoison.detection.trigger_search import TriggerSearch, TriggerSearchConfig, search_triggers
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.evaluation.embeddings import embed_texts, ready
from unpoison.models.logit_scale import usable_scale
from unpoison.runs import Run
from unpoison.types import Images, ImageTextModel

FEWEST_CONCEPTS = 8
"""Concepts differ in how easily they are reached: among a few one is out of line by chance."""


@dataclass(frozen=True, kw_only=True)
class ConceptSearchConfig:
    """How many concepts, and how many images and captions of the pairs are used. All numbers are ours."""

    concepts: int = 12
    images: int = 640
    captions: int = 4096
    confirm: bool = True
    """Whether what is suspected is searched for a second time."""
    search: TriggerSearchConfig = field(default_factory=TriggerSearchConfig)

    def __post_init__(self) -> None:
        if self.concepts < FEWEST_CONCEPTS or self.images < 1 or self.captions < self.concepts:
            raise ConfigError(
                f"expected concepts >= {FEWEST_CONCEPTS}, images >= 1 and captions >= concepts.",
                hint="The defaults take a minute or two on two cores for a small model.",
            )


def concept_steps(config: ConceptSearchConfig) -> int:
    """Images that a search passes forward and backward, at most."""
    return (1 + config.confirm) * config.concepts * config.search.inversion.steps * config.search.inversion.batch_size


def kept_concept_steps(config: ConceptSearchConfig) -> list[str]:
    """The steps of a run that a search keeps on its way; to be forgotten once its result is kept."""
    return kept_twice(config.concepts)


def search_concepts(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    config: ConceptSearchConfig | None = None,
    *,
    run: Run,
    pixels: Pixels | None = None,
) -> tuple[TriggerSearch, tuple[str, ...]]:
    """What was found, and for each concept its most typical caption. The model stays as it is.

    ``pixels`` are those of ``pairs`` at the model's size; None: decoded here.
    Raises NotEnoughDataError for few usable images or few different captions, SourceFormatError, ModelError.
    """
    config = config or ConceptSearchConfig()
    random = np.random.default_rng(run.seed_of("concepts"))
    if pixels is None:
        pixels = load_pixels(pairs, clip.image_size, cache=run.cache, progress=run.progress)
    rows = np.flatnonzero(pixels.usable)
    order = random.permutation(rows)
    described = np.sort(random.permutation(rows)[: config.captions])
    texts = sorted({texts[0] for texts in pairs.captions(described)})
    if len(texts) < config.concepts:
        raise NotEnoughDataError(
            f"{pairs.name}: different captions", have=len(texts), need=config.concepts, hint="Search fewer concepts."
        )
    concepts, captions = find_concepts(embed_texts(clip, texts, run=run), texts, config.concepts, run=run)  # (1)
    probed = clip.copy()
    with ready(probed, run):
        probed.module.float().requires_grad_(False)
        classes, scale = concepts.to(run.device), usable_scale(clip)

        def logits(images: Images) -> Float[Tensor, "b k"]:
            with run.accelerator.autocast():
                return scale * probed.encode_images(images) @ classes.T

        def decoded(rows: np.ndarray) -> Images:
            return to_images(pixels.array[np.sort(rows)]).to(run.device)

        def others() -> Images:
            rest = order[config.images : 2 * config.images] if len(order) >= 2 * config.images else order
            return decoded(rest[: config.images])

        first = decoded(order[: config.images])
        if config.confirm:
            found = search_twice(logits, first, others, captions, config.search, run=run)  # (2), (3)
        else:
            found = search_triggers(logits, first, captions, config.search, run=run)
        return found, captions


def find_concepts(
    embedded: Float[np.ndarray, "n d"], texts: list[str], count: int, *, run: Run
) -> tuple[Float[Tensor, "k d"], tuple[str, ...]]:
    """Unit centers of k-means over unit embeddings, and the caption nearest to each."""
    from sklearn.cluster import KMeans

    options: dict[str, Any] = {"n_init": 4, "random_state": run.seed_of("concepts") % 2**32}
    means = KMeans(count, **options).fit(embedded)
    centers = F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=1)
    nearest = (embedded @ centers.numpy().T).argmax(axis=0).tolist()
    return centers, tuple(texts[row] for row in nearest)
