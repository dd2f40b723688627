"""The definition of a mean over open positions."""

from __future__ import annotations

from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """sum(mask * x) / max(1, sum(mask)), over both axes of the grid: [N, C, h, w] -> [N, C, 1, 1]."""
    mask = mask.to(x.dtype)
    return (mask * x).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
