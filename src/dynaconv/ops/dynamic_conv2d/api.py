"""Convolution with per-sample kernels: checks, choice of strategy, biases."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.ops.dynamic_conv2d import compiled, strategies
from dynaconv.ops.dynamic_conv2d.choice import choose_execution
from dynaconv.ops.dynamic_conv2d.compiled import PackedExperts
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry, is_channels_last
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
    training = _needs_gradient(x, weight, routing, taps, bias, static_bias)
    compiled_can = (
        packed is not None and not training and compiled.cannot_run(x, weight, groups, stride) is None
    )
    plan = _plan if torch.compiler.is_compiling() else _plan_once
    chosen, geometry = plan(
        execution, x.shape, weight.shape, routing.shape, stride, padding, dilation, groups,
        taps is not None and taps.shape[1] > 1, training, _wants_channels_last(x), compiled_can,
    )  # fmt: skip
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
    training = _needs_gradient(x, kernels)
    chosen = _choose(
        execution, x.shape, kernels.shape[1:], geometry, None, False, training, _wants_channels_last(x)
    )
    y = (
        geometry.convolve(x, kernels.sum(0))
        if _no_images(x)
        else strategies.MIXED[chosen](x, kernels, geometry)
    )
    mixed, static = (bias, None) if bias is not None and bias.dim() == 2 else (None, bias)
    return _finish(y, mixed, static, x)


def _plan(
    execution: str, x_shape, weight_shape, routing_shape, stride, padding, dilation, groups: int, taps: bool,
    training: bool, channels_last: bool, compiled_can: bool,
) -> tuple[str, ConvGeometry]:  # fmt: skip
    """Checks, geometry and strategy: all that follows from shapes."""
    _checks.experts(x_shape, weight_shape, routing_shape, groups)
    geometry = ConvGeometry.of(len(weight_shape) - 3, stride, padding, dilation, groups)
    chosen = _choose(
        execution,
        x_shape,
        weight_shape[1:],
        geometry,
        weight_shape[0],
        taps,
        training,
        channels_last,
        compiled_can,
    )
    return chosen, geometry


# A network asks the same questions for every batch.
_plan_once = functools.lru_cache(maxsize=4096)(_plan)


def _choose(
    execution: str,
    x_shape,
    shape,
    geometry: ConvGeometry,
    experts: int | None,
    taps: bool,
    training: bool,
    channels_last: bool = False,
    compiled_can: bool = False,
) -> str:
    return choose_execution(
        execution,
        batch=x_shape[0],
        weight_shape=tuple(shape),
        positions=math.prod(geometry.output_size(x_shape[2:], shape[2:])),
        groups=geometry.groups,
        experts=experts,
        taps=taps,
        training=training,
        channels_last=channels_last,
        compiled=compiled_can,
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
    if is_channels_last(x):
        return y.contiguous(memory_format=torch.channels_last)
    return y


def _wants_channels_last(x: Tensor) -> bool:
    """For the choice of strategy, which a compiled graph must not make anew for another memory format."""
    return not torch.compiler.is_compiling() and is_channels_last(x)
