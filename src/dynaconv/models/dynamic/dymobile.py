"""Dy-mobile and Fix-mobile, the mobile networks of DyNet (arXiv 2004.10694, OpenReview SyeZIkrKwS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.models.dynamic.widths import MOBILENET_V2_ROWS, make_divisible, round_up

GROUP_SIZE = 6


def _conv_norm(
    i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, nn.ReLU6(inplace=True)) if activation else nn.Sequential(*layers)


class DyMobileBlock(nn.Module):
    """1x1, 3x3 in groups of six channels, 1x1, all at the output's width; a residual where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        groups = out_channels // GROUP_SIZE
        self.first = _conv_norm(in_channels, out_channels)
        self.spatial = _conv_norm(out_channels, out_channels, 3, stride, groups)
        self.last = _conv_norm(out_channels, out_channels, activation=False)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C_out, h, w]."""
        y = self.last(self.spatial(self.first(x)))
        return x + y if self.residual else y


class DyMobile(nn.Module):
    """The static skeleton of Dy-mobile, which trained as it is is Fix-mobile: MobileNetV2's rows without expansion.

    Widths are MobileNetV2's, rounded up to a multiple of six (18, 24, 36, 66, 96, 162, 324 at width 1); stem and head
    are not. ReLU6 after the first two convolutions of a block is our reading, the paper does not say.

    Args:
        num_classes: outputs; in_chans: channels of the pictures.
        width: multiplier > 0; the head has 1280 channels up to width 1.
        dropout: before the classifier.
    Source: OpenReview SyeZIkrKwS, section 3.3 and table 1.

    >>> DyMobile(num_classes=10).eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, *, width: float = 1.0, dropout: float = 0.2
    ) -> None:
        super().__init__()
        _checks.positive("width", width)
        _checks.positive("num_classes", num_classes)
        self.input_size = (in_chans, 224, 224)
        channels = make_divisible(32 * width)
        self.stem = _conv_norm(in_chans, channels, 3, 2)
        blocks = []
        for _, base, repeats, stride in MOBILENET_V2_ROWS:
            out = round_up(make_divisible(base * width), GROUP_SIZE)
            for i in range(repeats):
                blocks.append(DyMobileBlock(channels, out, stride if i == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        features = make_divisible(1280 * max(1.0, width))
        self.head = _conv_norm(channels, features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> last feature map [N, 1280, h, w]."""
        return self.head(self.blocks(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> logits [N, num_classes]."""
        return self.fc(self.dropout(torch.flatten(self.pool(self.forward_features(x)), 1)))


def initialise(model: nn.Module) -> None:
    """Kaiming (fan out) for convolutions, N(0, 0.01) for the classifier, as torchvision's MobileNetV2."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
