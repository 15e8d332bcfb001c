"""BadNet: a small checkerboard stamped into the bottom-right corner.

*Paper.* Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017 (arXiv 1708.06733). The checker is the one of the published CIFAR-10 victims (ABL): 3x3 pixels at 32 px,
[[0, 0, 255], [0, 255, 0], [255, 0, 255]] on every channel.

*Where we differ.* The patch scales with the image (nearest neighbour, side 3/32 of the short side, at least 3 pixels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from unpoison.errors import ConfigError
from unpoison.types import Images

CHECKER = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class BadNet:
    """``share``: side of the patch as a share of the image's short side, in (0, 1]."""

    share: float = 3 / 32

    modes: ClassVar[tuple[str, ...]] = ("all-to-one", "all-to-all", "clean-label")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"badnet: share must be in (0, 1], got {self.share}.", hint="The paper's is 3/32.")

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """Images [b, 3, h, w] in [0, 1] with the patch stamped on; the seed and the ids play no part."""
        height, width = images.shape[-2:]
        side = max(3, round(self.share * min(height, width)))
        nearest = torch.arange(side, device=images.device) * 3 // side
        patch = torch.tensor(CHECKER, dtype=images.dtype, device=images.device)[nearest][:, nearest]
        # an image smaller than the patch shows the part that fits, aligned at the bottom-right corner
        patch = patch[-min(side, height) :, -min(side, width) :]
        stamped = images.clone()
        stamped[..., height - patch.shape[0] :, width - patch.shape[1] :] = patch
        return stamped
