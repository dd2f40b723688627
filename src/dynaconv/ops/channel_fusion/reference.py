"""The definition of dynamic channel fusion, factored and as one kernel for each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dynaconv.ops.dynamic_conv2d.geometry import CONVOLUTIONS, ConvGeometry, pad_axes
from dynaconv.ops.dynamic_conv2d.reference import full_precision

Norm = Callable[[Tensor], Tensor]


class Affine(NamedTuple):
    """A batch norm in evaluation mode: `scale * u + shift`, both [L]; a part that is None is left out.

    >>> Affine(torch.tensor([2.0]), torch.tensor([1.0]))(torch.ones(1, 1, 2))
    tensor([[[3., 3.]]])
    """

    scale: Tensor | None = None
    shift: Tensor | None = None

    def __call__(self, u: Tensor) -> Tensor:
        """u: [B, L, ...]."""
        shape = (-1, *(1 for _ in u.shape[2:]))
        if self.scale is not None:
            u = u * self.scale.to(u.dtype).reshape(shape)
        return u if self.shift is None else u + self.shift.to(u.dtype).reshape(shape)


def centre_taps(x: Tensor, kernel, geometry: ConvGeometry) -> Tensor:
    """Pad (or crop) x so that a 1 x 1 convolution with the same stride reads what the centre taps read."""
    axes = list(zip(kernel, geometry.padding, geometry.dilation, strict=True))
    before = [p - (k // 2) * d for k, p, d in axes]
    after = [p - (k - 1 - k // 2) * d for k, p, d in axes]
    return pad_axes(x, before, after)


def factored(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    fusion: Tensor,
    geometry: ConvGeometry,
    norms: tuple[Norm | None, Norm | None],
) -> Tensor:
    """y = scale * (W0 x + b0) + P (norm2(fusion u) + u), where u = norm1(Q x) sees the centre taps."""
    ones = (1,) * (weight.dim() - 2)
    project = CONVOLUTIONS[len(ones)]
    y = geometry.convolve(x, weight, bias)
    y = y * scale.to(y.dtype).reshape(*scale.shape, *ones)
    u = project(centre_taps(x, weight.shape[2:], geometry), _pointwise(q, ones), stride=geometry.stride)
    u = u if norms[0] is None else norms[0](u)
    fused = torch.bmm(fusion.to(u.dtype), u.flatten(2)).reshape(u.shape)
    fused = fused if norms[1] is None else norms[1](fused)
    return y + project(fused + u, _pointwise(p, ones))


def _pointwise(matrix: Tensor, ones: tuple[int, ...]) -> Tensor:
    return matrix.reshape(matrix.shape[0], matrix.shape[1], *ones)


def folded(
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    fusion: Tensor,
    norms: tuple[Affine | None, Affine | None],
) -> tuple[Tensor, Tensor | None]:
    """W(x) = scale * W0, plus P M Q at the centre tap, with M = fusion + I and both norms absorbed.

    Built in the precision of the weights, also under autocast.
    """
    first, second = (norm or Affine() for norm in norms)
    with full_precision(weight):
        q, p = q.flatten(1), p.flatten(1)
        scale, fusion = scale.to(weight.dtype), fusion.to(weight.dtype)
        mixed = fusion if second.scale is None else fusion * second.scale[:, None]
        mixed = mixed + torch.eye(q.shape[0], dtype=mixed.dtype, device=mixed.device)
        expanded = torch.matmul(p, mixed)
        residual = torch.matmul(expanded, q if first.scale is None else q * first.scale[:, None])
        kernels = weight * scale.reshape(*scale.shape, *(1,) * (weight.dim() - 1))
        # Adding in place touches one tap of each kernel instead of writing all of them again.
        kernels[(..., *(k // 2 for k in weight.shape[2:]))].add_(residual)
        shifts = [] if bias is None else [scale * bias]
        shifts += [] if first.shift is None else [torch.matmul(expanded, first.shift)]
        shifts += [] if second.shift is None else [torch.matmul(p, second.shift).expand_as(scale)]
    return kernels, sum(shifts[1:], shifts[0]) if shifts else None
