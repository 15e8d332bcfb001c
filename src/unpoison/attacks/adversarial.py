"""The adversarial half of Label-Consistent: poisoned samples pushed away from their own class.

*Paper.* Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019 (arXiv 1912.02771): before the trigger, each
poisoned sample is perturbed against a classifier trained on clean data (projected gradient descent, Madry et al., 2018,
in the l_inf ball), so that what is left of the class in it teaches little.

*Steps.*
1. x_0 = x; x_{i+1} = clip to [0, 1] and to the ball around x of x_i + step sign(grad L), L the cross-entropy of the
   sample's own label.
2. The result is rounded to 8 bits; the trigger comes after.

*Where we differ.* Radius 16/255 is one of the paper's; 50 steps of 2.5 radius / 50 from the image itself are ours. An
image of another size than the surrogate's is scaled on its way in (bilinear), so that the perturbation has its own
size. Perturbed lazily, as samples are decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.overlay import to_pil, to_tensor
from unpoison.data.encoded import Picture
from unpoison.data.sources import LabelledImages
from unpoison.errors import ConfigError, DataError, DivergedError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.image_classifier import evaluation_mode
from unpoison.results import SkippedRow
from unpoison.types import Classifier, Images, Labels

_PIXELS = 128 * 32 * 32  # pixels perturbed at once


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """``radius`` of the l_inf ball in 8-bit grey levels, in (0, 255]. ``steps``: 1 or more."""

    radius: float = 16.0
    steps: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.radius <= 255:
            raise ConfigError(f"radius must be in (0, 255], got {self.radius}.", hint="The paper's are 8, 16 and 32.")
        if self.steps < 1:
            raise ConfigError(f"steps must be 1 or more, got {self.steps}.", hint="Try 50.")


def perturb_poisoned(
    source: LabelledImages, poisoning: Poisoning, surrogate: Classifier, config: AdversarialConfig | None = None
) -> LabelledImages:
    """``source`` with the samples of ``poisoning`` perturbed as they are decoded; apply the poisoning to the result.

    ``surrogate``: a classifier of the same classes, trained on clean data; it is left as it is. Raises DataError when
    its classes are others.
    """
    if tuple(surrogate.class_names) != tuple(source.class_names):
        raise DataError(
            f"The surrogate's classes are {list(surrogate.class_names)}, those of {source.name} are "
            f"{list(source.class_names)}.",
            hint="Give a surrogate trained on these classes, in their order.",
        )
    labels = dict(zip(poisoning.ids, poisoning.original_labels, strict=True))
    overlay = AdversarialOverlay(surrogate, labels, config or AdversarialConfig())
    return source.with_labels(source.labels, overlay)


class AdversarialOverlay:
    """Perturbs decoded images whose id is in ``labels``, away from that label."""

    def __init__(self, surrogate: Classifier, labels: dict[str, int], config: AdversarialConfig) -> None:
        self._surrogate = surrogate
        self._labels = labels
        self._config = config
        key = (hash_weights(surrogate.weights()), surrogate.image_size, sorted(labels.items()), config)
        self.fingerprint = hashlib.blake2b(repr(key).encode(errors="surrogatepass"), digest_size=16).hexdigest()

    def __call__(self, ids: Sequence[str], images: list[Picture]) -> list[Picture]:
        """Images of one size together (in chunks); skipped rows pass through."""
        result = list(images)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(result):
            if not isinstance(image, SkippedRow) and ids[index] in self._labels:
                groups.setdefault(image.size, []).append(index)
        for size, members in groups.items():
            step = max(1, _PIXELS // (size[0] * size[1]))
            for start in range(0, len(members), step):
                part = members[start : start + step]
                batch = to_tensor([image for row in part if not isinstance(image := result[row], SkippedRow)])
                labels = torch.tensor([self._labels[ids[row]] for row in part])
                for row, image in zip(
                    part, to_pil(perturbed(self._surrogate, batch, labels, self._config)), strict=True
                ):
                    result[row] = image
        return result


def perturbed(classifier: Classifier, images: Images, labels: Labels, config: AdversarialConfig) -> Images:
    """(1) Images [b, 3, h, w] in [0, 1], each at most ``radius``/255 away from its own. Raises DivergedError."""
    reference = next(classifier.module.parameters())
    clean, wanted = images.to(reference), labels.to(reference.device)
    size, radius = classifier.image_size, config.radius / 255
    moved = clean.clone()
    with evaluation_mode(classifier.module), torch.enable_grad():
        for step in range(config.steps):
            moved = moved.detach().requires_grad_()
            shown = moved
            if tuple(moved.shape[-2:]) != (size, size):
                shown = F.interpolate(moved, (size, size), mode="bilinear", antialias=True)
            loss = F.cross_entropy(classifier.logits(shown), wanted, reduction="sum")
            if not torch.isfinite(loss):
                raise DivergedError("The perturbation", step=step, loss=float(loss.detach()))
            (slope,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + 2.5 * radius / config.steps * slope.sign()
            moved = torch.minimum(torch.maximum(moved, clean - radius), clean + radius).clamp(0, 1)
    return moved.detach().to(images)
