"""DECREE: is an image encoder backdoored? Neither classes nor texts are needed.

Paper
    Feng, Tao, Cheng, Shen, Xu, Liu, Zhang, Ma, Zhang. "Detecting Backdoors in Pre-trained Encoders." CVPR 2023.
Idea
    A backdoored encoder maps every image with the trigger to one place. Look for the smallest patch that makes the
    embeddings of different images agree; on a clean encoder it has to cover much of the image.
Steps
    1. x' = (1 - m) x + m p with a mask m [1, h, w] and a pattern p [3, h, w].
    2. Minimise - mean pairwise cosine of the embeddings of x' + lambda ||m||_1.
    3. lambda starts at 1e-3, grows five times after five batches in a row with a mean cosine above 0.99, and shrinks
       five times after five without.
    4. The smallest mask that reached it: its L1 norm over the largest possible one (the share of the image). A share
       under 0.1 is a backdoored encoder; better: a share far under that of clean encoders of the same kind.
Where we differ
    Adam on free numbers under sigmoids, as in the other inversions here; lambda weighs the share of the image, not the
    sum, so that it means the same at any size (the paper's 1e-3 at 32 pixels is about 1 for the share).
What it cannot see
    Encoders trained to hide from it (BadCLIP), triggers that change the whole image or depend on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.detection.inversion import InvertedTrigger, check_enough
from unpoison.errors import ConfigError
from unpoison.runs import Run
from unpoison.types import Embeddings, Images

Encoder = Callable[[Images], Embeddings]
_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class DECREEConfig:
    """The paper's schedule; steps and rates are ours, for small encoders."""

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 0.3
    agreement: float = 0.99
    """Mean pairwise cosine that counts as success."""
    weight: float = 1.0
    """lambda at the start, of the mask's share of the image."""
    weight_factor: float = 5.0
    patience: int = 5
    backdoored: float = 0.1
    """Share of the image under which an encoder is called backdoored (the paper's)."""

    def __post_init__(self) -> None:
        if min(self.steps, self.patience) < 1 or self.batch_size < 2 or not 0 < self.agreement < 1:
            raise ConfigError(
                "expected steps and patience >= 1, batch_size >= 2, agreement in (0, 1).", hint="Try the defaults."
            )
        if min(self.learning_rate, self.weight) <= 0 or self.weight_factor < 1:
            raise ConfigError("expected learning_rate and weight > 0, weight_factor >= 1.", hint="Try the defaults.")


@dataclass(frozen=True, kw_only=True, eq=False)
class DECREEFinding:
    """``trigger.size``: share of the image that the mask covers; ``trigger.success`` and ``agreement``: mean pairwise
    cosine on unseen images, in percent and in [-1, 1]; ``plain``: the same without the trigger."""

    trigger: InvertedTrigger
    agreement: float
    plain: float
    steps: int
    reached: bool


def decree(
    encode: Encoder,
    images: Images,
    config: DECREEConfig | None = None,
    *,
    run: Run,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> DECREEFinding:
    """Steps 1 to 4 on ``images`` [n, 3, h, w] in [0, 1], a quarter of which are kept to measure on.

    ``encode`` gives unit embeddings and lets gradients through. Raises NotEnoughDataError.
    """
    config, begun = config or DECREEConfig(), clock()
    kept = len(images) // 4
    check_enough(kept)
    unseen, used = images[:kept], images[kept:]
    height, width = images.shape[-2:]
    free_mask = torch.full((1, height, width), 0.0, device=images.device, requires_grad=True)
    free = torch.zeros(3, height, width, device=images.device, requires_grad=True)
    optimiser = torch.optim.Adam([free_mask, free], config.learning_rate)
    generator = run.generator("decree")
    weight, hits, misses, taken = config.weight, 0, 0, 0
    best: tuple[Tensor, Tensor] | None = None
    smallest = float("inf")
    for _ in run.progress.track(range(config.steps), total=config.steps, what="DECREE", unit="steps"):
        if seconds is not None and clock() - begun >= seconds:
            break
        rows = torch.randperm(len(used), generator=generator)[: config.batch_size].to(images.device)
        mask, pattern = free_mask.sigmoid(), free.sigmoid()
        cosine = mean_cosine(encode((1 - mask) * used[rows] + mask * pattern))  # (1)
        share = mask.mean()
        if float(cosine.detach()) > config.agreement:
            hits, misses = hits + 1, 0
            if float(share.detach()) < smallest:
                smallest, best = float(share.detach()), (mask.detach().clone(), pattern.detach().clone())
        else:
            hits, misses = 0, misses + 1
        optimiser.zero_grad()
        (-cosine + weight * share).backward(inputs=[free_mask, free])  # (2)
        optimiser.step()
        taken += 1
        if hits >= config.patience:  # (3)
            weight, hits = weight * config.weight_factor, 0
        elif misses >= config.patience:
            weight, misses = weight / config.weight_factor, 0
    mask, pattern = best or (free_mask.detach().sigmoid(), free.detach().sigmoid())
    with torch.no_grad():
        stamped = (1 - mask) * unseen + mask * pattern
        agreement = float(mean_cosine(torch.cat([encode(part) for part in stamped.split(_AT_ONCE)])))
        plain = float(mean_cosine(torch.cat([encode(part) for part in unseen.split(_AT_ONCE)])))
    trigger = InvertedTrigger(
        form="patch", target=-1, mask=mask, pattern=pattern, size=float(mask.mean()), success=100 * agreement
    )  # (4)
    return DECREEFinding(trigger=trigger, agreement=agreement, plain=plain, steps=taken, reached=best is not None)


def mean_cosine(embedded: Embeddings) -> Float[Tensor, ""]:
    """Mean cosine of all pairs of different rows [b, d] of unit length."""
    count = len(embedded)
    return (embedded.sum(dim=0).square().sum() - count) / (count * (count - 1))
