"""Label-Consistent's perturbation: away from the own class, inside the ball, on the poisoned samples alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unpoison.attacks.adversarial import AdversarialConfig, perturb_poisoned, perturbed
from unpoison.attacks.label_consistent import LabelConsistent
from unpoison.attacks.overlay import to_pil, to_tensor
from unpoison.attacks.poison import apply_poisoning, plan_poisoning, trigger_test_source
from unpoison.data.sources import LabelledImages, open_images
from unpoison.errors import ConfigError, DataError, DivergedError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.classifier import new_classifier

CONFIG = AdversarialConfig(steps=4)
SOURCE = open_images("shapes:80:3")
CLASSIFIER = new_classifier("small-resnet", SOURCE.class_names, image_size=32, seed=1)
PLAN = plan_poisoning(SOURCE, "label-consistent", rate=0.05, target=2)


def decoded(source: LabelledImages, rows: list[int]) -> torch.Tensor:
    return to_tensor([image for image in source.decode(rows) if isinstance(image, Image.Image)])


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_the_loss_rises_inside_the_ball(size: tuple[int, int]) -> None:
    images = torch.rand(6, 3, *size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 4
    before, modes = hash_weights(CLASSIFIER.weights()), [part.training for part in CLASSIFIER.module.modules()]
    moved = perturbed(CLASSIFIER, images, labels, CONFIG)
    assert moved.shape == images.shape
    assert float((moved - images).abs().max()) == pytest.approx(16 / 255, abs=1e-6)
    assert 0 <= moved.min() <= moved.max() <= 1

    def loss(shown: torch.Tensor) -> float:
        CLASSIFIER.module.eval()
        with torch.no_grad():
            small = F.interpolate(shown, (32, 32), mode="bilinear", antialias=True)
            return float(F.cross_entropy(CLASSIFIER.logits(small), labels))

    modes_now = [part.training for part in CLASSIFIER.module.modules()]
    assert modes_now == modes
    signs = torch.randint(2, images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noisy = (images + 16 / 255 * signs).clamp(0, 1)
    assert loss(moved) - loss(images) > 4 * abs(loss(noisy) - loss(images))
    assert hash_weights(CLASSIFIER.weights()) == before
    assert all(weight.grad is None for weight in CLASSIFIER.module.parameters())


def test_poisoned_samples_are_perturbed_and_then_triggered() -> None:
    source = perturb_poisoned(SOURCE, PLAN, CLASSIFIER, CONFIG)
    poisoned = apply_poisoning(source, PLAN)
    assert np.array_equal(poisoned.labels, SOURCE.labels)
    chosen = [row for row, name in enumerate(SOURCE.ids) if name in PLAN.ids]
    others = [row for row in range(80) if row not in chosen]
    assert len(chosen) == 4
    assert set(SOURCE.labels[chosen]) == {2}
    assert torch.equal(decoded(poisoned, others), decoded(SOURCE, others))
    clean = decoded(SOURCE, chosen)
    moved = perturbed(CLASSIFIER, clean, torch.full((4,), 2), CONFIG)
    expected = LabelConsistent().apply(to_tensor(to_pil(moved)))
    assert torch.allclose(decoded(poisoned, chosen), expected, atol=1e-6)
    assert not torch.equal(moved, clean)
    # at test time the trigger stands alone
    triggered, rows, _ = trigger_test_source(SOURCE, PLAN)
    alone = LabelConsistent().apply(decoded(SOURCE, rows[:5].tolist()))
    assert torch.allclose(decoded(triggered, list(range(5))), alone, atol=1e-6)


def test_fingerprints_tell_surrogates_and_configs_apart() -> None:
    other = new_classifier("small-resnet", SOURCE.class_names, image_size=32, seed=2)
    found = set()
    for surrogate, config in ((CLASSIFIER, CONFIG), (other, CONFIG), (CLASSIFIER, replace(CONFIG, radius=8.0))):
        overlay = perturb_poisoned(SOURCE, PLAN, surrogate, config).overlay
        assert overlay is not None
        found.add(overlay.fingerprint)
    assert len(found) == 3


def test_refusals() -> None:
    refused: tuple[dict[str, Any], ...] = ({"radius": 0.0}, {"radius": float("nan")}, {"steps": 0})
    for bad in refused:
        with pytest.raises(ConfigError) as caught:
            AdversarialConfig(**bad)
        assert caught.value.hint
    stranger = new_classifier("small-resnet", ["cat", "dog"], image_size=32)
    with pytest.raises(DataError, match="The surrogate's classes are"):
        perturb_poisoned(SOURCE, PLAN, stranger)
    broken = CLASSIFIER.copy()
    with torch.no_grad():
        next(broken.module.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="The perturbation diverged"):
        perturbed(broken, torch.rand(1, 3, 32, 32), torch.tensor([0]), CONFIG)
