"""Dy-shuffle, DyNet's ShuffleNetV2 (arXiv 2004.10694, OpenReview SyeZIkrKwS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.models.dynamic.widths import SHUFFLENET_V2_WIDTHS, round_up

REPEATS = (4, 8, 4)
SHUFFLE_GROUPS = 4


def _conv_norm(i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(o)]


def _right(i: int, o: int, stride: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        *_conv_norm(i, o),
        nn.ReLU(inplace=True),
        *_conv_norm(o, o, 3, stride, groups),
        *_conv_norm(o, o),
        nn.ReLU(inplace=True),
    )


class DyShuffleUnit(nn.Module):
    """A unit of Dy-shuffle; its right branch `branch2` is the dynamic one.

    Stride 1: three quarters of the channels pass, one quarter goes through 1x1, 3x3 (two channels a group), 1x1.
    Stride 2: ShuffleNetV2's unit, two branches of half the output each, depthwise 3x3. Channels are shuffled in four
    groups. Stride 2 and the shuffle are our reading, the paper does not say.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.passing = 0 if stride > 1 else out_channels * 3 // 4
        half, quarter = out_channels // 2, out_channels // 4
        if stride > 1:
            left = [
                *_conv_norm(in_channels, in_channels, 3, stride, in_channels),
                *_conv_norm(in_channels, half),
            ]
            self.branch1 = nn.Sequential(*left, nn.ReLU(inplace=True))
            self.branch2 = _right(in_channels, half, stride, half)
        else:
            self.branch2 = _right(quarter, quarter, 1, quarter // 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C_out, h, w]."""
        if self.passing:
            left, right = x[:, : self.passing], x[:, self.passing :]
        else:
            left, right = self.branch1(x), x
        y = torch.cat([left, self.branch2(right)], 1)
        return y.unflatten(1, (SHUFFLE_GROUPS, -1)).transpose(1, 2).flatten(1, 2)


class DyShuffleNetV2(nn.Module):
    """The static skeleton of Dy-shuffle: ShuffleNetV2 whose right branches are half as wide.

    Args:
        num_classes: outputs; in_chans: channels of the pictures.
        width: 0.5, 1, 1.5 or 2, ShuffleNetV2's; stage widths go up to a multiple of 8 (our reading).
    Raises:
        ValueError: another width.
    Source: OpenReview SyeZIkrKwS, section 3.3.

    >>> DyShuffleNetV2(num_classes=10).eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, *, width: float = 1.0) -> None:
        super().__init__()
        _checks.positive("num_classes", num_classes)
        stages = SHUFFLENET_V2_WIDTHS.get(round(100 * width))
        if stages is None:
            known = ", ".join(f"{w / 100:g}" for w in SHUFFLENET_V2_WIDTHS)
            raise ValueError(f"width must be one of ShuffleNetV2's: {known}, got {width}")
        self.input_size = (in_chans, 224, 224)
        self.conv1 = nn.Sequential(*_conv_norm(in_chans, 24, 3, 2), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 24
        for number, (base, repeats) in enumerate(zip(stages, REPEATS, strict=True), start=2):
            out = round_up(base, 8)
            units = [
                DyShuffleUnit(channels if i == 0 else out, out, 2 if i == 0 else 1) for i in range(repeats)
            ]
            self.add_module(f"stage{number}", nn.Sequential(*units))
            channels = out
        features = 2048 if width == 2 else 1024
        self.conv5 = nn.Sequential(*_conv_norm(channels, features), nn.ReLU(inplace=True))
        self.fc = nn.Linear(features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> last feature map."""
        x = self.maxpool(self.conv1(x))
        return self.conv5(self.stage4(self.stage3(self.stage2(x))))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> logits [N, num_classes]."""
        return self.fc(self.forward_features(x).mean((2, 3)))
