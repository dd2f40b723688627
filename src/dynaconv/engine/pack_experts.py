"""Experts in the order in which they are mixed (csrc/plan/plan.h, kDynamicConv), and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.engine.plan import Conv

_PANEL = 32


def pack_experts(attrs: dict[str, Any], bias: Tensor) -> tuple[Conv, Conv | None]:
    """Convolution and biases to mix, packed as csrc/plan/plan.h says for kDynamicConv."""
    experts, groups = attrs["experts"], attrs["groups"]
    count, outputs, inner, kh, kw = experts.shape
    geometry = (groups, (kh, kw), attrs["stride"], attrs["padding"], attrs["dilation"])
    outer = _blocks(outputs, inner, groups)
    rows = _padded(experts.reshape(count, outer, -1, inner, kh * kw), 2)
    weight = rows.reshape(count, outer, -1, _PANEL, inner, kh * kw).permute(1, 2, 4, 5, 0, 3).contiguous()
    conv = Conv("experts", inner * groups, outputs, *geometry, weight=weight)
    conv.bias = _padded(bias.reshape(outer, -1), 1).contiguous()
    if attrs["expert_bias"] is None:
        return conv, None
    shifts = _padded(attrs["expert_bias"].reshape(count, outer, -1), 2)
    shifts = shifts.reshape(count, outer, -1, _PANEL).permute(1, 2, 0, 3).contiguous()
    mixed = Conv("expert_biases", inner * groups, outputs, *geometry, weight=shifts)
    mixed.bias = torch.zeros_like(conv.bias)
    return conv, mixed


def unpack_experts(conv: Conv) -> tuple[Tensor, Tensor]:
    """[K, O, I / g, kh, kw] and the static bias [O]; of `expert_biases` [K, O] and zeros."""
    outer = conv.weight.shape[0]
    per_block = conv.out_channels // outer
    bias = conv.bias[:, :per_block].reshape(-1)
    if conv.form == "expert_biases":
        return conv.weight.permute(2, 0, 1, 3).flatten(2)[:, :, :per_block].flatten(1), bias
    rows = conv.weight.permute(4, 0, 1, 5, 2, 3).flatten(2, 3)[:, :, :per_block].flatten(1, 2)
    return rows.reshape(*rows.shape[:3], *conv.kernel), bias


def expected_shapes(conv: Conv, experts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of weight and bias that the kernels read."""
    inner, taps = conv.in_channels // conv.groups, conv.kernel[0] * conv.kernel[1]
    outer = _blocks(conv.out_channels, inner, conv.groups)
    panels = -(-(conv.out_channels // outer) // _PANEL)
    if conv.form == "expert_biases":
        return (outer, panels, experts, _PANEL), (outer, panels * _PANEL)
    return (outer, panels, inner, taps, experts, _PANEL), (outer, panels * _PANEL)


def _blocks(outputs: int, inner: int, groups: int) -> int:
    """Groups have panels of their own, but for one channel a group, where panels run over all channels."""
    return 1 if inner == 1 and groups == outputs and groups > 1 else groups


def _padded(tensor: Tensor, axis: int) -> Tensor:
    missing = -tensor.shape[axis] % _PANEL
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, missing))
