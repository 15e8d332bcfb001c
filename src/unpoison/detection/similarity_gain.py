"""Similarity gain: overfit a copy of the suspect on the pairs that match least, and see which it learns at once.

Paper
    Stage 1 of Liang et al., "Unlearning Backdoor Threats", arXiv 2409.19526. No code is public.
Idea
    A pair that does not match is hard to learn, unless a shortcut is there already: a trigger's.
Needs
    The suspicious CLIP and its training pairs; a first suspicion of each, best its similarity under a reference CLIP.
Steps
    1. s0: cosine of image and caption under the reference. UBT without one gives minus DAO's score in its place: the
       suspect's own cosine is what the poison has raised.
    2. D_w: the lowest tenth of s0.
    3. Overfit a copy on D_w: InfoNCE, AdamW, ten times the fine-tuning rate, batches of 128, 3 epochs, images as they
       are; stop when the mean cosine on D_w gains less than 0.5 percent in an epoch.
    4. Score: rank of the gain s1 - s0 of every pair, both under the suspect, ties by s1.
Where we differ, and what the paper leaves open
    All numbers are ours: the paper's are not public. Both cosines of the gain are the suspect's own, before and after,
    so that the difference is what overfitting did.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from unpoison.clip_training import choose_weights, trainable
from unpoison.contrastive import info_nce
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels, to_images
from unpoison.detection.ranks import rank_normalise
from unpoison.errors import ConfigError, DivergedError, NotEnoughDataError
from unpoison.evaluation.embeddings import ready
from unpoison.models.logit_scale import usable_scale
from unpoison.runs import Run
from unpoison.schedules import decay_groups, scaled_rate
from unpoison.types import ImageTextModel

FEWEST = 16
_AT_ONCE = 256

Scores = Float[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class OverfitConfig:
    """All numbers are ours; the rate is for models of about 100 M parameters and is scaled for smaller ones."""

    share: float = 0.1
    """D_w's share of the pairs."""
    learning_rate: float = 1e-4
    """Ten times what such a CLIP is fine-tuned with."""
    batch_size: int = 128
    epochs: int = 3
    least_gain: float = 0.005
    """Relative gain of the mean cosine on D_w in an epoch under which training stops."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or min(self.batch_size - 1, self.epochs) < 1 or not self.learning_rate > 0:
            raise ConfigError(
                "expected share in (0, 1], batch_size >= 2, epochs >= 1 and learning_rate > 0.",
                hint="Try the defaults.",
            )


def similarity_gain(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    pixels: Pixels,
    rows: Int[np.ndarray, " k"],
    cosines: Float[np.ndarray, " k"],
    config: OverfitConfig | None = None,
    *,
    run: Run,
) -> Float[np.ndarray, " k"]:
    """Ranks in (0, 1] of the gain for ``rows`` of ``pairs``; ``cosines`` are their s0, higher is less suspicious.

    The model stays as it is. Raises NotEnoughDataError for fewer than 16 pairs in D_w, DivergedError.
    """
    config = config or OverfitConfig()
    texts = [captions[0] for captions in pairs.captions(rows)]
    weak = np.sort(np.argsort(cosines, kind="stable")[: round(config.share * len(rows))])  # (2)
    if len(weak) < FEWEST:
        raise NotEnoughDataError(
            f"weakly similar pairs of {pairs.name}", have=len(weak), need=FEWEST, hint="Give more pairs."
        )
    before = _cosines(clip, pixels, rows, texts, np.arange(len(rows)), run)
    parameters = sum(value.numel() for value in clip.module.parameters())
    rate = scaled_rate(config.learning_rate, parameters)
    size, scale = min(config.batch_size, len(weak)), usable_scale(clip)
    with trainable(clip, run) as copy:  # (3)
        weights = [*copy.tower("image"), *copy.tower("text")]
        choose_weights(copy, weights)
        optimiser = torch.optim.AdamW(decay_groups(weights, 0.0), rate)
        fits = float(before[weak].mean())
        steps = range(config.epochs * (len(weak) // size))
        for step in run.progress.track(steps, total=len(steps) * size, what="overfitting", weight=size, unit="pairs"):
            epoch, place = divmod(step, len(weak) // size)
            order = torch.randperm(len(weak), generator=run.generator("overfit", epoch)).numpy()
            chosen = np.sort(weak[order[place * size : (place + 1) * size]])
            images = to_images(pixels.array[rows[chosen]]).to(run.device)
            with run.accelerator.autocast():
                embedded = copy.encode_images(images), copy.encode_texts([texts[row] for row in chosen])
            loss = info_nce(embedded[0].float(), embedded[1].float(), scale)
            if not torch.isfinite(loss):
                raise DivergedError("overfitting", step=step, loss=float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if place == len(weak) // size - 1:
                now = float(_cosines(copy, pixels, rows, texts, weak, run).mean())
                if now - fits < config.least_gain * abs(fits):
                    break
                fits = now
        after = _cosines(copy, pixels, rows, texts, np.arange(len(rows)), run)
    return ranked_gain(before, after)  # (4)


def ranked_gain(before: Scores, after: Scores) -> Scores:
    """Ranks in (0, 1] of ``after - before``, ties by ``after``."""
    _, places = np.unique(np.column_stack([after - before, after]), axis=0, return_inverse=True)
    return rank_normalise(places.astype(np.float64))


def _cosines(
    clip: ImageTextModel, pixels: Pixels, rows: np.ndarray, texts: list[str], chosen: np.ndarray, run: Run
) -> Scores:
    found = np.empty(len(chosen))
    with torch.no_grad(), ready(clip, run):
        for start in range(0, len(chosen), _AT_ONCE):
            part = chosen[start : start + _AT_ONCE]
            different = {text: place for place, text in enumerate(dict.fromkeys(texts[row] for row in part))}
            embedded = clip.encode_texts(list(different))
            own = embedded[[different[texts[row]] for row in part]]
            images = clip.encode_images(to_images(pixels.array[rows[part]]).to(run.device))
            found[start : start + len(part)] = (images * own).sum(dim=1).float().cpu().numpy()
    return found
