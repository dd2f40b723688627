"""The definition: mix the experts' kernels for each sample, then convolve each sample with its own."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry


def mix_kernels(weight: Tensor, routing: Tensor, taps: Tensor | None = None) -> Tensor:
    """Kernel of each sample: W(x) = sum over k of a_k(x) * W_k.

    Args:
        weight: [K, O, I/g, *kernel].
        routing: [B, K], or [B, O, K] where every output channel has coefficients of its own (DyNet).
        taps: [B, number of taps] multiplies every tap of the mixed kernel (ODConv's spatial attention).
    Returns:
        [B, O, I/g, *kernel]; mixed in the experts' precision, also under autocast.
    Source: CondConv (arXiv 1904.04971), equation 1; DyNet (OpenReview SyeZIkrKwS), equation 1; ODConv (2209.07947).
    """
    with full_precision(weight):
        routing = routing.to(weight.dtype)
        experts, shape = weight.shape[0], weight.shape[1:]
        if routing.dim() == 2:
            mixed = torch.mm(routing, weight.reshape(experts, -1))
        else:
            by_channel = weight.transpose(0, 1).reshape(shape[0], experts, -1)
            mixed = torch.bmm(routing.transpose(0, 1), by_channel).transpose(0, 1)
        mixed = mixed.reshape(routing.shape[0], *shape)
        if taps is not None:
            mixed = mixed * taps.to(weight.dtype).reshape(taps.shape[0], 1, 1, *shape[2:])
    return mixed


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off, where it is on: coefficients differ by little, and half precision would blur them."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def mix_biases(bias: Tensor | None, routing: Tensor) -> Tensor | None:
    """Bias of each sample [B, O] from the experts' biases [K, O]."""
    if bias is None:
        return None
    with full_precision(bias):
        routing = routing.to(bias.dtype)
        return routing @ bias if routing.dim() == 2 else (routing * bias.t()).sum(-1)


def per_sample_conv(x: Tensor, kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """Convolve sample b of x [B, I, *size] with kernels[b] of [B, O, I/g, *kernel], one after the other."""
    return torch.cat([geometry.convolve(x[b : b + 1], kernels[b]) for b in range(x.shape[0])])
