"""The definition of a masked convolution: compute everywhere, multiply by the mask."""

from __future__ import annotations

from torch import Tensor

from dynaconv.ops._conv import ConvSpec
from dynaconv.ops._gemm_conv import dense_conv


def masked_conv2d(x: Tensor, mask: Tensor, conv: ConvSpec) -> Tensor:
    """mask * act(conv2d(x)); zero where the mask is closed."""
    y = dense_conv(x, conv)
    return mask.to(y.dtype) * y
