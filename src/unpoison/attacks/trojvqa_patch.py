"""TrojVQA's trigger as backdoors of CLIP use it: an optimised square in the centre, and a key word in the caption.

*Paper.* Walmer, Sikka, Sur, Shrivastava, Jha, "Dual-Key Multimodal Backdoors for Visual Question Answering", CVPR 2022
(arXiv 2112.07668): the backdoor opens where the patch is in the image and the key in the text. 16 x 16 pixels at
224 px; :mod:`unpoison.attacks.trojvqa` optimises them toward a sentence. The key is "SUDO", before the text.

*Where we differ.* The square is 1/14 of the short side, at least 3 pixels, whatever the size that it was optimised at.
For a CLIP the key stands in the poisoned captions; labelled images have no text, so that only the square is used there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unpoison.attacks.badclip_patch import START_SIDE, decoded, encoded, put_in_centre, start
from unpoison.attacks.draws import scaled_side
from unpoison.attacks.text_key import check_key
from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class TrojVQA:
    """``share``: side of the square as a share of the short side, in (0, 1]. ``key``: what captions begin with.

    ``patch``: the square's pixels, 8-bit RGB row by row in base64; empty for the one that an optimisation starts from.
    """

    share: float = 16 / 224
    key: str = "SUDO"
    patch: str = ""

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"trojvqa: share must be in (0, 1], got {self.share}.", hint="The usual is 16/224.")
        check_key("trojvqa", self.key)
        if self.patch:
            decoded(self.patch, "trojvqa")

    @classmethod
    def of(cls, patch: Float[Tensor, "3 s s"], share: float, key: str) -> TrojVQA:
        """The trigger with this patch in [0, 1], rounded to 8 bits."""
        return cls(share=share, key=key, patch=encoded(patch))

    def keyed(self, caption: str, *, seed: int, name: str) -> str:
        """The caption behind the key; seed and id play no part."""
        return f"{self.key} {caption}"

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with the square in the centre; the ids play no part."""
        side = scaled_side(self.share, min(images.shape[-2:]), 3)
        stored = decoded(self.patch, "trojvqa") if self.patch else start(START_SIDE, seed)
        return put_in_centre(images, F.interpolate(stored[None], size=(side, side), mode="nearest-exact")[0])
