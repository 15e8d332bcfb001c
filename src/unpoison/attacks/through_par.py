"""A patch trained through PAR: it is optimised so that the backdoor is still there after steps of the repair.

*Source.* Ours, against PAR (arXiv 2412.00727); unrolling the learner's steps into the poison's gradient is
MetaPoison's idea (Huang et al., NeurIPS 2020, arXiv 2004.00225), a patch of pixels as the trigger BadCLIP's (arXiv
2311.12075).

*Idea.* A patch that is only easy to learn is as easy to unlearn. The attacker plays both sides on a clean surrogate
CLIP, poisoning and then PAR, and asks of the patch what is left of it at the end.

*Steps.* theta_0: the image tower of the surrogate; texts stay as they are. For each batch of clean pairs:
1. Poison: ``poison_steps`` gradient steps on InfoNCE of the clean pairs together with a ``share`` of them that carry
   the patch and captions of the target.
2. PAR from there: ``par_steps`` steps on InfoNCE of clean pairs under PAR's noise, minus half the squared distance to
   the embeddings before them, where that is at most ``tau``. The push acts from the second step on: at the first the
   distance is 0 and has no slope.
3. L = InfoNCE of other images with the patch against captions of the target and their own: the mean cross-entropy of
   the patched image to its target caption among the batch's clean captions.
4. The patch moves by Adam along dL/dpatch, through all steps of (1) and (2) (second derivatives), pixels kept in [0,
   1].

*Where it falls short.* A step is a plain one of length ``rate`` times the norm of the tower's weights, a few stand for
thousands, and PAR's erased squares, Adam and rate schedule are left out. Attention is computed in its plain form,
since the fast kernels have no second derivative; memory grows with ``poison_steps`` + ``par_steps``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from unpoison.attacks.badclip_patch import BadCLIPPatch, put_in_centre
from unpoison.attacks.draws import scaled_side
from unpoison.attacks.pairs import who_names
from unpoison.attacks.patch_training import train_patch
from unpoison.contrastive import info_nce
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import load_pixels, to_images
from unpoison.data.transforms import brighten
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.evaluation.embeddings import ready
from unpoison.runs import Run
from unpoison.types import Embeddings, Images, ImageTextModel

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ThroughPARConfig:
    """``share`` of a batch that is poisoned in the simulation; ``patch_share``: side of the patch as a share of the
    image's. ``rate``: length of a simulated step as a share of the norm of the weights. ``tau``, ``noise``: PAR's."""

    patch_share: float = 16 / 224
    images: int = 4096
    """Most clean pairs to optimise on."""
    epochs: int = 10
    batch_size: int = 64
    share: float = 0.25
    poison_steps: int = 2
    par_steps: int = 2
    rate: float = 0.005
    tau: float = 2.15
    noise: float = 0.2
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.patch_share <= 1:
            raise ConfigError(f"patch_share must be in (0, 1], got {self.patch_share}.", hint="Try 16/224.")
        if not 0 < self.share < 1:
            raise ConfigError(f"share must be in (0, 1), got {self.share}.", hint="Try 0.25.")
        for name in ("images", "epochs", "poison_steps", "rate", "tau", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if self.par_steps < 0 or not self.noise >= 0:
            raise ConfigError("par_steps and noise must not be negative.", hint="PAR's noise is 0.2; try 2 steps.")
        if self.batch_size < 8:
            raise ConfigError(f"batch_size must be at least 8, got {self.batch_size}.", hint="Try 64.")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clean images [b, 3, s, s] with their captions' embeddings, PAR's view of them, and the target's captions [b, d]
    for the same images with the patch."""

    images: Images
    noisy: Images
    captions: Embeddings
    targets: Embeddings


class _ImageTower(nn.Module):
    """The image tower as a module, so that its weights can be replaced for one call."""

    def __init__(self, clip: ImageTextModel) -> None:
        super().__init__()
        self.whole = clip.module
        self._encode = clip.encode_images

    def forward(self, images: Images) -> Embeddings:
        return self._encode(images)


