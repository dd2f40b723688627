"""Masked convolution: checks, choice of executor, gradients, and its name for compilers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from dynaconv import _checks
from dynaconv.ops import _backends
from dynaconv.ops._conv import ConvSpec
from dynaconv.ops._recompute import recompute_gradients
from dynaconv.ops.masked_conv2d import cpu, reference
from dynaconv.ops.masked_residual.cpu import can_run


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, conv: ConvSpec, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.conv = conv
        ctx.save_for_backward(x, mask, weight, bias)
        return cpu.masked_conv2d(x, mask, conv)

    @staticmethod
    def backward(ctx, grad: Tensor):
        c = ctx.conv

        def forward(x, mask, weight, bias):
            conv = ConvSpec(weight, bias, c.stride, c.padding, c.dilation, c.groups)
            return reference.masked_conv2d(x, mask, conv)

        return None, *recompute_gradients(forward, ctx.saved_tensors, grad)


def masked_conv2d(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve only where the mask is open; closed positions are zero.

    Args:
        x: [N, C_in, H, W].
        mask: [N, 1, h, w] of 0 and 1 (bool or floating), on the output grid.
        weight: [C_out, C_in / groups, kh, kw]; bias: [C_out] or None.
        stride, padding, dilation: int or pair; padding is with zeros.
        backend: "cpu" (index lists), "eager" (dense, times the mask) or "auto".
    Returns:
        [N, C_out, h, w], equal to `mask * F.conv2d(...)`.
    Raises:
        ValueError: wrong channel count, a mask of another size, unknown backend.
        RuntimeError: an explicit backend that cannot run here.
    Source: arXiv 1912.03203, section 3.3.

    >>> x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    >>> masked_conv2d(x, torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), w)
    tensor([[[[1., 0.],
              [0., 1.]]]])
    """
    _checks.images(x, weight.shape[1] * groups, "masked_conv2d")
    conv = ConvSpec(weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    h, w = conv.geometry.output_size((x.shape[2], x.shape[3]))
    _checks.mask_for(mask, (x.shape[0], h, w))
    if _backends.choose("masked_conv2d", backend, {"cpu": can_run}, x) == "eager":
        return reference.masked_conv2d(x, mask, conv)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, mask, weight, bias)):
        return _Differentiable.apply(conv, x, mask, weight, bias)
    return cpu.masked_conv2d(x, mask, conv)
