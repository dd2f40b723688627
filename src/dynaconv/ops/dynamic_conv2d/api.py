"""Convolution with per-sample kernels: checks, choice of strategy, biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.ops.dynamic_conv2d import compiled, strategies
from dynaconv.ops.dynamic_conv2d.choice import choose_execution
from dynaconv.ops.dynamic_conv2d.compiled import PackedExperts
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry
from dynaconv.ops.dynamic_conv2d.reference import mix_biases, mix_kernels


def dynamic_conv2d(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    static_bias: Tensor | None = None,
    taps: Tensor | None = None,
    execution: str = "auto",
    packed: PackedExperts | None = None,
) -> Tensor:
    """Convolve each sample with its own mixture of experts; 1-D and 3-D by the number of axes.

    Args:
        x: [B, I, H, W].
        weight: experts, [K, O, I/g, kh, kw].
        routing: [B, K], or [B, O, K] with coefficients of its own for every output channel.
        bias: the experts' biases [K, O], mixed like the kernels; static_bias: [O], added once.
        taps: [B, kh * kw], scales the taps of each sample's kernel.
        execution: "auto", "grouped", "feature", "unfold", "bmm" or "single"; see docs/kernels.md.
        packed: keeps the experts in the layout of the compiled kernel, which "auto" then may use where no gradient is
            needed; a layer owns one.
    Returns:
        [B, O, h, w], in the memory format of x.
    Raises:
        ValueError: sizes that do not fit, or a strategy that cannot run for this shape.
    Source: arXiv 1904.04971 (CondConv), section 3; strategies in docs/kernels.md.

    >>> x, experts = torch.ones(2, 1, 1, 1), torch.tensor([1.0, 10.0]).reshape(2, 1, 1, 1, 1)
    >>> dynamic_conv2d(x, experts, torch.tensor([[1.0, 0.0], [0.5, 0.5]])).flatten()
    tensor([1.0000, 5.5000])
    """
    _checks.experts(x, weight, routing, groups)
    geometry = ConvGeometry.of(weight.dim() - 3, stride, padding, dilation, groups)
    training = _needs_gradient(x, weight, routing, taps)
    chosen = _choose(
        execution,
        x,
        weight.shape[1:],
        geometry,
        weight.shape[0],
        taps is not None and taps.shape[1] > 1,
        training,
        compiled=packed is not None and not training and compiled.cannot_run(x, weight, groups) is None,
    )
    if chosen == "compiled":
        assert packed is not None
        offsets = _offsets(mix_biases(bias, routing), static_bias)
        panels = packed.panels(weight)
        return compiled.dynamic_conv(x, panels, weight.shape, routing, offsets, taps, geometry)
    if _no_images(x):
        y = geometry.convolve(x, mix_kernels(weight, routing, taps).sum(0))
    elif chosen == "feature":
        y = strategies.feature(x, weight, _scaled(routing, taps), geometry)
    elif chosen == "grouped" and not training and not torch.compiler.is_compiling():
        y = strategies.grouped_in_chunks(x, weight, routing, taps, geometry)
    else:
        y = strategies.MIXED[chosen](x, mix_kernels(weight, routing, taps), geometry)
    return _finish(y, mix_biases(bias, routing), static_bias, x)


def per_sample_conv(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    execution: str = "auto",
) -> Tensor:
    """Convolve sample b of x [B, I, H, W] with kernels[b] of [B, O, I/g, kh, kw]; 1-D and 3-D likewise.

    Args:
        bias: [B, O], [O] or None.
        execution: as in `dynamic_conv2d`, except "feature".
    Returns:
        [B, O, h, w], in the memory format of x.
    Raises:
        ValueError: sizes that do not fit, or a strategy that cannot run for this shape.

    >>> per_sample_conv(torch.ones(2, 1, 1, 1), torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1, 1)).flatten()
    tensor([2., 3.])
    """
    _checks.sample_kernels(x, kernels, groups)
    geometry = ConvGeometry.of(kernels.dim() - 3, stride, padding, dilation, groups)
    chosen = _choose(execution, x, kernels.shape[1:], geometry, None, False, _needs_gradient(x, kernels))
    y = (
        geometry.convolve(x, kernels.sum(0))
        if _no_images(x)
        else strategies.MIXED[chosen](x, kernels, geometry)
    )
    mixed, static = (bias, None) if bias is not None and bias.dim() == 2 else (None, bias)
    return _finish(y, mixed, static, x)


def _choose(
    execution,
    x: Tensor,
    shape,
    geometry: ConvGeometry,
    experts,
    taps: bool,
    training: bool,
    compiled: bool = False,
) -> str:
    return choose_execution(
        execution,
        batch=x.shape[0],
        weight_shape=tuple(shape),
        positions=math.prod(geometry.output_size(x.shape[2:], shape[2:])),
        groups=geometry.groups,
        experts=experts,
        taps=taps,
        training=training,
        compiled=compiled,
    )


def _offsets(mixed: Tensor | None, static: Tensor | None) -> Tensor | None:
    return static if mixed is None else mixed if static is None else mixed + static


def _no_images(x: Tensor) -> bool:
    """An empty batch: the sum over no kernels is a zero one, which gives the shape, and zero gradients."""
    return not torch.compiler.is_compiling() and x.shape[0] == 0


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _scaled(routing: Tensor, taps: Tensor | None) -> Tensor:
    """A kernel of one tap: its scale goes to the coefficients."""
    if taps is None:
        return routing
    return routing * (taps if routing.dim() == 2 else taps[:, None])


def _finish(y: Tensor, mixed: Tensor | None, static: Tensor | None, x: Tensor) -> Tensor:
    """Add the biases and keep the memory format."""
    ones = (1,) * (y.dim() - 2)
    if mixed is not None:
        y = y + mixed.to(y.dtype).reshape(*mixed.shape, *ones)
    if static is not None:
        y = y + static.to(y.dtype).reshape(-1, *ones)
    if y.dim() == 4 and _channels_last(x):
        return y.contiguous(memory_format=torch.channels_last)
    return y


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
