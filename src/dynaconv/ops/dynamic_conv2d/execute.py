"""Running a convolution with per-sample kernels by one of the strategies, biases included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynaconv.ops.dynamic_conv2d import strategies
from dynaconv.ops.dynamic_conv2d.choice import choose_execution, strategy_for_any_batch
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry, is_channels_last
from dynaconv.ops.dynamic_conv2d.reference import mix_biases, mix_kernels


def run(
    chosen: str,
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    static_bias: Tensor | None,
    taps: Tensor | None,
    geometry: ConvGeometry,
    in_chunks: bool = False,
) -> Tensor:
    """By the strategy `chosen`; arguments as in `dynamic_conv2d`, in_chunks where no gradient is needed."""
    if chosen == "feature":
        y = strategies.feature(x, weight, _scaled(routing, taps), geometry)
    elif chosen == "grouped" and in_chunks:
        y = strategies.grouped_in_chunks(x, weight, routing, taps, geometry)
    else:
        y = strategies.MIXED[chosen](x, mix_kernels(weight, routing, taps), geometry)
    return add_biases(y, mix_biases(bias, routing), static_bias)


def by_the_table(
    x: Tensor, weight: Tensor, routing: Tensor, bias, static_bias, taps, geometry: ConvGeometry
) -> Tensor:
    """By the strategy that was measured to be the fastest for these shapes; needs no gradient."""
    if x.shape[0] == 0:
        return of_no_images(x, weight, routing, bias, static_bias, taps, geometry)
    chosen = choose_execution(
        "auto",
        batch=x.shape[0],
        weight_shape=tuple(weight.shape[1:]),
        positions=math.prod(geometry.output_size(x.shape[2:], weight.shape[3:])),
        groups=geometry.groups,
        experts=weight.shape[0],
        taps=taps is not None and taps.shape[1] > 1,
        channels_last=is_channels_last(x),
    )
    return run(chosen, x, weight, routing, bias, static_bias, taps, geometry, in_chunks=True)


def for_any_batch(
    x: Tensor, weight: Tensor, routing: Tensor, bias, static_bias, taps, geometry: ConvGeometry
) -> Tensor:
    """By a strategy whose operations do not depend on the batch size, so that a graph serves them all."""
    chosen = strategy_for_any_batch(
        weight.shape[1:], geometry.groups, weight.shape[0], taps is not None and taps.shape[1] > 1
    )
    return run(chosen, x, weight, routing, bias, static_bias, taps, geometry)


def of_no_images(
    x: Tensor, weight: Tensor, routing: Tensor, bias, static_bias, taps, geometry: ConvGeometry
) -> Tensor:
    """An empty batch: the sum over no kernels is a zero one, which gives the shape, and zero gradients."""
    y = geometry.convolve(x, mix_kernels(weight, routing, taps).sum(0))
    return add_biases(y, mix_biases(bias, routing), static_bias)


def add_biases(y: Tensor, mixed: Tensor | None, static: Tensor | None) -> Tensor:
    """y [B, O, ...] plus mixed [B, O] plus static [O]."""
    ones = (1,) * (y.dim() - 2)
    if mixed is not None:
        y = y + mixed.to(y.dtype).reshape(*mixed.shape, *ones)
    if static is not None:
        y = y + static.to(y.dtype).reshape(-1, *ones)
    return y


def keep_format(y: Tensor, x: Tensor) -> Tensor:
    """y with the channels innermost where x has them there."""
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y


def _scaled(routing: Tensor, taps: Tensor | None) -> Tensor:
    """A kernel of one tap: its scale goes to the coefficients."""
    if taps is None:
        return routing
    return routing * (taps if routing.dim() == 2 else taps[:, None])
