"""The ShuffleNetV2 that WeightNet was published on (arXiv 2007.11823, github.com/megvii-model/WeightNet)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.models.dynamic.widths import WEIGHTNET_WIDTHS

REPEATS = (4, 8, 4)


def _conv_norm(i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(o)]


class WeightShuffleUnit(nn.Module):
    """1x1, depthwise 3x3, 1x1 on every second channel, or on all of them beside a left branch that keeps their number.

    The right branch is half as wide as the output inside, and ends with what the left one leaves of it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        left = in_channels if stride > 1 else in_channels // 2
        inner, right = out_channels // 2, out_channels - left
        if stride > 1:
            kept = [*_conv_norm(left, left, 3, stride, left), *_conv_norm(left, left)]
            self.branch1 = nn.Sequential(*kept, nn.ReLU(inplace=True))
        self.branch2 = nn.Sequential(
            *_conv_norm(left, inner),
            nn.ReLU(inplace=True),
            *_conv_norm(inner, inner, 3, stride, inner),
            *_conv_norm(inner, right),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C_out, h, w]."""
        left, right = (x[:, ::2], x[:, 1::2]) if self.stride == 1 else (self.branch1(x), x)
        return torch.cat([left, self.branch2(right)], 1)


class WeightShuffleNetV2(nn.Module):
    """ShuffleNetV2 as released with WeightNet, still static: narrower, and left branches keep their input's channels.

    Args:
        num_classes: outputs; in_chans: channels of the pictures.
        width: 0.5, 1, 1.5 or 2.
        dropout: before the classifier; None for the released 0.2 at width 2 and 0 elsewhere.
    Raises:
        ValueError: another width.
    Source: github.com/megvii-model/WeightNet, shufflenet_v2.py; ShuffleNetV2 is arXiv 1807.11164.

    >>> WeightShuffleNetV2(num_classes=10).eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        width: float = 1.0,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        _checks.positive("num_classes", num_classes)
        stages = WEIGHTNET_WIDTHS.get(round(100 * width))
        if stages is None:
            known = ", ".join(f"{w / 100:g}" for w in WEIGHTNET_WIDTHS)
            raise ValueError(f"width must be one of ShuffleNetV2's: {known}, got {width}")
        self.input_size = (in_chans, 224, 224)
        stem = nn.Conv2d(in_chans, 24, 3, 2, 1)
        self.conv1 = nn.Sequential(stem, nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 24
        for number, (out, repeats) in enumerate(zip(stages, REPEATS, strict=True), start=2):
            units = [
                WeightShuffleUnit(channels if i == 0 else out, out, 2 if i == 0 else 1)
                for i in range(repeats)
            ]
            self.add_module(f"stage{number}", nn.Sequential(*units))
            channels = out
        last = nn.Conv2d(channels, 1024, 1)
        self.conv5 = nn.Sequential(last, nn.BatchNorm2d(1024), nn.ReLU(inplace=True))
        self.dropout = nn.Dropout((0.2 if width == 2 else 0.0) if dropout is None else dropout)
        self.fc = nn.Linear(1024, num_classes)
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> last feature map [N, 1024, h, w]."""
        x = self.maxpool(self.conv1(x))
        return self.conv5(self.stage4(self.stage3(self.stage2(x))))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> logits [N, num_classes]."""
        return self.fc(self.dropout(self.forward_features(x).mean((2, 3))))
