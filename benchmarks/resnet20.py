"""ResNet-20 for CIFAR-10 under the keys of the published clean checkpoint: ``--arch resnet20:resnet20``.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, with shortcuts of kind A: every
other pixel, and zeros for the channels that are new.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(out + x)


class ResNet20(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        for place, (width_in, width, stride) in enumerate(widths, start=1):
            blocks = (Block(width_in, width, stride), Block(width, width, 1), Block(width, width, 1))
            self.add_module(f"layer{place}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        for place in (1, 2, 3):
            x = self.get_submodule(f"layer{place}")(x)
        return self.linear(x.mean(dim=(2, 3)))


def resnet20(num_classes: int) -> nn.Module:
    return ResNet20(num_classes)
