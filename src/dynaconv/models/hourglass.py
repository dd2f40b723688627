"""Stacked hourglass of inverted residual blocks, for keypoints as heat-maps.

Sources: "Stacked Hourglass Networks for Human Pose Estimation", arXiv 1603.06937; with inverted residuals as in
DynConv's pose experiments, arXiv 1912.03203, section 4.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks

EXPANSION = 6


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection, each with batch norm; x is added where shapes agree.

    >>> InvertedResidual(8, 8)(torch.zeros(1, 8, 6, 5)).shape
    torch.Size([1, 8, 6, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int = EXPANSION) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv1, self.bn1 = nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU6(inplace=True)
        self.shortcut = in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C_out, H, W]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return x + y if self.shortcut else y


class Hourglass(nn.Module):
    """Down to 1 / 2^depth of the grid and up again; three blocks a level, one more at the bottom.

    Args:
        channels: of every block. depth: levels, at least 1.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        _checks.count("depth", depth)
        self.up, self.down = InvertedResidual(channels, channels), InvertedResidual(channels, channels)
        deeper = depth > 1
        self.inner = Hourglass(channels, depth - 1) if deeper else InvertedResidual(channels, channels)
        self.back = InvertedResidual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> the same shape."""
        low = self.back(self.inner(self.down(F.max_pool2d(x, 2))))
        return self.up(x) + F.interpolate(low, size=x.shape[2:], mode="nearest")


class HourglassNet(nn.Module):
    """Heat-maps of keypoints at a quarter of the picture's resolution, one set a stack.

    Args:
        num_classes: keypoints. in_chans: channels of the pictures.
        stacks: hourglasses in a row, each but the last feeding its heat-maps back.
        width: channels of the hourglasses (a multiple of 4). depth: levels of each.
        image_size: side of the pictures, used when a report needs one; 4 * 2^depth must divide it.

    >>> HourglassNet(3, stacks=2, width=8, depth=2, image_size=32)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 2, 3, 8, 8])
    """

    def __init__(
        self,
        num_classes: int = 16,
        in_chans: int = 3,
        *,
        stacks: int = 4,
        width: int = 96,
        depth: int = 4,
        image_size: int = 256,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("stacks", stacks), ("depth", depth)):
            _checks.count(name, value)
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, got {width}")
        if image_size % (4 * 2**depth):
            raise ValueError(
                f"image_size must be a multiple of {4 * 2**depth} for depth {depth}, got {image_size}; "
                "use a smaller depth or another size"
            )
        self.num_classes, self.input_size = num_classes, (in_chans, image_size, image_size)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width // 4, 7, 2, 3), nn.BatchNorm2d(width // 4), nn.ReLU(inplace=True)
        )
        self.enter = InvertedResidual(width // 4, width // 2)
        self.widen = nn.Sequential(InvertedResidual(width // 2, width), InvertedResidual(width, width))
        self.hourglasses = nn.ModuleList(Hourglass(width, depth) for _ in range(stacks))
        self.blocks = nn.ModuleList(InvertedResidual(width, width) for _ in range(stacks))
        self.features = nn.ModuleList(_features(width) for _ in range(stacks))
        self.scores = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for _ in range(stacks))
        self.features_back = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(stacks - 1))
        self.scores_back = nn.ModuleList(nn.Conv2d(num_classes, width, 1) for _ in range(stacks - 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> heat-maps [N, stacks, keypoints, H / 4, W / 4]; the last stack's are the answer."""
        x = self.widen(F.max_pool2d(self.enter(self.stem(x)), 2))
        maps = []
        for i, hourglass in enumerate(self.hourglasses):
            y = self.features[i](self.blocks[i](hourglass(x)))
            maps.append(self.scores[i](y))
            if i < len(self.scores_back):
                x = x + self.features_back[i](y) + self.scores_back[i](maps[-1])
        return torch.stack(maps, 1)


def _features(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
