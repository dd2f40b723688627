"""Masked residual block on index lists: one list per mask, all images' active rows in one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynaconv.ops import _rows
from dynaconv.ops._conv import ACTIVATIONS, Geometry, activate_
from dynaconv.ops._gemm_conv import conv_rows
from dynaconv.ops.mask_ops import branch_masks, branch_sizes
from dynaconv.ops.masked_residual import reference
from dynaconv.ops.masked_residual.branch import PackedBranch

# Executed over dense conditional MACs above which the dense path is faster, measured with
# `make bench ARGS="--break-even"`; see docs/blocks.md. Depthwise rows are bound by memory, so they pay least.
# That of the compiled kernels is in csrc/torch/masked_operators.cpp.
BREAK_EVEN_ROWS, BREAK_EVEN_DEPTHWISE = 0.6, 0.35


def can_run(x: Tensor) -> str | None:
    """Why the index-list executor cannot run on this input, or None when it can."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, the input is on {x.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, and the executor keeps the input's precision"
    if not x.is_floating_point():
        return f"it needs a floating dtype, got {x.dtype}"
    return None


def masked_residual(
    x: Tensor, mask: Tensor, shortcut: Tensor, branch: PackedBranch, break_even: float | None
) -> Tensor:
    """Same values as the reference at every position; closed positions cost one activation of the shortcut."""
    activation = branch.activation
    if break_even is None:
        depthwise = any(conv.depthwise for conv in branch.convs)
        break_even = BREAK_EVEN_DEPTHWISE if depthwise else BREAK_EVEN_ROWS
    last = _rows.active_rows(mask)
    if last.numel() == 0:
        return ACTIVATIONS[activation](shortcut) if activation != "none" else shortcut.clone()
    sizes = branch_sizes((x.shape[2], x.shape[3]), branch.geometries)
    needs = branch_masks(mask, sizes, branch.geometries)
    rows = [last]
    for i in range(len(needs) - 2, -1, -1):
        rows.insert(0, rows[0] if needs[i] is needs[i + 1] else _rows.active_rows(needs[i]))
    if _executed_share(rows, needs, branch.macs_per_position) > break_even:
        return reference.masked_residual(x, mask, shortcut, branch.convs, activation)
    return _write_back(shortcut, _branch_rows(x, rows, sizes, branch), last, activation)


def _executed_share(rows: Sequence[Tensor], needs: Sequence[Tensor], macs: Sequence[int]) -> float:
    executed = sum(r.numel() * m for r, m in zip(rows, macs, strict=True))
    return executed / sum(n.numel() * m for n, m in zip(needs, macs, strict=True))


def _branch_rows(
    x: Tensor, rows: Sequence[Tensor], sizes: Sequence[tuple[int, int]], branch: PackedBranch
) -> Tensor:
    """Run the chain on compact rows; returns [active, C_out]."""
    n = x.shape[0]
    hidden = _rows.rows_and_zero(x)
    for i, (conv, geometry) in enumerate(zip(branch.convs, branch.geometries, strict=True)):
        taps: Tensor | None = None
        if i == 0:
            taps = _rows.tap_table(n, sizes[0], geometry).index_select(0, rows[0])
        elif not geometry.pointwise:
            taps = _compact_taps(n, rows[i - 1], rows[i], sizes[i], geometry)
        # The spare last row is the zero that taps outside the image read.
        result = x.new_empty(rows[i].numel() + 1, conv.weight.shape[0])
        result[-1].zero_()
        conv_rows(hidden, taps, branch.packed[i], conv, result[:-1])
        hidden = result
    return hidden[:-1]


def _compact_taps(
    n: int, previous: Tensor, rows: Tensor, size: tuple[int, int], geometry: Geometry
) -> Tensor:
    """Compact rows of the previous convolution that each active output reads, [a, taps]."""
    positions = n * size[0] * size[1]
    place = torch.full((positions + 1,), previous.numel(), dtype=torch.int64)
    place[previous] = torch.arange(previous.numel(), dtype=torch.int64)
    taps = _rows.tap_table(n, size, geometry).index_select(0, rows)
    return place.index_select(0, taps.view(-1)).view_as(taps)


def _write_back(shortcut: Tensor, branch: Tensor, rows: Tensor, activation: str) -> Tensor:
    """act(shortcut) everywhere, act(shortcut + branch) at the active rows; always channels-last."""
    n, c, h, w = shortcut.shape
    before = _rows.channels_last_rows(shortcut)
    branch += before.index_select(0, rows)
    activate_(branch, activation)
    after = ACTIVATIONS[activation](before) if activation != "none" else before.clone()
    after[rows] = branch
    return after.view(n, h, w, c).permute(0, 3, 1, 2)
