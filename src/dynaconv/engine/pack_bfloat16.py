"""Weights in bfloat16, in the order in which the kernels read them (csrc/plan/plan.h), and back.

Neighbours in depth lie beside each other, since the processor multiplies them in pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.engine.plan import Conv

PANEL = 32


def pack_pairs(weight: Tensor, groups: int, stem: bool = False) -> Tensor:
    """[O, I/g, kh, kw] -> [g][panels][taps][pairs of channels][32][2], zeros beside odd channels.

    The taps of a stem are the kernel's rows, with (kx, channel) as their channels.
    """
    outputs, kernel_rows = weight.shape[0] // groups, weight.shape[2]
    rows = weight.permute(0, 2, 3, 1).reshape(groups, outputs, *weight.shape[2:], weight.shape[1])
    taps = rows.reshape(groups, outputs, kernel_rows, -1) if stem else rows.flatten(2, 3)
    taps = F.pad(taps, (0, taps.shape[3] % 2, 0, 0, 0, -outputs % PANEL))
    pairs = taps.reshape(groups, -1, PANEL, taps.shape[2], taps.shape[3] // 2, 2)
    return pairs.permute(0, 1, 3, 4, 2, 5).contiguous().bfloat16()


def pack_depthwise(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[C, 1, kh, kw] -> [panels][pairs of taps][2][16][2], and bias [panels * 32]."""
    channels, (kernel_rows, kernel_columns) = weight.shape[0], weight.shape[2:]
    taps = F.pad(weight.flatten(1), (0, 1, 0, -channels % PANEL))
    pairs = taps[:, _tap_pairs(kernel_rows, kernel_columns)]
    # Channel 8 q + 4 half + r goes to lane 4 q + r of its half.
    lanes = pairs.reshape(-1, 4, 2, 4, pairs.shape[1], 2).permute(0, 4, 2, 1, 3, 5)
    return lanes.flatten(3, 4).contiguous().bfloat16(), F.pad(bias, (0, -channels % PANEL))


def pair_points(points: Tensor) -> Tensor:
    """Winograd's weights [panels][16 points][I][32] -> [panels][16 points][pairs of I][32][2]."""
    whole = F.pad(points, (0, 0, 0, points.shape[2] % 2))
    return whole.unflatten(2, (-1, 2)).transpose(3, 4).contiguous().bfloat16()


def part_points(pairs: Tensor, in_channels: int) -> Tensor:
    """What `pair_points` was given, rounded to bfloat16."""
    return pairs.float().transpose(3, 4).flatten(2, 3)[:, :, :in_channels]


def unpack(conv: Conv) -> tuple[Tensor, Tensor]:
    """The weight [O, I/g, kh, kw] and bias [O] behind a convolution packed here, in float32."""
    if conv.form == "depthwise":
        return _unpack_depthwise(conv)
    (rows, columns), per_group = conv.kernel, conv.out_channels // conv.groups
    inner = conv.in_channels // conv.groups
    taps = conv.weight.float().permute(0, 1, 4, 2, 3, 5).flatten(4).flatten(1, 2)[:, :per_group]
    depth = inner * columns if conv.form == "stem" else inner
    weight = taps[..., :depth].reshape(conv.out_channels, rows, columns, inner).permute(0, 3, 1, 2)
    return weight, conv.bias.float()[:, :per_group].reshape(-1)


def _unpack_depthwise(conv: Conv) -> tuple[Tensor, Tensor]:
    channels, (rows, columns) = conv.out_channels, conv.kernel
    lanes = conv.weight.float().unflatten(3, (4, 4)).permute(0, 3, 2, 4, 1, 5)
    taps = torch.zeros(channels, rows * columns + 1)
    taps[:, _tap_pairs(rows, columns).flatten()] = lanes.flatten(0, 3)[:channels].flatten(1)
    return taps[:, :-1].reshape(channels, 1, rows, columns), conv.bias.float()[:channels]


def _tap_pairs(kernel_rows: int, kernel_columns: int) -> Tensor:
    """Which taps are multiplied together, [pairs][2]; the number of taps stands for none."""
    taps = torch.arange(kernel_rows * kernel_columns).reshape(kernel_rows, kernel_columns)
    even = taps[: kernel_rows // 2 * 2].reshape(-1, 2, kernel_columns).transpose(1, 2).reshape(-1, 2)
    last = F.pad(taps[kernel_rows // 2 * 2 :], (0, kernel_columns % 2), value=kernel_rows * kernel_columns)
    return torch.cat([even, last.reshape(-1, 2)])
