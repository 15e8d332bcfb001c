"""A universal adversary that learns while a model trains: the perturbations that any image can be given.

Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843) with universal perturbations (2020, arXiv
1811.11304): the backward pass that trains the weights also says how an added pattern, a pasted patch and a few values
written over would raise the loss. Each takes a step that way, so they become what the model is weakest at, and a
backdoor is a weakness that all images share. The model is trained on images that carry them, beside plain ones, and
learns to ignore them. Where a search found a trigger, that one is carried too, as it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unpoison.detection.inversion import InvertedTrigger
from unpoison.types import Images

NONE, ADDED, PASTED, WRITTEN, FOUND = range(5)
_KEPT = 0.9  # of a value's score from step to step


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which images get the pattern (``ADDED``), the patch (``PASTED``) or the values written over them (``WRITTEN``).

    ``FOUND``: the trigger that a search found. ``top`` and ``left`` are where a patch's upper left corner lies.
    """

    kind: Int[Tensor, " b"]
    top: Int[Tensor, " b"]
    left: Int[Tensor, " b"]

    def of(self, rows: slice) -> Places:
        return Places(kind=self.kind[rows], top=self.top[rows], left=self.left[rows])


def draw_places(
    count: int,
    size: int,
    side: int,
    share: float,
    generator: torch.Generator,
    *,
    kinds: Sequence[int] = (ADDED, PASTED),
) -> Places:
    """A ``share`` of the images carries one of the ``kinds``, each as often; a patch lies anywhere."""
    chance = torch.rand(3, count, generator=generator)
    which = (chance[0] * len(kinds) / max(share, 1e-9)).long().clamp(0, len(kinds) - 1)
    kind = torch.where(chance[0] < share, torch.tensor(kinds)[which], NONE)
    top, left = ((chance[1:] * (size - side + 1)).long()).unbind()
    return Places(kind=kind, top=top, left=left)


@dataclass(frozen=True, kw_only=True, eq=False)
class Universal:
    """``pattern`` [3, h, w] in [-epsilon, epsilon] is added to images, ``patch`` [3, k, k] in [0, 1] pasted into them.

    ``values`` [3, h, w] in [0, 1] are written over images where ``score`` is among the ``count`` highest. All four are
    changed in place. ``found``, the trigger that a search found, stays as it is.
    """

    pattern: Float[Tensor, "3 h w"]
    patch: Float[Tensor, "3 k k"]
    values: Float[Tensor, "3 h w"]
    score: Float[Tensor, "3 h w"]
    epsilon: float
    count: int
    found: InvertedTrigger | None = None

    @classmethod
    def draw(
        cls,
        size: int,
        side: int,
        epsilon: float,
        share: float,
        generator: torch.Generator,
        device: torch.device,
        found: InvertedTrigger | None = None,
    ) -> Universal:
        """At random, but for ``found``. ``share`` of an image's values are written over."""
        pattern = epsilon * (2 * torch.rand(3, size, size, generator=generator) - 1)
        patch = torch.rand(3, side, side, generator=generator)
        values, score = torch.rand(2, 3, size, size, generator=generator)
        return cls(
            pattern=pattern.to(device),
            patch=patch.to(device),
            values=values.to(device),
            score=score.to(device),
            epsilon=epsilon,
            count=max(1, round(share * 3 * size * size)),
            found=found,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"pattern": self.pattern, "patch": self.patch, "values": self.values, "score": self.score}

    def written(self) -> Bool[Tensor, "3 h w"]:
        """Where values are written over."""
        chosen = torch.zeros_like(self.score, dtype=torch.bool)
        chosen.view(-1)[self.score.flatten().topk(self.count).indices] = True
        return chosen

    def apply(self, images: Images, places: Places) -> Images:
        """Copies of the images in [0, 1] that carry what ``places`` says."""
        kind = places.kind.to(images.device)
        added = (images + self.pattern).clamp(0, 1)
        images = torch.where((kind == ADDED)[:, None, None, None], added, images)
        images = torch.where(self.written() & (kind == WRITTEN)[:, None, None, None], self.values, images)
        if self.found is not None:
            images = torch.where((kind == FOUND)[:, None, None, None], self.found.apply(images), images)
        where = self._pasted(places, images.device)
        if len(where[0]):
            images[where] = self.patch.permute(1, 2, 0).to(images)
        return images

    def ascend(self, carriers: Sequence[tuple[Tensor, Tensor, Places]], step: float, accelerator: Accelerator) -> bool:
        """A step of ``step`` along the sign of the loss's gradient; what has all of [0, 1] moves four times as far.

        ``carriers``: the images that :meth:`apply` gave, with the gradient that a backward pass left there, and what it
        was given. A value's score is what writing it over adds to the loss to first order, as a running sum.
        False, and nothing moves, where a gradient is not finite (fp16).
        """
        pattern, patch = torch.zeros_like(self.pattern), torch.zeros_like(self.patch)
        values, score = torch.zeros_like(self.values), torch.zeros_like(self.score)
        for images, before, places in carriers:
            if images.grad is not None:
                seen = images.detach()
                free = (seen > 0) & (seen < 1)  # what was cut off does not move
                kind = places.kind.to(images.device)
                pattern += (images.grad * free)[kind == ADDED].sum(dim=0)
                over = images.grad[kind == WRITTEN]
                values += over.sum(dim=0)
                score += (over * (self.values - before[kind == WRITTEN])).sum(dim=0)
                patch += images.grad[self._pasted(places, images.device)].sum(dim=0).permute(2, 0, 1)
        gradients = (pattern, patch, values, score)
        if accelerator.num_processes > 1:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
        if not bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            return False
        self.pattern.add_(step * pattern.sign()).clamp_(-self.epsilon, self.epsilon)
        self.patch.add_(4 * step * patch.sign()).clamp_(0, 1)
        self.values.add_(4 * step * values.sign()).clamp_(0, 1)
        self.score.mul_(_KEPT).add_(score / score.abs().mean().clamp_min(1e-12))
        return True

    def _pasted(self, places: Places, device: torch.device) -> tuple[Tensor, slice, Tensor, Tensor]:
        """Index of the patches' pixels [n, k, k] in a batch; channels come last in what it takes out."""
        rows = (places.kind == PASTED).nonzero()[:, 0]
        along = torch.arange(self.patch.shape[-1])
        tall, wide = (corner[rows, None] + along for corner in (places.top, places.left))
        return rows[:, None, None].to(device), slice(None), tall[:, :, None].to(device), wide[:, None, :].to(device)
