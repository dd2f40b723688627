"""Folding batch norm into a convolution and convolutions into each other, and naming activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.ops import ConvSpec
from dynaconv.ops._conv import Geometry

_ACTIVATIONS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.ReLU6, "relu6"),
    (nn.ReLU, "relu"),
    (nn.SiLU, "silu"),
    (nn.Hardswish, "hardswish"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Identity, "none"),
)


def activation_name(act: nn.Module | None) -> str | None:
    """Name of an activation module for executors; "none" for None, None when it is not known."""
    if act is None:
        return "none"
    for kind, name in _ACTIVATIONS:
        if isinstance(act, kind):
            return name
    if isinstance(act, nn.Hardtanh) and (act.min_val, act.max_val) == (0, 6):
        return "relu6"
    if isinstance(act, nn.LeakyReLU) and act.negative_slope == 0.01:
        return "leaky_relu"
    return "gelu" if isinstance(act, nn.GELU) and act.approximate == "none" else None


def norm_activation(norm: nn.Module | None) -> nn.Module | None:
    """The activation inside a timm-style norm-and-activation layer, if any."""
    return getattr(norm, "act", None) if isinstance(norm, _BatchNorm) else None


def fold_conv(conv: nn.Conv2d, norm: nn.Module | None, act: nn.Module | None) -> ConvSpec:
    """Convolution, evaluation-mode batch norm and activation as one ConvSpec.

    w' = w * gamma / sqrt(var + eps), b' = beta + (b - mean) * gamma / sqrt(var + eps).
    """
    weight: Tensor = conv.weight
    bias: Tensor | None = conv.bias
    if norm is not None and not isinstance(norm, nn.Identity):
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        weight = weight * scale[:, None, None, None]
        shifted = (-norm.running_mean if bias is None else bias - norm.running_mean) * scale
        bias = shifted if norm.bias is None else shifted + norm.bias
    inner = norm_activation(norm)
    name = activation_name(inner if act is None and inner is not None else act)
    assert name is not None
    return ConvSpec(weight, bias, conv.stride, Geometry.of(conv).padding, conv.dilation, conv.groups, name)


def kernel_within(
    weight: Tensor,
    groups: int,
    padding: Sequence[int],
    shape: Sequence[int],
    wide_groups: int,
    wide_padding: Sequence[int],
) -> Tensor | None:
    """The kernel of a convolution laid into that of another one, which reads the same map at the same stride.

    Args:
        weight: [O, I / groups, kh, kw]. padding: (vertical, horizontal), where the window starts, as is wide_padding.
        shape: of the other kernel, [O, I / wide_groups, Kh, Kw].
    Returns:
        [*shape] in float64, zeros beside the kernel's own taps; None where it does not fit.
    Source: arXiv 2101.03697, section 3.3.
    """
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    if outputs != shape[0] or inputs != shape[1] * wide_groups:
        return None
    weight = weight.double()
    if groups != wide_groups:
        if not groups == outputs == inputs:
            return None
        # One filter a channel, which reads the channel of its own number in its group.
        own = torch.arange(outputs, device=weight.device) % shape[1]
        filled = weight.new_zeros(outputs, shape[1], *weight.shape[2:])
        filled[torch.arange(outputs, device=weight.device), own] = weight[:, 0]
        weight = filled
    before = [w - n for w, n in zip(wide_padding, padding, strict=True)]
    behind = [w - n - start for w, n, start in zip(shape[2:], weight.shape[2:], before, strict=True)]
    if min(before + behind) < 0:
        return None
    return F.pad(weight, (before[1], behind[1], before[0], behind[0]))
