"""Index lists for sparse execution: from masks to the rows of a channels-last activation.

A row is one pixel's C channels. The row after the last one is zero and stands for everything outside the image.
Every list covers the whole batch, so that all images' active pixels share one matrix product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dynaconv.ops._conv import Geometry


def active_rows(mask: Tensor) -> Tensor:
    """Flat indices of the open positions of a [N, 1, h, w] mask, int64 [a], ascending."""
    return mask.reshape(-1).nonzero().view(-1)


def channels_last_rows(x: Tensor) -> Tensor:
    """View (or copy) x [N, C, H, W] as rows [N*H*W, C]."""
    return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])


def rows_and_zero(x: Tensor) -> Tensor:
    """Rows of x followed by one zero row: [N*H*W + 1, C]."""
    return torch.cat((channels_last_rows(x), x.new_zeros(1, x.shape[1])))


@functools.lru_cache(maxsize=32)
def tap_table(n: int, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Input rows that each output position reads, int64 [n*h*w, taps]; taps outside the image read row n*H*W.

    A pure function of sizes, cached because every forward asks for the same few.
    """
    with torch.inference_mode(False):
        h, w = geometry.output_size(size)
        ys = torch.arange(h)[:, None] * geometry.stride[0] - geometry.padding[0]
        xs = torch.arange(w)[:, None] * geometry.stride[1] - geometry.padding[1]
        ys = ys + torch.arange(geometry.kernel[0]) * geometry.dilation[0]
        xs = xs + torch.arange(geometry.kernel[1]) * geometry.dilation[1]
        # [h, w, kh, kw]
        plane = ys[:, None, :, None] * size[1] + xs[None, :, None, :]
        inside = ((ys >= 0) & (ys < size[0]))[:, None, :, None] & ((xs >= 0) & (xs < size[1]))[
            None, :, None, :
        ]
        image = torch.arange(n)[:, None, None, None, None] * (size[0] * size[1])
        rows = torch.where(inside, plane + image, n * size[0] * size[1])
        return rows.view(n * h * w, -1)
