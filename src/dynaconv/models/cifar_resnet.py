"""Small residual networks: the CIFAR ResNets of He et al. with projection shortcuts, and a variant for larger scenes.

Source: "Deep Residual Learning", arXiv 1512.03385, section 4.2; shortcuts and initialisation as in DynConv's code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks

POOLS = ("avg", "max")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; a 1x1 convolution with batch norm as shortcut where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C_out, h, w]."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2: a 3x3 stem, three stages of n basic blocks, global pooling, a linear classifier.

    Args:
        depth: 8, 14, 20, 26, 32, ... (6n + 2).
        num_classes: outputs; in_chans: channels of the pictures.
        width: channels of the first stage (doubled in each later stage); stem_stride: 2 for larger pictures.
        pool: "avg" or "max" (finds a small object in a large scene).
        input_size: (C, H, W) used when a report needs one.

    >>> CifarResNet(8)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        width: int = 16,
        stem_stride: int = 1,
        pool: str = "avg",
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 26, 32, ...), got {depth}")
        _checks.one_of("pool", pool, POOLS)
        _checks.positive("num_classes", num_classes)
        self.pool = pool
        self.num_classes = num_classes
        self.input_size = (in_chans, image_size, image_size)
        self.conv1 = nn.Conv2d(in_chans, width, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward_features(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> last feature map [N, 4 * width, h, w]."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> logits [N, num_classes]."""
        pool = F.adaptive_max_pool2d if self.pool == "max" else F.adaptive_avg_pool2d
        return self.fc(torch.flatten(pool(self.forward_features(x), 1), 1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))
