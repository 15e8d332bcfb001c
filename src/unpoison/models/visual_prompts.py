"""Learnt tokens between the patches of a frozen ViT, as part of the model itself: deep visual prompts.

Source: Jia et al. "Visual Prompt Tuning." ECCV 2022 (the deep form): each prompted block gets prompts of its own, which
replace what the block before made of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unpoison.errors import UnsupportedModelError
from unpoison.types import ImageTextModel

NAME = "visual_prompts"
"""The module, and the tensor's name in a file."""


class VisualPrompts(nn.Module):
    """``tokens`` [l, n, w]: n prompts for each of the last l blocks."""

    def __init__(self, tokens: Float[Tensor, "l n w"]) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens.clone())

    def enter(self, block: int, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The block's input with its prompts after the class token, in the place of those of the block before."""
        hidden, count = inputs[0], self.tokens.shape[1]
        first = 1 if block == 0 else 1 + count
        prompts = self.tokens[block].to(hidden.dtype).expand(len(hidden), -1, -1)
        return (torch.cat([hidden[:, :1], prompts, hidden[:, first:]], dim=1), *inputs[1:])

    def leave(self, block: int, output: Any) -> Any:
        """The block's output; behind the last block the prompts are taken out again."""
        if block < len(self.tokens) - 1:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.cat([hidden[:, :1], hidden[:, 1 + self.tokens.shape[1] :]], dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class _Enter:
    """Hooks are objects, not closures: a deep copy of the model then has hooks on its own prompts."""

    def __init__(self, prompts: VisualPrompts, block: int) -> None:
        self.prompts, self.block = prompts, block

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.prompts.enter(self.block, inputs)


class _Leave(_Enter):
    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
        return self.prompts.leave(self.block, output)


def with_visual_prompts(clip: ImageTextModel, tokens: Float[Tensor, "l n w"]) -> tuple[ImageTextModel, VisualPrompts]:
    """A copy of ``clip`` whose image tower has ``tokens`` in its last blocks, and the module that holds them.

    The prompts are part of the copy's weights, so its fingerprint is another. Raises UnsupportedModelError for an image
    tower that is no ViT, has fewer blocks, other widths, or prompts already.
    """
    copy = clip.copy()
    blocks = copy.image_blocks()
    if hasattr(copy.module, NAME):
        raise UnsupportedModelError("the image tower has prompts already.", hint="Give the model as it came.")
    if tokens.shape[0] > len(blocks) or tokens.shape[2] != width_of(copy):
        raise UnsupportedModelError(
            f"prompts for {tokens.shape[0]} blocks of width {tokens.shape[2]} do not fit an image tower of "
            f"{len(blocks)} blocks of width {width_of(copy)}.",
            hint="Prompts belong to the model that they were learnt for.",
        )
    prompts = VisualPrompts(tokens.to(next(copy.module.parameters()).device))
    copy.module.add_module(NAME, prompts)
    for place, block in enumerate(blocks[-tokens.shape[0] :]):
        block.register_forward_pre_hook(_Enter(prompts, place))
        block.register_forward_hook(_Leave(prompts, place))
    return copy, prompts


@contextmanager
def class_tokens(clip: ImageTextModel, blocks: int) -> Iterator[list[Float[Tensor, "b w"]]]:
    """A list that the next pass inside fills with the class token behind each of the last ``blocks`` blocks, in order.

    Raises UnsupportedModelError.
    """
    found: list[Float[Tensor, "b w"]] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[:, 0])

    handles = [block.register_forward_hook(keep) for block in clip.image_blocks()[-blocks:]]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def width_of(clip: ImageTextModel) -> int:
    """Width of the image tower's tokens. Raises UnsupportedModelError."""
    norm = next(part for part in clip.image_blocks()[0].modules() if isinstance(part, nn.LayerNorm))
    return int(norm.normalized_shape[0])
