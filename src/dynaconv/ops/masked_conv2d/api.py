"""Masked convolution: checks, choice of executor, gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from dynaconv import _checks
from dynaconv.ops import _backends, _registry
from dynaconv.ops._conv import ConvSpec, Geometry
from dynaconv.ops.masked_conv2d import reference
from dynaconv.ops.masked_conv2d.op import OP
from dynaconv.ops.masked_residual.cpu import can_run


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

    Compilers and exporters see one node, `dynaconv::masked_conv2d`.

    Args:
        x: [N, C_in, H, W].
        mask: [N, 1, h, w] of 0 and 1 (bool or floating), on the output grid.
        weight: [C_out, C_in / groups, kh, kw]; bias: [C_out] or None.
        stride, padding, dilation: int or pair; padding is with zeros.
        backend: "cpu" (index lists), "eager" (dense, times the mask) or "auto".
    Returns:
        [N, C_out, h, w], equal to `mask * F.conv2d(...)`.
    Raises:
        ValueError: wrong channel count, a mask of another size or with NaN in it, unknown backend.
        RuntimeError: an explicit backend that cannot run here.
    Source: arXiv 1912.03203, section 3.3.

    >>> x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    >>> masked_conv2d(x, torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), w)
    tensor([[[[1., 0.],
              [0., 1.]]]])
    """
    _checks.images(x, weight.shape[1] * groups, "masked_conv2d")
    geometry = Geometry((weight.shape[2], weight.shape[3]), _pair(stride), _pair(padding), _pair(dilation))
    h, w = geometry.output_size((x.shape[2], x.shape[3]))
    _checks.mask_for(mask, (x.shape[0], h, w))
    _checks.finite_mask(mask)
    spread = geometry.stride, geometry.padding, geometry.dilation, groups
    if _backends.choose("masked_conv2d", backend, {"cpu": can_run}, x) == "eager":
        return reference.masked_conv2d(x, mask, ConvSpec(weight, bias, *spread))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return OP(x, mask, weight, bias, *spread)
    return _registry.below_autograd(OP, x, mask, weight, bias, *spread)
