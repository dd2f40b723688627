"""Folding batch norm into a convolution, and naming activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.ops import ConvSpec

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
    return ConvSpec(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, name)
