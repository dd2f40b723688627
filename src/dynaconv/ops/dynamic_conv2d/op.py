"""`torch.ops.dynaconv.dynamic_conv2d`: what compilers see of a convolution with a kernel for each sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynaconv.ops import _registry
from dynaconv.ops._recompute import recompute_gradients
from dynaconv.ops.dynamic_conv2d import execute
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry, is_channels_last


def _kept(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x, as the compiled kernel writes it."""
    return y.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def _eager(
    x: Tensor, experts: Tensor, routing: Tensor, bias, static_bias, taps, stride, padding, dilation, groups,
    packed=None,
) -> Tensor:  # fmt: skip
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    y = execute.by_the_table(x, experts, routing, bias, static_bias, taps, geometry)
    return _kept(y, x)


def _decomposition(
    x: Tensor, experts: Tensor, routing: Tensor, bias, static_bias, taps, stride, padding, dilation, groups,
    packed=None,
) -> Tensor:  # fmt: skip
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    y = execute.for_any_batch(x, experts, routing, bias, static_bias, taps, geometry)
    return _kept(y, x)


def _fake(
    x: Tensor, experts: Tensor, routing: Tensor, bias, static_bias, taps, stride, padding, dilation, groups,
    packed=None,
) -> Tensor:  # fmt: skip
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    size = geometry.output_size(x.shape[2:], experts.shape[3:])
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], experts.shape[1], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def _saved(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, stride, padding, dilation, groups, _ = inputs
    ctx.geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple:
    def forward(*tensors) -> Tensor:
        return execute.for_any_batch(*tensors, ctx.geometry)

    return *recompute_gradients(forward, ctx.saved_tensors, grad), None, None, None, None, None


def _flops(x_shape, experts_shape, routing_shape, *args, out_shape, **kwargs) -> int:
    """The convolution, and mixing a kernel for each sample."""
    mixing = x_shape[0] * experts_shape.numel()
    return 2 * (mixing + experts_shape[1:].numel() * x_shape[0] * math.prod(out_shape[2:]))


OP = _registry.register(
    "dynamic_conv2d",
    "Tensor x, Tensor experts, Tensor routing, Tensor? bias, Tensor? static_bias, Tensor? taps, int[] stride, "
    "int[] padding, int[] dilation, int groups, Tensor? packed=None",
    eager=_eager,
    fake=_fake,
    saved=_saved,
    backward=_backward,
    flops=_flops,
    decomposition=_decomposition,
)
