"""What can be tuned to move a zero-shot classifier's classes: prompts before each name, or the class embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.types import Embeddings, ImageTextModel, Tokens

_AT_ONCE = 256


@runtime_checkable
class ClassCarrier(Protocol):
    """Class embeddings as a function of one tensor of free numbers."""

    @property
    def free(self) -> Tensor:
        """A leaf that takes gradient."""
        ...

    @property
    def count(self) -> int:
        """How many classes there are."""
        ...

    def of(self, rows: Int[Tensor, " c"]) -> Float[Tensor, "c d"]:
        """Unit embeddings of the classes ``rows``, differentiable by ``free``."""
        ...


class FreeClasses:
    """The last layer itself: g_k = (h_k + v_k) / |h_k + v_k| with a free vector v_k [d] for each class, 0 at first."""

    def __init__(self, given: Float[Tensor, "k d"]) -> None:
        self._given = given
        self.free = torch.zeros_like(given).requires_grad_(True)
        self.count = len(given)

    def of(self, rows: Int[Tensor, " c"]) -> Float[Tensor, "c d"]:
        return F.normalize(self._given[rows] + self.free[rows], dim=1)


class ClassPrompts:
    """g_k = text embedding of [v_k; name_k] with v_k [m, w], begun as the token embeddings of ``context``.

    ``shared``: one v for all classes.
    """

    def __init__(self, clip: ImageTextModel, names: Sequence[str], context: str, *, shared: bool = False) -> None:
        self._clip, self._shared, self.count = clip, shared, len(names)
        with torch.no_grad():
            self._tokens = clip.tokenize([f"{context} {name}." for name in names])
            self._embedded = clip.embed_tokens(self._tokens).float()
            length = shared_start(clip.tokenize([context])[0], self._tokens)
        begun = self._embedded[: 1 if shared else None, 1 : 1 + length]
        self.free = begun.clone().requires_grad_(True)

    def of(self, rows: Int[Tensor, " c"]) -> Float[Tensor, "c d"]:
        end = 1 + self.free.shape[1]
        prompts = self.free.expand(len(rows), -1, -1) if self._shared else self.free[rows]
        words = torch.cat([self._embedded[rows, :1], prompts, self._embedded[rows, end:]], dim=1)
        return self._clip.encode_token_embeddings(words, self._tokens[rows])


@torch.no_grad()
def all_classes(carrier: ClassCarrier) -> Embeddings:
    """[k, d], in parts that fit into memory."""
    rows = torch.arange(carrier.count, device=carrier.free.device)
    return torch.cat([carrier.of(part) for part in rows.split(_AT_ONCE)])


def shared_start(context: Int[Tensor, " c"], tokens: Tokens) -> int:
    """How many tokens after the mark of the start all texts share with the context alone: m, at least 1."""
    longest = min(len(context), tokens.shape[1])
    same = (tokens[:, 1:longest] == context[1:longest]).all(dim=0)
    return max(1, int(same.long().cumprod(dim=0).sum()))


def choose_classes(labels: Int[Tensor, " b"], count: int, others: int, generator: torch.Generator) -> Int[Tensor, " c"]:
    """All ``count`` classes, or those of ``labels`` and ``others`` drawn at random where that is fewer; ascending."""
    own = torch.unique(labels)
    if count <= len(own) + others:
        return torch.arange(count, device=labels.device)
    drawn = torch.randperm(count, generator=generator)[:others].to(labels.device)
    return torch.unique(torch.cat([own, drawn]))
