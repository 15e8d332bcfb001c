"""Trigger inversion where the trigger is a small opaque square: the colors that work wherever it is put.

Paper
    Brown et al. "Adversarial Patch." 2017 (arXiv 1712.09665): a patch that is trained at random places.
Idea
    A mask that may grow anywhere (:mod:`unpoison.detection.inversion`) spreads over the image of a network that is
    easily fooled, sooner than it comes upon a planted patch in a corner. A square of a fixed size cannot spread: it
    reaches hardly any class of a clean model, and the target of a backdoored one from nearly all images, since networks
    of convolutions see a patch wherever it is.
Steps
    1. Of each batch every image gets the square, a sigmoid of free numbers, at a place of its own.
    2. Minimise CE(logits, target) over images of other classes, with Adam.
    3. The place among nine (corners, edges, centre) at which it reaches the target from most of the images is its
       place: what is measured on other images is the square there.
    4. Where it reaches it from the wanted share of the images, again from (1) with the next smaller side. The smallest
       that did is the result; where none did, the largest.
Where we differ
    No rotation and no scaling; sides that fall are ours. A square that does not work has the largest side, and classes
    then differ in how many images it sends (:func:`unpoison.detection.anomaly.cost`).
"""

from __future__ import annotations

from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.detection.inversion import InversionConfig, Objective, Search
from unpoison.types import Images

_LOOKED_AT = 128
_GLIMPSED = 5


class SquareInversion(Search):
    """Steps 1 to 4.

    ``config.steps`` are shared out among ``config.squares``; steps after the last side that was tried do nothing.
    """

    def __init__(
        self,
        objective: Objective,
        images: Images,
        rows: Int[Tensor, " m"],
        config: InversionConfig,
        generator: torch.Generator,
    ) -> None:
        super().__init__(objective, images, rows, config, generator)
        self._size = int(images.shape[-2]), int(images.shape[-1])
        sides = [max(1, round(share * min(self._size))) for share in config.squares]
        self._left = sorted(set(sides), reverse=True)
        self._each = -(-config.steps // len(self._left))
        self._best: tuple[Tensor, Tensor] | None = None
        self._reached: list[float] = []
        self._begin()

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            if not self._left:
                return
            self._step()
            self._taken += 1
            if self._taken == self._each:
                self._conclude()

    def found(self) -> tuple[Float[Tensor, "1 h w"], Float[Tensor, "3 h w"]]:
        """Mask, of zeros and ones, and pattern at the best of nine places."""
        return self._best or self._placed()[1]

    def glimpse(self) -> tuple[float, float]:
        """The present side, at the random places of the last batches: nine places of many images take as long as the
        steps of a first look."""
        last = self._reached[-_GLIMPSED:]
        return self._side**2 / (self._size[0] * self._size[1]), 100 * sum(last) / max(1, len(last))

    def _begin(self) -> None:
        self._side, self._reached = self._left[0], []
        self._free = torch.zeros(3, self._left[0], self._left[0], device=self._images.device, requires_grad=True)
        self._optimiser = torch.optim.Adam([self._free], self._config.rate)
        self._taken = 0

    def _step(self) -> None:
        rows = self._drawn()
        ends = (length - self._left[0] + 1 for length in self._size)
        drawn = [torch.randint(end, (len(rows),), generator=self._generator) for end in ends]
        places = torch.stack(drawn, dim=1).to(rows.device)
        loss, reached = self._objective(pasted(self._images[rows], self._free.sigmoid(), places), rows)  # (1)
        self._reached.append(reached)
        self._optimiser.zero_grad()
        loss.backward(inputs=[self._free])  # (2)
        self._optimiser.step()

    def _conclude(self) -> None:
        """Step 4 at the end of a side."""
        reached, placed = self._placed()
        works = reached >= self._config.success
        if works or self._best is None:
            self._best = placed
        self._left = self._left[1:] if works else []
        if self._left:
            self._begin()

    def _placed(self) -> tuple[float, tuple[Tensor, Tensor]]:
        """Step 3: the share of images that the square reaches at its best place, its mask and pattern there."""
        square, rows = self._free.detach().sigmoid(), self._rows[:_LOOKED_AT]
        best, chosen = (-1.0, 0.0), torch.zeros(1, 2, dtype=torch.long)
        for place in product(*([0, end // 2, end] for end in (length - square.shape[-1] for length in self._size))):
            where = torch.tensor([place])
            with torch.no_grad():
                shown = pasted(self._images[rows], square, where.expand(len(rows), 2).to(rows.device))
                loss, reached = self._objective(shown, rows)
            if (reached, -float(loss)) > best:
                best, chosen = (reached, -float(loss)), where
        blank = torch.zeros(1, 3, *self._size, device=square.device)
        mask = pasted(blank[:, :1], torch.ones_like(square[:1]), chosen.to(square.device))
        return best[0], (mask[0], pasted(blank, square, chosen.to(square.device))[0])


def pasted(
    images: Float[Tensor, "b c h w"], square: Float[Tensor, "c s s"], places: Int[Tensor, "b 2"]
) -> Float[Tensor, "b c h w"]:
    """``images`` with ``square`` put over each at its place: row and column of its upper left pixel."""
    along = torch.arange(square.shape[-1], device=images.device)
    rows, columns = places[:, 0, None] + along, places[:, 1, None] + along
    which = torch.arange(len(images), device=images.device)[:, None, None]
    shown = images.clone()
    colors = square.permute(1, 2, 0).to(images).expand(len(images), -1, -1, -1)
    shown.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]] = colors
    return shown
