"""Dy-ResNet, the residual networks of DyNet: half the channels (arXiv 2004.10694, OpenReview SyeZIkrKwS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.models.cifar_resnet import BasicBlock

REPEATS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Bottleneck(nn.Module):
    """1x1, 3x3 (carrying the stride), 1x1 to four times the width; a projection where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out:
            projection = nn.Conv2d(in_channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, 4 * channels, h, w]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class DyResNet(nn.Module):
    """The static skeleton of Dy-ResNet: a ResNet whose four stages have half the channels, behind a stem of 64.

    Args:
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        num_classes: outputs; in_chans: channels of the pictures.
        width: channels of the first stage, doubled in each later one; a ResNet has 64.
    Raises:
        ValueError: another depth.
    Source: OpenReview SyeZIkrKwS, section 3.3.

    >>> DyResNet(18, num_classes=10).eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(self, depth: int, num_classes: int = 1000, in_chans: int = 3, *, width: int = 32) -> None:
        super().__init__()
        if depth not in REPEATS:
            raise ValueError(f"depth must be one of {', '.join(map(str, REPEATS))}, got {depth}")
        _checks.positive("num_classes", num_classes)
        self.input_size = (in_chans, 224, 224)
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        block, expansion = (BasicBlock, 1) if depth < 50 else (Bottleneck, 4)
        channels = 64
        for stage, repeats in enumerate(REPEATS[depth]):
            inner, blocks = width * 2**stage, []
            for i in range(repeats):
                blocks.append(block(channels, inner, 2 if stage and i == 0 else 1))
                channels = expansion * inner
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> last feature map."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> logits [N, num_classes]."""
        return self.fc(torch.flatten(self.avgpool(self.forward_features(x)), 1))
