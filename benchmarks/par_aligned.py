"""PAR with distances after the best rotation: an idea that `purify par` does not use (docs/decisions/0004).

A rotation of all embeddings costs the contrastive loss nothing and moves each of them far. Here it is no way out.
benchmarks/par.py runs it as the variants "aligned".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from unpoison.contrastive import info_nce
from unpoison.defenses import par
from unpoison.types import Embeddings

SMOOTH = 0.9  # of the cross-covariance: that of one batch of 128 says little of 192 dimensions


@contextmanager
def aligned_distances() -> Iterator[None]:
    """PAR's distances are ||new R - old||^2 here, R the rotation that fits both towers best.

    R is of a running mean of the batches' cross-covariances, and is taken as given in the backward pass. The mean is
    not stored: a run that is interrupted begins it again.
    """
    known: list[torch.Tensor] = []

    def loss(images: Embeddings, texts: Embeddings | None, old_images: Embeddings, old_texts: Embeddings,
             logit_scale: float, tau: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        value = info_nce(images, old_texts if texts is None else texts, logit_scale)
        terms = {"contrastive_loss": value.detach()}
        towers = {"image": (images, old_images)} | ({} if texts is None else {"text": (texts, old_texts)})
        now = torch.stack([new.detach().float().T @ old.float() for new, old in towers.values()]).sum(0)
        known[:] = [now if not known else SMOOTH * known[0] + (1 - SMOOTH) * now]
        left, _, right = torch.linalg.svd(known[0])
        for name, (new, old) in towers.items():
            distance = par.squared_distance(new @ (left @ right).to(new), old)
            value = value - par.gate(distance, tau) / 2
            terms |= {f"{name}_distance": distance.detach(), f"{name}_open": (distance.detach() <= tau).float()}
        return value, terms

    with patch.object(par, "par_loss", loss):
        yield
