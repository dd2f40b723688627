"""Weights in the order in which the kernels read them (csrc/plan/plan.h), and back.

`pack_*` returns (weight, bias); `unpack` gives the [O, I / groups, kh, kw] weight and [O] bias for the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynaconv.engine import pack_bfloat16
from dynaconv.engine.pack_experts import unpack_experts
from dynaconv.engine.plan import Conv

PANEL = 32


def _padded(channels: int) -> int:
    return -(-channels // PANEL) * PANEL


def pack_conv(weight: Tensor, bias: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """[O, I/g, kh, kw] -> [g][panels][kh * kw * I/g][32] and [g][panels * 32], zero padded."""
    out_channels, depth = weight.shape[0] // groups, weight[0].numel()
    rows = weight.permute(0, 2, 3, 1).reshape(groups, out_channels, depth)
    return panels(rows, bias.reshape(groups, out_channels))


def panels(rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[g][outputs][depth] and [g][outputs] -> [g][panels][depth][32] and [g][panels * 32], zero padded."""
    groups, out_channels, depth = rows.shape
    full = torch.zeros(groups, _padded(out_channels), depth, dtype=rows.dtype)
    full[:, :out_channels] = rows
    shifts = torch.zeros(groups, _padded(out_channels))
    shifts[:, :out_channels] = bias
    return full.reshape(groups, -1, PANEL, depth).transpose(2, 3).contiguous(), shifts.contiguous()


def can_winograd(conv: Conv) -> bool:
    """Whether Winograd's F(2x2, 3x3) computes this convolution."""
    unit = conv.stride == conv.dilation == (1, 1) and conv.kernel == (3, 3)
    return unit and conv.groups == 1 and max(conv.padding) <= 2


def pack_winograd(weight: Tensor) -> Tensor:
    """[O, I, 3, 3] -> G g G' as [panels][16 points][I][32]; source: arXiv 1509.09308, section 4.1."""
    out_channels, inner = weight.shape[:2]
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    points = torch.einsum("ai,ocij,bj->abco", g, weight.double(), g).reshape(16, inner, out_channels)
    full = torch.zeros(16, inner, _padded(out_channels))
    full[:, :, :out_channels] = points.float()
    return full.reshape(16, inner, -1, PANEL).permute(2, 0, 1, 3).contiguous()


def pack_depthwise(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[C, 1, kh, kw] -> [kh * kw][C] and [C]."""
    return weight.reshape(weight.shape[0], -1).t().contiguous(), bias.clone()


def pack_gate(weight: Tensor, linear: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[1, C, 3, 3] and [C] -> [9 + 1][C]; [1, C, 1, 1] -> [1][C]; bias [1]."""
    taps = weight[0].reshape(weight.shape[1], -1).t()
    return (taps if linear is None else torch.cat([taps, linear[None]])).contiguous(), bias.clone()


def unpack(conv: Conv) -> tuple[Tensor, Tensor]:
    """The weight [O, I/g, kh, kw] and bias [O] behind a packed convolution, in float32."""
    if conv.form in ("experts", "expert_biases"):
        return unpack_experts(conv)
    if conv.weight is None:
        return unpack_winograd(conv)
    if conv.weight.dtype == torch.bfloat16:
        return pack_bfloat16.unpack(conv)
    weight, bias = conv.weight.float(), conv.bias.float()
    (kh, kw), per_group = conv.kernel, conv.out_channels // conv.groups
    if conv.form == "depthwise":
        return weight.t().reshape(conv.out_channels, 1, kh, kw), bias
    inner = conv.in_channels // conv.groups
    rows = weight.transpose(2, 3).flatten(1, 2)[:, :per_group]
    shifts = bias[:, :per_group].reshape(-1)
    return rows.reshape(conv.out_channels, kh, kw, inner).permute(0, 3, 1, 2), shifts


def unpack_winograd(conv: Conv) -> tuple[Tensor, Tensor]:
    """The weight [O, I, 3, 3] and bias [O] behind Winograd's weights: G g G' undone along both axes."""
    packed = conv.winograd
    if packed.dtype == torch.bfloat16:
        packed = pack_bfloat16.part_points(packed, conv.in_channels)
    points = packed.double().permute(1, 2, 0, 3).flatten(2)[..., : conv.out_channels]
    points = points.reshape(4, 4, conv.in_channels, conv.out_channels)
    rows = torch.stack([points[0], points[1] - points[2], points[3]])
    taps = torch.stack([rows[:, 0], rows[:, 1] - rows[:, 2], rows[:, 3]], dim=1)
    return taps.permute(3, 2, 0, 1).float(), conv.bias.float().reshape(-1)[: conv.out_channels]


def unpack_gate(conv: Conv, squeeze: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Convolution weight [1, C, k, k], weight of the average [C] or None, and bias [1]."""
    taps = conv.weight[:9] if squeeze else conv.weight
    weight = taps.t().reshape(1, conv.in_channels, *conv.kernel)
    return weight, conv.weight[9] if squeeze else None, conv.bias[:1]
