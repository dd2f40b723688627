"""Index lists for sparse execution: from masks to the rows of a channels-last activation.

A row is one pixel's C channels. Grids are padded so that a tap outside the image lands on a zero row, and
every list covers the whole batch, so that all images' active pixels share one matrix product.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def active_rows(mask: Tensor) -> Tensor:
    """Flat indices of the open positions of a [N, 1, h, w] mask, int64 [a], ascending."""
    return mask.reshape(-1).nonzero().view(-1)


def channels_last_rows(x: Tensor) -> Tensor:
    """View (or copy) x [N, C, H, W] as rows [N*H*W, C]."""
    return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])


def padded_rows(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Rows of x with a zero border: [N*(H+2p)*(W+2q), C]."""
    if padding == (0, 0):
        return channels_last_rows(x)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return padded.contiguous().view(-1, x.shape[1])


@functools.lru_cache(maxsize=128)
def grid_index(n: int, grid: tuple[int, int], padded: tuple[int, int], stride: tuple[int, int],
               offset: tuple[int, int]) -> Tensor:
    """Row of position (i, y, x) inside a padded grid, [n*h*w] int64: y * stride + offset, likewise x.

    A pure function of sizes, cached because every block of every forward asks for the same few.
    """
    with torch.inference_mode(False):
        ys = torch.arange(grid[0]) * stride[0] + offset[0]
        xs = torch.arange(grid[1]) * stride[1] + offset[1]
        plane = ys[:, None] * padded[1] + xs[None, :]
        return (torch.arange(n)[:, None, None] * (padded[0] * padded[1]) + plane).reshape(-1)


@functools.lru_cache(maxsize=128)
def tap_offsets(kernel: tuple[int, int], dilation: tuple[int, int], padded_width: int) -> Tensor:
    """Row offsets of a kernel's taps from its first tap, [kh*kw] int64, row-major."""
    with torch.inference_mode(False):
        ys = torch.arange(kernel[0]) * dilation[0]
        xs = torch.arange(kernel[1]) * dilation[1]
        return (ys[:, None] * padded_width + xs[None, :]).reshape(-1)
