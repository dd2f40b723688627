"""Weights of a channel fusion in the order in which they are read (csrc/plan/plan.h, kChannelFusion), and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dynaconv.engine.pack import PANEL, pack_conv, panels
from dynaconv.engine.pack_experts import pack_experts
from dynaconv.engine.plan import Conv

if TYPE_CHECKING:
    from dynaconv.engine.fusion import LowRank


def pack_fusion(attrs: dict[str, Any], bias: Tensor, folded: bool) -> list[Conv]:
    """The static weight, Q and P; `bias` [O] is what is added and not scaled."""
    weight, part, groups = attrs["weight"], attrs["low_rank"], attrs["groups"]
    (rank, inputs), outputs = part.q.shape, part.p.shape[0]
    if folded:
        experts = {**attrs, "experts": weight[None], "expert_bias": None}
        static, _ = pack_experts(experts, part.inner)
        reduce = Conv("reduction", inputs, rank, weight=part.q.t().contiguous(), bias=part.shift.clone())
    else:
        geometry = (groups, tuple(weight.shape[2:]), attrs["stride"], attrs["padding"], attrs["dilation"])
        static = Conv("conv", inputs, outputs, *geometry)
        static.weight, static.bias = pack_conv(weight, part.inner, groups)
        reduce = Conv("conv", inputs, rank)
        reduce.weight, reduce.bias = pack_conv(part.q[:, :, None, None], part.shift, 1)
    expand = Conv("expansion", rank, outputs)
    # P is dense; its panels follow the groups of the outputs.
    expand.weight, expand.bias = _group_panels(part, bias, groups)
    return [static, reduce, expand]


def _group_panels(part: LowRank, bias: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    outputs, rank = part.p.shape
    return panels(part.p.reshape(groups, outputs // groups, rank), bias.reshape(groups, outputs // groups))


def unpack_reduction(conv: Conv) -> tuple[Tensor, Tensor]:
    """Q [L, I] and its shift [L], of the folded form."""
    return conv.weight.t(), conv.bias


def unpack_expansion(conv: Conv) -> tuple[Tensor, Tensor]:
    """P [O, L] and what is added [O]."""
    groups = conv.weight.shape[0]
    each = conv.out_channels // groups
    rows = conv.weight.transpose(2, 3).flatten(1, 2)[:, :each]
    return rows.reshape(conv.out_channels, -1), conv.bias[:, :each].reshape(-1)


def reduction_shapes(conv: Conv) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of weight and bias that the folded form reads."""
    return (conv.in_channels, conv.out_channels), (conv.out_channels,)


def expansion_shapes(conv: Conv, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same of P, beside a static weight of so many groups."""
    count = -(-(conv.out_channels // groups) // PANEL)
    return (groups, count, conv.in_channels, PANEL), (groups, count * PANEL)


# By the form of a convolution; all others are known to pack.unpack.
UNPACK = {"reduction": unpack_reduction, "expansion": unpack_expansion}
