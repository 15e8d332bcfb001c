"""Poison near a CLIP's own decision boundary: an adaptive choice of samples, against defenses that ask a CLIP.

*Source.* Ours, against CGD (arXiv 2507.05113): CGD finds relabelled samples because CLIP contradicts their label. The
attacker asks a CLIP of their own first and relabels those images of other classes that it takes for the target most.

*Steps.*
1. p(x): the attacker's CLIP's zero-shot probability of the target, a softmax over all class names with CLIP's own
   scale.
2. Of the samples that may be poisoned, those of the largest p(x), instead of random ones. Trigger and labels as always.

*What it costs.* Images that look like the target are few: the higher the rate, the less it differs from a random
choice. Some of them are images whose label was wrong or doubtful before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from unpoison.attacks.selection import Selection
from unpoison.data.sources import LabelledImages
from unpoison.errors import LabelRangeError
from unpoison.models.zero_shot import TEMPLATES, zero_shot_logits
from unpoison.runs import Run
from unpoison.types import ZeroShotModel


def near_the_boundary(
    source: LabelledImages, clip: ZeroShotModel, target: int, *, run: Run, templates: Sequence[str] = TEMPLATES
) -> Selection:
    """(1) How much of the target ``clip`` sees in each sample, for :func:`~unpoison.attacks.poison.plan_poisoning`.

    Raises LabelRangeError, DataError for class names that CLIP cannot tell apart, SourceFormatError when over a tenth
    of the images cannot be read.
    """
    if not 0 <= target < len(source.class_names):
        raise LabelRangeError(
            f"target {target} is outside the {len(source.class_names)} classes of {source.name}.",
            hint=f"Use a label from 0 to {len(source.class_names) - 1}.",
        )
    cosines = zero_shot_logits(clip, source, run=run, templates=templates).cosines
    return Selection(
        how="boundary", model=clip.fingerprint, values=target_probability(cosines, clip.logit_scale, target)
    )


def target_probability(cosines: Float[np.ndarray, "n c"], scale: float, target: int) -> Float[np.ndarray, " n"]:
    """softmax_c(scale cos)[target] in [0, 1], NaN where the image was skipped."""
    return softmax(scale * cosines.astype(np.float64), axis=1)[:, target]
