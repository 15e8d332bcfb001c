"""The factor that a CLIP puts on its cosines, within a range in which something can be learnt from it."""

from __future__ import annotations

import math

from unpoison.types import ImageTextModel

LEAST, MOST = 1.0, 100.0


def usable_scale(clip: ImageTextModel) -> float:
    """The factor on cosines, held between 1 and 100: it decides no answer, and beyond them nothing can be learnt."""
    scale = clip.logit_scale
    return min(max(scale, LEAST), MOST) if math.isfinite(scale) else MOST


def scale_warning(clip: ImageTextModel) -> tuple[str, ...]:
    """A sentence where the model's own factor could not be used."""
    scale, used = clip.logit_scale, usable_scale(clip)
    if math.isclose(scale, used, rel_tol=1e-5):
        return ()
    return (f"The model's logit scale is {scale:g}; {used:g} was used, which decides no answer.",)
