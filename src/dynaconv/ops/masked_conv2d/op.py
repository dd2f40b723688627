"""`torch.ops.dynaconv.masked_conv2d`: what compilers see of a masked convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dynaconv.ops import _registry
from dynaconv.ops._conv import ConvSpec, Geometry
from dynaconv.ops._recompute import recompute_gradients
from dynaconv.ops.masked_conv2d import cpu, reference
from dynaconv.ops.masked_residual.cpu import can_run


def _eager(x: Tensor, mask: Tensor, weight: Tensor, bias, stride, padding, dilation, groups) -> Tensor:
    conv = ConvSpec(weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    run = cpu.masked_conv2d if can_run(x) is None else reference.masked_conv2d
    return _registry.rows(run(x, mask, conv))


def _fake(x: Tensor, mask: Tensor, weight: Tensor, bias, stride, padding, dilation, groups) -> Tensor:
    geometry = Geometry(tuple(weight.shape[2:]), stride, padding, dilation)
    return _registry.empty_rows(x, weight.shape[0], geometry.output_size(x.shape[2:]))


def _decomposition(x: Tensor, mask: Tensor, weight: Tensor, bias, *geometry) -> Tensor:
    return _registry.rows(mask.to(x.dtype) * F.conv2d(x, weight, bias, *geometry))


def _saved(ctx, inputs: tuple, output: Tensor) -> None:
    x, mask, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, mask, weight, bias)


def _backward(ctx, grad: Tensor) -> tuple:
    def forward(x, mask, weight, bias) -> Tensor:
        return mask.to(x.dtype) * F.conv2d(x, weight, bias, *ctx.geometry)

    return *recompute_gradients(forward, ctx.saved_tensors, grad), None, None, None, None


def _flops(x_shape, mask_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    return 2 * weight_shape.numel() * out_shape[0] * out_shape[2] * out_shape[3]


OP = _registry.register(
    "masked_conv2d",
    "Tensor x, Tensor mask, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups",
    eager=_eager,
    fake=_fake,
    saved=_saved,
    backward=_backward,
    flops=_flops,
    decomposition=_decomposition,
)
