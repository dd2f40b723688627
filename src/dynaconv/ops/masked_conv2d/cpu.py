"""Masked convolution on index lists: gather the taps of the active rows, one matrix product, scatter."""

from __future__ import annotations

from torch import Tensor

from dynaconv.ops import _rows
from dynaconv.ops._conv import ConvSpec
from dynaconv.ops._gemm_conv import conv_rows, pack_weight


def masked_conv2d(x: Tensor, mask: Tensor, conv: ConvSpec, packed: Tensor | None = None) -> Tensor:
    """Same values as the reference; closed positions are zero and cost nothing. Result is channels-last."""
    n, _, height, width = x.shape
    h, w = mask.shape[2:]
    rows = _rows.active_rows(mask)
    out = x.new_zeros(n * h * w, conv.weight.shape[0])
    if rows.numel():
        padded = (height + 2 * conv.padding[0], width + 2 * conv.padding[1])
        first = _rows.grid_index(n, (h, w), padded, conv.stride, (0, 0)).index_select(0, rows)
        taps = first[:, None] + _rows.tap_offsets(conv.geometry.kernel, conv.dilation, padded[1])
        source = _rows.padded_rows(x, conv.padding)
        values = x.new_empty(rows.numel(), out.shape[1])
        out[rows] = conv_rows(source, taps, pack_weight(conv) if packed is None else packed, conv, values)
    return out.view(n, h, w, -1).permute(0, 3, 1, 2)