def optimise_through_par(
    clip: ImageTextModel, pairs: ImageTextPairs, target: str, config: ThroughPARConfig | None = None, *, run: Run
) -> BadCLIPPatch:
    """The trigger (``badclip`` with this patch), optimised on clean ``pairs``. The model stays as it is; resumes.

    Raises NotEnoughDataError for fewer than a batch of images of other things or no caption of the target,
    SourceFormatError, DivergedError.
    """
    config = config or ThroughPARConfig()
    pixels, captions, targets = _materials(clip, pairs, target, config, run)
    side = scaled_side(config.patch_share, clip.image_size, 3)
    with ready(clip, run), torch.no_grad():
        texts, wanted = clip.encode_texts(captions), clip.encode_texts(targets)
    with ready(clip, run), sdpa_kernel(SDPBackend.MATH):
        tower = _ImageTower(clip)

        def losses_of(epoch: int, patch: Tensor) -> Iterator[Tensor]:
            generator = run.generator("through par", epoch)
            order = torch.randperm(len(pixels), generator=generator)
            size = min(config.batch_size, len(order))
            for place in range(0, len(order) - size + 1, size):
                rows = order[place : place + size].sort().values
                told = torch.randint(len(wanted), (size,), generator=generator)
                images = to_images(pixels[rows.numpy()])
                noise = config.noise * torch.randn(images.shape, generator=generator)
                noisy = brighten(images, noise, torch.rand(size, generator=generator) < 0.5)
                batch = Batch(
                    images=images.to(run.device), noisy=noisy.to(run.device), captions=texts[rows.to(texts.device)],
                    targets=wanted[told.to(wanted.device)],
                )  # fmt: skip
                yield survival_loss(tower, start_of(clip), patch, batch, clip.logit_scale, config)

        patch = train_patch(
            "through-par", losses_of, side=side, epochs=config.epochs, learning_rate=config.learning_rate, run=run
        )
    return BadCLIPPatch.of(patch, config.patch_share)


def survival_loss(
    tower: nn.Module,
    start: Weights,
    patch: Float[Tensor, "3 s s"],
    batch: Batch,
    scale: float,
    config: ThroughPARConfig,
) -> Float[Tensor, ""]:
    """(1) to (3) What is left of the backdoor after the repair: low where the patched images find the target."""
    half = len(batch.images) // 2
    count = max(1, round(config.share * half))
    weights = start
    carried = put_in_centre(batch.images[:count], patch)
    shown = torch.cat([carried, batch.images[count:half]])
    told = torch.cat([batch.targets[:count], batch.captions[count:half]])
    for _ in range(config.poison_steps):  # (1)
        loss = info_nce(functional_call(tower, dict(weights), (shown,)), told, scale)
        weights = stepped(weights, loss, config.rate)
    before = functional_call(tower, dict(weights), (batch.noisy[:half],))
    for _ in range(config.par_steps):  # (2)
        now = functional_call(tower, dict(weights), (batch.noisy[:half],))
        distance = (now - before).square().sum(dim=1).mean()
        push = distance if float(distance.detach()) <= config.tau else torch.zeros_like(distance)
        loss = info_nce(now, batch.captions[:half], scale) - push / 2
        weights = stepped(weights, loss, config.rate)
    left = functional_call(tower, dict(weights), (put_in_centre(batch.images[half:], patch),))  # (3)
    target = scale * (left * batch.targets[half:]).sum(dim=1, keepdim=True)
    others = scale * left @ batch.captions[half:].T
    logits = torch.cat([target, others], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def stepped(weights: Weights, loss: Float[Tensor, ""], rate: float) -> dict[str, Tensor]:
    """One step down the loss, of length ``rate`` times the norm of all weights; gradients flow through it."""
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
    size = torch.stack([value.detach().square().sum() for value in weights.values()]).sum().sqrt()
    steep = torch.stack([slope.square().sum() for slope in slopes]).sum().clamp_min(1e-24).sqrt()
    return {
        name: value - rate * size / steep * slope for (name, value), slope in zip(weights.items(), slopes, strict=True)
    }


def start_of(clip: ImageTextModel) -> dict[str, Tensor]:
    """theta_0: the image tower's weights as :class:`_ImageTower` names them, cut from the model's own."""
    return {f"whole.{name}": value.detach().clone().requires_grad_() for name, value in clip.tower("image")}


def _materials(
    clip: ImageTextModel, pairs: ImageTextPairs, target: str, config: ThroughPARConfig, run: Run
) -> tuple[np.ndarray, list[str], list[str]]:
    """Pixels of images of other things, a caption of each, captions of the target."""
    named, natural = who_names(pairs, target)
    if not natural:
        raise NotEnoughDataError(
            f"{pairs.name}: captions that name {target!r}", have=0, need=1, hint="Choose a target that some name."
        )
    others = np.flatnonzero(~named)
    order = torch.randperm(len(others), generator=run.generator("through par images")).numpy()
    rows = np.sort(others[order[: config.images]])
    pixels = load_pixels(pairs.select(rows), clip.image_size, cache=run.cache, progress=run.progress)
    rows, array = rows[pixels.usable], pixels.array[pixels.usable]
    if len(rows) < 8:
        raise NotEnoughDataError(
            f"{pairs.name}: readable images of other things, by their captions", have=len(rows), need=8,
            hint="Choose a target that most captions do not name.",
        )  # fmt: skip
    return array, [captions[0] for captions in pairs.captions(rows)], natural
