"""The definition of a masked residual block: compute everywhere, multiply once, add."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dynaconv.ops._conv import ACTIVATIONS, ConvSpec
from dynaconv.ops._gemm_conv import dense_conv


def masked_residual(
    x: Tensor, mask: Tensor, shortcut: Tensor, convs: Sequence[ConvSpec], activation: str
) -> Tensor:
    """y = act(shortcut + mask * branch(x)) (arXiv 1912.03203, equation 1)."""
    hidden = x
    for conv in convs:
        hidden = dense_conv(hidden, conv)
    return ACTIVATIONS[activation](shortcut + mask.to(hidden.dtype) * hidden)
