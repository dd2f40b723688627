"""`torch.ops.dynaconv.channel_fusion`: what compilers see of dynamic channel fusion in evaluation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynaconv.ops import _registry
from dynaconv.ops._recompute import recompute_gradients
from dynaconv.ops.channel_fusion import reference
from dynaconv.ops.channel_fusion.reference import Affine
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry


def _factored(*tensors: Tensor | None, geometry: ConvGeometry) -> Tensor:
    x, weight, bias, q, p, scale, fusion, *norms = tensors
    return reference.factored(
        x, weight, bias, q, p, scale, fusion, geometry, (Affine(*norms[:2]), Affine(*norms[2:]))
    )


def _geometry(numbers: tuple) -> ConvGeometry:
    stride, padding, dilation, groups = numbers
    return ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def _eager(*args) -> Tensor:
    return _factored(*args[:11], geometry=_geometry(args[11:])).contiguous()


def _fake(*args) -> Tensor:
    x, weight = args[:2]
    size = _geometry(args[11:]).output_size(x.shape[2:], weight.shape[2:])
    return torch.empty((x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device)


def _saved(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.geometry = _geometry(inputs[11:])
    ctx.save_for_backward(*inputs[:11])


def _backward(ctx, grad: Tensor) -> tuple:
    def forward(*tensors) -> Tensor:
        return _factored(*tensors, geometry=ctx.geometry)

    return *recompute_gradients(forward, ctx.saved_tensors, grad), None, None, None, None


def _flops(x_shape, weight_shape, bias_shape, q_shape, *args, out_shape, **kwargs) -> int:
    """The static convolution, and Q, the fusion matrix and P at every position."""
    positions, latent = x_shape[0] * math.prod(out_shape[2:]), q_shape[0]
    return 2 * positions * (weight_shape.numel() + latent * (q_shape[1] + latent + weight_shape[0]))


OP = _registry.register(
    "channel_fusion",
    "Tensor x, Tensor weight, Tensor? bias, Tensor q, Tensor p, Tensor scale, Tensor fusion, Tensor? scale1, "
    "Tensor? shift1, Tensor? scale2, Tensor? shift2, int[] stride, int[] padding, int[] dilation, int groups",
    eager=_eager,
    fake=_fake,
    saved=_saved,
    backward=_backward,
    flops=_flops,
    decomposition=_eager,
)
