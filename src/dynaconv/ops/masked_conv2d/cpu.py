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
        taps = _rows.tap_table(n, (height, width), conv.geometry).index_select(0, rows)
        values = x.new_empty(rows.numel(), out.shape[1])
        packed = pack_weight(conv) if packed is None else packed
        out[rows] = conv_rows(_rows.rows_and_zero(x), taps, packed, conv, values)
    return out.view(n, h, w, -1).permute(0, 3, 1, 2)
