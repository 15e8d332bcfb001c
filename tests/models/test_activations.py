"""Activations are found in any network, cut off where asked, and saved with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from unpoison.attacks.poison import plan_poisoning
from unpoison.data.sources import open_images
from unpoison.errors import ModelError, UnsupportedModelError
from unpoison.evaluation.classifier import evaluate_classifier
from unpoison.models.activations import activations, channel_axis, channel_rows, clipped
from unpoison.models.checkpoints import read_weights, save_weights
from unpoison.models.classifier import BOUNDS_FILE, ImageClassifier, load_classifier, new_classifier, save_classifier
from unpoison.models.networks import ARCHITECTURES
from unpoison.runs import Run

NAMES = ("cat", "dog", "owl")


class Mixed(nn.Module):
    """Modules, functions and methods, in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.gelu = nn.GELU()
        self.middle = nn.Linear(4, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.conv(images))
        x = F.leaky_relu(x).relu()
        x = self.gelu(self.middle(x.mean(dim=(2, 3))))
        return self.fc(F.silu(x))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=16,
        id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)},
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    config = ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=4,
        id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)},
    )  # fmt: skip
    return ConvNextForImageClassification(config).eval()


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (Mixed(), [4, 4, 4, 6, 6]),
        (ARCHITECTURES["small-resnet"](3), [32, 32, 32, 64, 64, 128, 128]),
        (ARCHITECTURES["wrn-16-1"](3), [16] * 5 + [32] * 4 + [64] * 4),
        (vit(), [24, 24]),
        (convnext(), [32, 48]),
    ],
    ids=["mixed", "small-resnet", "wrn", "vit", "convnext"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_every_activation_is_met_and_cut(network: nn.Module, channels: list[int], count: int) -> None:
    network.eval()
    found = activations(lambda: network(images(count)))
    assert [output.shape[channel_axis(output)] for output in found] == channels
    bounds = [channel_rows(output).quantile(0.5, dim=0).detach() for output in found]
    with clipped(bounds):
        seen = activations(lambda: network(images(count)))
    for site, (output, bound) in enumerate(zip(seen, bounds, strict=True)):
        assert (channel_rows(output) <= bound + 1e-6).all(), site
    first = torch.minimum(channel_rows(found[0]), bounds[0])
    torch.testing.assert_close(channel_rows(seen[0]), first)
    # and nothing of it stays behind
    torch.testing.assert_close(activations(lambda: network(images(count)))[-1], found[-1])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_gradients_reach_bounds_and_weights() -> None:
    network = Mixed()
    bounds = [torch.full((count,), 0.01, requires_grad=True) for count in (4, 4, 4, 6, 6)]
    with clipped(bounds):
        network(images()).sum().backward()
    assert all(bound.grad is not None for bound in bounds)
    assert network.fc.weight.grad is not None


def test_bounds_of_another_network_are_refused() -> None:
    fitting = [torch.ones(count) for count in (4, 4, 4, 6, 6)]
    with clipped(fitting):
        Mixed()(images())
    for bounds in ([torch.ones(4)], [torch.ones(5)] * 5, [*fitting, torch.ones(6)]):
        with pytest.raises(UnsupportedModelError, match="do not fit"), clipped(bounds):
            Mixed()(images())


def bounded(classifier: ImageClassifier) -> ImageClassifier:
    found = activations(lambda: classifier.logits(images()))
    return classifier.bounded([channel_rows(output).amax(0).detach() / 2 for output in found])


def test_a_clipped_model_loads_as_it_was(tmp_path: Path) -> None:
    plain = new_classifier("small-resnet", NAMES)
    plain.module.eval()
    model = bounded(plain)
    assert model.module is plain.module
    assert not torch.allclose(model.logits(images()), plain.logits(images()))
    save_classifier(model, tmp_path / "out")
    stored = read_weights(tmp_path / "out" / "model.safetensors")
    assert set(stored) - set(plain.weights()) == {f"activation_bounds.{site:03d}" for site in range(7)}
    loaded = load_classifier(tmp_path / "out")
    torch.testing.assert_close(loaded.logits(images()), model.logits(images()))
    copied = model.copy()
    copied.bounds[0].zero_()
    assert model.bounds[0].any()
    assert model.fresh(0).bounds == ()
    stored["activation_bounds.000"] = torch.zeros(2, 2)
    save_weights(tmp_path / "bad.safetensors", stored)
    with pytest.raises(ModelError, match="vectors"):
        load_classifier(tmp_path / "bad.safetensors", arch="small-resnet", class_names=NAMES)


def test_a_transformers_model_keeps_its_bounds_beside_it(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    vit().save_pretrained(tmp_path / "vit")  # pyright: ignore[reportCallIssue]
    plain = load_classifier(tmp_path / "vit")
    model = bounded(plain)
    save_classifier(model, tmp_path / "out")
    loaded = load_classifier(tmp_path / "out")
    torch.testing.assert_close(loaded.logits(images()), model.logits(images()))
    assert (tmp_path / "out" / BOUNDS_FILE).exists()
    again = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    plain.module.eval()
    torch.testing.assert_close(again.state_dict(), plain.module.state_dict())
    save_classifier(loaded, tmp_path / "again")
    torch.testing.assert_close(load_classifier(tmp_path / "again").logits(images()), model.logits(images()))


class Excited(nn.Module):
    """A map that a linear layer on vectors weighs, and one whose channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.mix = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        x = F.relu(x * self.gate(x.mean(dim=(2, 3)))[:, :, None, None])
        return F.gelu(self.mix(x.movedim(1, -1))).mean(dim=(1, 2))


def test_channels_are_where_the_network_has_them() -> None:
    found = activations(lambda: Excited()(images()))
    assert [tuple(output.shape) for output in found] == [(2, 4, 30, 30), (2, 6, 30, 30)]
    network = Excited()
    with clipped([torch.full((4,), torch.inf), torch.tensor([0.0] + [torch.inf] * 5)]):
        cut = network(images())
    assert (cut[:, 0] <= 0).all()
    torch.testing.assert_close(cut[:, 1:], network(images())[:, 1:])


class InPlace(nn.Module):
    """Activations of which only what they leave in place is used, by module, method and function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images) + 1
        self.relu(x)
        x = x + 0.5
        x.relu_()
        x = x + 0.5
        F.leaky_relu(x, 0.1, True)
        return self.fc(x.mean(dim=(2, 3)))


def test_what_is_left_in_place_is_cut_too() -> None:
    network = InPlace()
    bounds = [torch.full((4,), value, requires_grad=True) for value in (0.1, 0.2, 0.3)]
    with clipped(bounds):
        logits = network(images())
    torch.testing.assert_close(logits, network.fc(torch.full((2, 4), 0.3)))
    logits.sum().backward()
    assert bounds[-1].grad is not None
    assert bounds[-1].grad.any()
    assert network.fc.weight.grad is not None
    with torch.inference_mode(), clipped(bounds):
        torch.testing.assert_close(network(images()), logits)


class Added(nn.Module):
    """A shortcut that is added in place of the activation's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.conv(images))
        x += 100
        return self.fc(x.mean(dim=(2, 3)))


def test_activations_are_seen_as_they_were_given() -> None:
    network = Added()
    with torch.no_grad():
        (found,) = activations(lambda: network(images()))
    assert found.amax() < 50
    with pytest.raises(UnsupportedModelError, match="in place"):  # a gradient would reach the sum
        activations(lambda: network(images()))


def test_the_published_victim_is_backdoored(shared: Path) -> None:
    """As it was made: images in [0, 1] without further normalisation, a checkered corner, target 0."""
    test = open_images(f"{shared}/data/cifar10/test.parquet[0:500]")
    victim = load_classifier(
        shared / "models/wrn16_1_cifar10_grid_target0.pth", arch="wrn-16-1", class_names=test.class_names,
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    assert len(activations(lambda: victim.logits(images()))) == 13
    assert victim.head().in_features == 64
    poisoning = plan_poisoning(test, "badnet", rate=0.1, target=0)
    found = evaluate_classifier(victim, test, poisoning=poisoning, run=Run(accelerator=Accelerator(cpu=True)))
    assert found.asr is not None
    assert found.asr.value > 95
    assert found.asr_floor is not None
    assert found.asr_floor.value < 10
    assert found.c_acc.value == pytest.approx(74, abs=5)
