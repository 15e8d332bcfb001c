"""A universal adversary that learns while a model trains: the perturbations that any image can be given.

Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843) with universal perturbations (2020, arXiv 1811.11304):
the backward pass that trains the weights also says how an added pattern and a pasted patch would raise the loss. Both
take a step that way, so they become what the model is weakest at, and a backdoor is a weakness that all images share.
The model is trained on images that carry them, beside plain ones, and learns to ignore them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.types import Images

NONE, ADDED, PASTED = range(3)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which images get the pattern (``ADDED``), which the patch (``PASTED``) and where its upper left corner lies."""

    kind: Int[Tensor, " b"]
    top: Int[Tensor, " b"]
    left: Int[Tensor, " b"]

    def of(self, rows: slice) -> Places:
        return Places(kind=self.kind[rows], top=self.top[rows], left=self.left[rows])


def draw_places(count: int, size: int, side: int, share: float, generator: torch.Generator) -> Places:
    """Half of a ``share`` of the images gets the pattern, half the patch; a patch lies anywhere inside."""
    chance = torch.rand(3, count, generator=generator)
    kind = torch.where(chance[0] < share / 2, ADDED, torch.where(chance[0] < share, PASTED, NONE))
    top, left = ((chance[1:] * (size - side + 1)).long()).unbind()
    return Places(kind=kind, top=top, left=left)


@dataclass(frozen=True, kw_only=True, eq=False)
class Universal:
    """``pattern`` [3, h, w] in [-epsilon, epsilon] is added to images, ``patch`` [3, k, k] in [0, 1] pasted into them.

    Both are changed in place.
    """

    pattern: Float[Tensor, "3 h w"]
    patch: Float[Tensor, "3 k k"]
    epsilon: float

    @classmethod
    def draw(cls, size: int, side: int, epsilon: float, generator: torch.Generator, device: torch.device) -> Universal:
        pattern = epsilon * (2 * torch.rand(3, size, size, generator=generator) - 1)
        patch = torch.rand(3, side, side, generator=generator)
        return cls(pattern=pattern.to(device), patch=patch.to(device), epsilon=epsilon)

    def tensors(self) -> dict[str, Tensor]:
        return {"pattern": self.pattern, "patch": self.patch}

    def apply(self, images: Images, places: Places) -> Images:
        """Copies of the images in [0, 1] that carry what ``places`` says."""
        kind = places.kind.to(images.device)
        added = (images + self.pattern).clamp(0, 1)
        images = torch.where((kind == ADDED)[:, None, None, None], added, images)
        where = self._pasted(places, images.device)
        if len(where[0]):
            images[where] = self.patch.permute(1, 2, 0).to(images)
        return images

    def ascend(self, carriers: Sequence[tuple[Tensor, Places]], step: float, accelerator: Accelerator) -> None:
        """A step of ``step`` along the sign of the loss's gradient; the patch, which has more room, four times as far.

        ``carriers``: the images that :meth:`apply` gave, with the gradient that a backward pass left there.
        """
        pattern, patch = torch.zeros_like(self.pattern), torch.zeros_like(self.patch)
        for images, places in carriers:
            if images.grad is not None:
                values = images.detach()
                free = (values > 0) & (values < 1)  # what was cut off does not move
                pattern += (images.grad * free)[places.kind.to(images.device) == ADDED].sum(dim=0)
                patch += images.grad[self._pasted(places, images.device)].sum(dim=0).permute(2, 0, 1)
        if accelerator.num_processes > 1:
            for gradient in (pattern, patch):
                torch.distributed.all_reduce(gradient)
        self.pattern.add_(step * pattern.sign()).clamp_(-self.epsilon, self.epsilon)
        self.patch.add_(4 * step * patch.sign()).clamp_(0, 1)

    def _pasted(self, places: Places, device: torch.device) -> tuple[Tensor, slice, Tensor, Tensor]:
        """Index of the patches' pixels [n, k, k] in a batch; channels come last in what it takes out."""
        rows = (places.kind == PASTED).nonzero()[:, 0]
        along = torch.arange(self.patch.shape[-1])
        tall, wide = (corner[rows, None] + along for corner in (places.top, places.left))
        return rows[:, None, None].to(device), slice(None), tall[:, :, None].to(device), wide[:, None, :].to(device)
