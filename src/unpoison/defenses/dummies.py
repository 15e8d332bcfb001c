"""Dummy triggers for a known target, and what a CLIP's image tower makes of images that wear them.

A dummy stands in for a trigger that nobody knows. The least change that works ("quiet") lies near the true one in the
embedding space, a change as strong as its bound allows ("loud") lies beyond it: what holds against both holds between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.data.transforms import crop_at
from unpoison.defenses.shots import Shots, embed
from unpoison.detection.inversion import InversionConfig, InvertedTrigger, Logits, Objective, invert_trigger
from unpoison.models.clip_transformers import half_where_fast
from unpoison.models.logit_scale import usable_scale
from unpoison.runs import Run
from unpoison.types import Embeddings, Images, ImageTextModel

_MIRRORED = 0.5


def quiet(config: InversionConfig) -> InversionConfig:
    """The smallest change that works."""
    return replace(config, keep="smallest")


def loud(config: InversionConfig, epsilon: float, steps: int) -> InversionConfig:
    """A change of all pixels by at most ``epsilon``, whatever its size."""
    return replace(
        config, form="additive", epsilon=epsilon, steps=steps, weight=0.0, weight_factor=1.0, keep="last"
    )  # fmt: skip


def noise(
    clip: ImageTextModel, shots: Shots, classes: Float[Tensor, "k d"], target: int, epsilon: float, *, run: Run
) -> InvertedTrigger:
    """What an inverted trigger is compared with: signs at random, ``epsilon`` large."""
    size = shots.pixels.shape[1]
    signs = torch.randint(2, (3, size, size), generator=run.generator("noise", target, epsilon)) * 2.0 - 1
    dummy = InvertedTrigger(
        form="additive", target=target, mask=torch.ones(1, size, size), pattern=epsilon * signs, size=epsilon,
        success=0.0,
    )  # fmt: skip
    return replace(dummy, success=excess(clip, shots, dummy, classes)[0])


def invert(
    clip: ImageTextModel,
    shots: Shots,
    classes: Float[Tensor, "k d"],
    target: int,
    config: InversionConfig,
    *,
    stream: object,
    objective: Objective | None = None,
    run: Run,
) -> InvertedTrigger:
    """A dummy that sends ``shots`` of other classes to ``target``, by cross-entropy unless ``objective`` is given.

    ``success`` is measured on the shots themselves. ``stream`` names the random draws. Raises NotEnoughDataError.
    """
    images = shots.images(torch.nonzero(shots.labels != target)[:, 0])
    generator = run.generator("dummy", target, stream)
    answers = answers_of(clip, classes)
    return invert_trigger(answers, images, images, target, config, objective=objective, generator=generator)


def answers_of(clip: ImageTextModel, classes: Float[Tensor, "k d"]) -> Logits:
    """s z(x) g: logits of images over ``classes``."""
    scale = usable_scale(clip)
    return lambda images: scale * encode(clip, images) @ classes.T


def encode(clip: ImageTextModel, images: Images) -> Embeddings:
    """z(x) in float32, differentiable by the images; in bfloat16 on the way, where that is fast."""
    with half_where_fast(images.device):
        embedded = clip.encode_images(images)
    return embedded.float()


def contrast(
    shots: Shots,
    plain: Float[Tensor, "b d"],
    clip: ImageTextModel,
    given: Float[Tensor, "k d"],
    target: int,
    *,
    positives: int,
    temperature: float,
    negatives: bool = True,
) -> Objective:
    """InfoNCE over rows of the shots that are not of ``target``, whose plain embeddings are ``plain``.

    Positives: h of the target and up to ``positives`` clean images of it; negatives: the clean images of the batch, the
    own among them, and the own class's h. Without ``negatives`` the positives alone pull.
    """
    others = shots.labels != target
    near_to = torch.cat([given[target][None], plain[~others][:positives]])
    far_from, labels = plain[others], shots.labels[others]

    def objective(images: Images, rows: Int[Tensor, " r"]) -> tuple[Float[Tensor, ""], float]:
        embedded = encode(clip, images)
        near = embedded @ near_to.T / temperature
        loss = -near.logsumexp(dim=1).mean()
        if negatives:
            own = (embedded * given[labels[rows]]).sum(dim=1, keepdim=True)
            far = torch.cat([embedded @ far_from[rows].T, own], dim=1) / temperature
            loss = loss + torch.cat([near, far], dim=1).logsumexp(dim=1).mean()
        said = (embedded.detach() @ given.T).argmax(dim=1)
        return loss, float((said == target).float().mean())

    return objective


@torch.no_grad()
def see(
    clip: ImageTextModel, shots: Shots, dummy: InvertedTrigger | None, *, views: int, shift: int, run: Run
) -> Float[Tensor, "v b d"]:
    """Embeddings of every shot in every view, the first plain, the others shifted and mirrored, with ``dummy`` on.

    ``shift``: largest shift in pixels at 32. The same views for every dummy; in every second one it lies elsewhere.
    """
    size, count = shots.pixels.shape[1], len(shots)
    reach, generator = round(shift * size / 32), run.generator("views")
    seen = []
    for view in range(views):
        flipped = torch.rand(count, generator=generator) < _MIRRORED
        shifts = torch.randint(2 * reach + 1, (2, count), generator=generator)
        place = torch.randint(size, (2,), generator=generator).tolist()
        worn = dummy if dummy is None or view % 2 == 0 else moved(dummy, place)
        parts = []
        for part in shots.batches():
            images, rows = shots.images(part), part.cpu()
            if view:
                images = torch.where(flipped[rows].to(images.device)[:, None, None, None], images.flip(-1), images)
                images = crop_at(images, shifts[0][rows], shifts[1][rows], reach) if reach else images
            images = images if worn is None else worn.apply(images)
            parts.append(clip.encode_images(images).float())
        seen.append(torch.cat(parts))
    return torch.stack(seen)


def moved(dummy: InvertedTrigger, place: Sequence[int]) -> InvertedTrigger:
    """The dummy moved down and to the right by so many pixels, around the edges."""
    mask, pattern = (part.roll(tuple(place), dims=(1, 2)) for part in (dummy.mask, dummy.pattern))
    return replace(dummy, mask=mask, pattern=pattern)


def excess(
    clip: ImageTextModel,
    shots: Shots,
    dummy: InvertedTrigger,
    classes: Float[Tensor, "k d"],
    *,
    seen: Float[Tensor, "b d"] | None = None,
) -> tuple[float, float]:
    """Percent of shots of other classes that ``dummy`` sends to its target, and by how much more than go anyway.

    ``seen``: embeddings of the plain shots, where they are known already.
    """
    rows = torch.nonzero(shots.labels != dummy.target)[:, 0]
    others = shots.of(rows)

    def reached(embedded: Embeddings) -> float:
        return 100 * float(((embedded @ classes.T).argmax(dim=1) == dummy.target).float().mean())

    success = reached(embed(clip, others, dummy.apply))
    return success, max(0.0, success - reached(embed(clip, others) if seen is None else seen[rows]))
