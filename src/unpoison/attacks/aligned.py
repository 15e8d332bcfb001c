"""Natural captions that fit the image as well as a caption of the target can: an adaptive choice against UBT.

*Source.* Ours, against UBT (arXiv 2409.19526) and every detector that looks for pairs of little similarity. Natural
captions of the target are BadCLIP's (2311.12075), drawn there; here each poisoned image gets its own by a surrogate
CLIP.

*Steps.*
1. The real captions that name the target, and the poisoned images with the trigger on them, in the attacker's own CLIP.
2. The image whose best caption is nearest takes it first, then the next; a caption that has been taken ``most_uses``
   times is gone, so that copies of one sentence do not give the poison away.
3. With :func:`near_the_captions` the images themselves are chosen too: those nearest to any caption of the target.

*What it costs.* With few captions of the target, the last images take what is left. Images that resemble the target's
captions are few, as in :mod:`unpoison.attacks.boundary`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from unpoison.attacks.selection import Selection
from unpoison.data.pairs import ImageTextPairs
from unpoison.errors import NotEnoughDataError
from unpoison.evaluation.embeddings import embed_images, embed_texts
from unpoison.runs import Run
from unpoison.types import ImageTextModel

MOST_USES = 4
_ROWS = 4096  # images compared with all captions at once


def closest_captions(
    images: ImageTextPairs, pool: list[str], clip: ImageTextModel, *, run: Run, most_uses: int = MOST_USES
) -> list[str]:
    """(1, 2) One caption of the ``pool`` for each image. Images that cannot be read take any.

    Raises SourceFormatError when over a tenth of the images cannot be read, NotEnoughDataError when none can,
    ModelError.
    """
    (seen,) = embed_images([clip], images, run=run, what="poisoned images")
    texts = embed_texts(clip, pool, run=run)
    cosines = np.where(seen.usable[:, None], np.nan_to_num(seen.array) @ texts.T, -1.0)
    return [pool[place] for place in assigned(cosines, max(most_uses, -(-len(images) // len(pool)))).tolist()]


def assigned(cosines: Float[np.ndarray, "k p"], most_uses: int) -> Int[np.ndarray, " k"]:
    """(2) For each image the place of its caption: greedy, no caption more than ``most_uses`` times."""
    left = np.full(cosines.shape[1], most_uses)
    chosen = np.empty(len(cosines), dtype=np.int64)
    for row in np.argsort(-cosines.max(axis=1), kind="stable").tolist():
        place = int(np.argmax(np.where(left > 0, cosines[row], -np.inf)))
        chosen[row], left[place] = place, left[place] - 1
    return chosen


def near_the_captions(pairs: ImageTextPairs, captions: list[str], clip: ImageTextModel, *, run: Run) -> Selection:
    """(3) The largest cosine of each image with a caption of the target, for
    :func:`~unpoison.attacks.pairs.plan_pair_poisoning`.

    Those that name the target are ``who_names(pairs, target)[1]``. Raises NotEnoughDataError for no caption, and as
    :func:`closest_captions` does.
    """
    if not captions:
        raise NotEnoughDataError(f"{pairs.name}: captions of the target", have=0, need=1, hint="Choose another target.")
    (seen,) = embed_images([clip], pairs, run=run)
    texts = embed_texts(clip, captions, run=run)
    values = np.full(len(pairs), np.nan)
    for start in range(0, len(pairs), _ROWS):
        values[start : start + _ROWS] = (seen.array[start : start + _ROWS] @ texts.T).max(axis=1)
    return Selection(how="near captions", model=clip.fingerprint, values=values)
