"""Convolution with per-sample kernels: checks, choice of strategy, biases."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.ops import _registry
from dynaconv.ops.dynamic_conv2d import compiled, execute, strategies
from dynaconv.ops.dynamic_conv2d.choice import choose_execution
from dynaconv.ops.dynamic_conv2d.compiled import PackedExperts
from dynaconv.ops.dynamic_conv2d.execute import keep_format
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry, is_channels_last
from dynaconv.ops.dynamic_conv2d.op import OP


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

    Compilers and exporters see one node, `dynaconv::dynamic_conv2d`, where execution is "auto" and nothing is trained.

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
    several_taps = taps is not None and taps.shape[1] > 1
    facts = (
        execution,
        x.shape,
        weight.shape,
        routing.shape,
        stride,
        padding,
        dilation,
        groups,
        several_taps,
        training,
    )
    if torch.compiler.is_compiling():
        chosen, geometry = _plan(*facts, False, False)
        # A layer in evaluation is one node; for training, compilers want to see what they differentiate.
        if execution == "auto" and _registry.traced(x) and (packed is not None or not training):
            return OP(x, weight, routing, bias, static_bias, taps, *geometry.numbers)
        return keep_format(execute.run(chosen, x, weight, routing, bias, static_bias, taps, geometry), x)
    kernel = packed is not None and not training and compiled.cannot_run_now(x, weight) is None
    chosen, geometry = _plan_once(*facts, is_channels_last(x), kernel)
    if chosen == "compiled":
        return compiled.dynamic_conv(
            x, weight, routing, bias, static_bias, taps, geometry, packed.panels(weight)
        )
    if x.shape[0] == 0:
        y = execute.of_no_images(x, weight, routing, bias, static_bias, taps, geometry)
    else:
        y = execute.run(chosen, x, weight, routing, bias, static_bias, taps, geometry, in_chunks=not training)
    return keep_format(y, x)


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
    if not torch.compiler.is_compiling() and x.shape[0] == 0:
        y = geometry.convolve(x, kernels.sum(0))
    else:
        y = strategies.MIXED[chosen](x, kernels, geometry)
    mixed, static = (bias, None) if bias is not None and bias.dim() == 2 else (None, bias)
    return keep_format(execute.add_biases(y, mixed, static), x)


def _plan(
    execution: str, x_shape, weight_shape, routing_shape, stride, padding, dilation, groups: int, several_taps: bool,
    training: bool, channels_last: bool, kernel: bool,
) -> tuple[str, ConvGeometry]:  # fmt: skip
    """Checks, geometry and strategy: all that follows from shapes. kernel: the compiled one may run here."""
    _checks.experts(x_shape, weight_shape, routing_shape, groups)
    geometry = ConvGeometry.of(len(weight_shape) - 3, stride, padding, dilation, groups)
    can = kernel and compiled.cannot_run_shapes(weight_shape, geometry, channels_last) is None
    shape, experts = weight_shape[1:], weight_shape[0]
    return (
        _choose(execution, x_shape, shape, geometry, experts, several_taps, training, channels_last, can),
        geometry,
    )


# A network asks the same questions for every batch.
_plan_once = functools.lru_cache(maxsize=4096)(_plan)


def _choose(
    execution: str, x_shape, shape, geometry: ConvGeometry, experts: int | None, several_taps: bool, training: bool,
    channels_last: bool = False, compiled_can: bool = False,
) -> str:  # fmt: skip
    return choose_execution(
        execution,
        batch=x_shape[0],
        weight_shape=tuple(shape),
        positions=math.prod(geometry.output_size(x_shape[2:], shape[2:])),
        groups=geometry.groups,
        experts=experts,
        taps=several_taps,
        training=training,
        channels_last=channels_last,
        compiled=compiled_can,
    )


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _wants_channels_last(x: Tensor) -> bool:
    """For the choice of strategy, which a compiled graph must not make anew for another memory format."""
    return not torch.compiler.is_compiling() and is_channels_last(x)
