"""The reference networks for 32 px images, by the name that ``--arch`` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """bn-relu-conv3x3(stride)-bn-relu-conv3x3; a 1x1 convolution of the activated input where shapes change.

    Source: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016, figure 4e.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        # No module at all for the identity: published checkpoints have keys for the convolution only.
        self.shortcut = (
            nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False))
            if stride != 1 or width_in != width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(active)
        return residual + self.conv2(F.relu(self.bn2(self.conv1(active))))


class PreActResNet18(nn.Module):
    """The CIFAR variant in common use, under its usual keys: 11.17 M parameters for 10 classes, no final bn-relu."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(64, 64, stride=1, depth=2)
        self.layer2 = _stage(64, 128, stride=2, depth=2)
        self.layer3 = _stage(128, 256, stride=2, depth=2)
        self.layer4 = _stage(256, 512, stride=2, depth=2)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(x.mean(dim=(2, 3)))


class SmallResNet(nn.Module):
    """Made for two cores: one pre-activation block a stage, 0.31 M parameters for 10 classes."""

    def __init__(
        self, num_classes: int, *, widths: Sequence[int] = (32, 64, 128), strides: Sequence[int] = (2, 2, 2)
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        inputs = (widths[0], *widths[:-1])
        self.blocks = nn.Sequential(*(PreActBlock(*shape) for shape in zip(inputs, widths, strides, strict=True)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.relu(self.norm(self.blocks(self.stem(images)))).mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """bn-relu-conv3x3(stride)-bn-relu-conv3x3; where widths change, the activated input goes through a 1x1 too."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        residual = x if self.convShortcut is None else self.convShortcut(active)
        return residual + self.conv2(F.relu(self.bn2(self.conv1(active))))


class _WideStage(nn.Module):
    def __init__(self, width_in: int, width: int, *, stride: int, depth: int) -> None:
        super().__init__()
        rest = (WideBlock(width, width, 1) for _ in range(depth - 1))
        self.layer = nn.Sequential(WideBlock(width_in, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet16(nn.Module):
    """WRN-16-1 under its usual keys (conv1, block1 to block3, bn1, fc): 0.18 M parameters for 10 classes.

    Source: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016. Published victims of ABL and NAD have it.
    """

    def __init__(self, num_classes: int, *, widen: int = 1) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = _WideStage(widths[0], widths[1], stride=1, depth=2)
        self.block2 = _WideStage(widths[1], widths[2], stride=2, depth=2)
        self.block3 = _WideStage(widths[2], widths[3], stride=2, depth=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))


def _stage(width_in: int, width: int, *, stride: int, depth: int) -> nn.Sequential:
    rest = (PreActBlock(width, width, 1) for _ in range(depth - 1))
    return nn.Sequential(PreActBlock(width_in, width, stride), *rest)


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "small-resnet": SmallResNet,
    "preact-resnet-18": PreActResNet18,
    "wrn-16-1": WideResNet16,
}


def build_network(architecture: str, num_classes: int, *, seed: int) -> nn.Module:
    """A newly drawn network of :data:`ARCHITECTURES`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture](num_classes)
