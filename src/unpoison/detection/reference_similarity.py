"""Reference similarity: a poisoned caption does not describe its image to a CLIP that never saw the poison.

Paper
    Liang, Liu, Gong et al. "Unlearning Backdoor Threats: Enhancing Backdoor Defense in Multimodal Contrastive Learning
    via Local Token Unlearning", arXiv 2403.16257: weakly similar pairs are looked at first. The rest is ours.
Idea
    Low similarity finds pairs that do not match, poisoned or only badly captioned. Among these the poisoned ones share
    a trigger: a CLIP that was trained on them draws them together, bad captions stay scattered.
Needs
    A clean reference CLIP; for the density the CLIP that was trained on the pairs.
Steps
    1. Similarity: the cosine of image and caption under the reference, the mean over an image's captions.
    2. The least similar tenth of the pairs.
    3. Density inside it: minus the mean distance to the 8 nearest others in the suspect's image embeddings.
Where we differ, and what the paper leaves open
    The paper has no reference and takes the suspect's own similarity, which backdoor training has raised for poison.
    Several captions of an image count by their mean, so that the number of captions does not matter: one poisoned
    caption among many good ones is diluted.
    Outside the tenth the score is the rank of low similarity minus 1, which is below every score inside.
    Density is measured over the whole tenth at once, against ``neighbours.py``: here poison is meant to find itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from unpoison.detection.neighbours import nearest, unit_rows
from unpoison.detection.ranks import rank_normalise
from unpoison.errors import ConfigError, NoSeparationError, NotEnoughDataError

Scores = Float[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class DensityConfig:
    """Both constants are ours, set in trials with a patch at 1 % of 20,000 pairs."""

    share: float = 0.1
    """The least similar share of the pairs, in (0, 1]."""
    neighbours: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.neighbours < 1:
            raise ConfigError("expected share in (0, 1] and neighbours >= 1.", hint="Try 0.1 and 8.")


def low_similarity(cosines: Scores) -> Scores:
    """Minus the cosine of image and caption, in [-1, 1]; NaN stays NaN. Raises NoSeparationError for equal ones."""
    usable = cosines[~np.isnan(cosines)]
    if len(usable) and np.ptp(usable) == 0:
        raise NoSeparationError(
            "All images are equally similar to their captions.", hint="Give a reference that tells these pairs apart."
        )
    return -cosines


def density_of_least_similar(
    suspicion: Scores, embeddings: Float[np.ndarray, "n d"], config: DensityConfig | None = None
) -> Scores:
    """Scores in [-1, 1]: 1 minus half the mean distance inside the least similar share, ranks below 0 outside.

    ``suspicion``: :func:`low_similarity`. Rows without one, or without an embedding, are NaN.
    Raises NotEnoughDataError where the share holds no more than ``neighbours`` rows.
    """
    config = config or DensityConfig()
    units, usable = unit_rows(embeddings)
    usable &= ~np.isnan(suspicion)
    kept = np.flatnonzero(usable)
    count = int(np.ceil(config.share * len(kept)))
    if count <= config.neighbours:
        raise NotEnoughDataError(
            f"pairs in the least similar {100 * config.share:g} percent", have=count, need=config.neighbours + 1,
            hint="Give more pairs, a larger share or fewer neighbours.",
        )  # fmt: skip
    inside = kept[np.argsort(-suspicion[kept], kind="stable")[:count]]  # (2)
    scores = np.full(len(suspicion), np.nan)
    scores[kept] = rank_normalise(suspicion[kept]) - 1
    scores[kept] = scores[kept].clip(max=-1 / (2 * len(kept)))  # the one of rank 1 may be outside, where many are tied
    distances = np.concatenate([near.distances for near in nearest(units[inside], config.neighbours)])
    scores[inside] = 1 - distances.mean(axis=1) / 2  # (3)
    return scores
