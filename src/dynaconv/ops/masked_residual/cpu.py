"""Masked residual block on index lists: one list per mask, all images' active rows in one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynaconv.ops import _rows
from dynaconv.ops._conv import ACTIVATIONS, ConvSpec, activate_
from dynaconv.ops._gemm_conv import conv_rows
from dynaconv.ops.mask_ops import branch_masks, branch_sizes
from dynaconv.ops.masked_residual import reference

# Executed over dense conditional MACs above which the dense path is faster; see docs/benchmarks.md, "Break-even".
BREAK_EVEN = 0.8


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
    x: Tensor,
    mask: Tensor,
    shortcut: Tensor,
    convs: Sequence[ConvSpec],
    activation: str,
    packed: Sequence[Tensor],
    break_even: float,
) -> Tensor:
    """Same values as the reference at every position; closed positions cost one activation of the shortcut."""
    geometries = [conv.geometry for conv in convs]
    sizes = branch_sizes((x.shape[2], x.shape[3]), geometries)
    needs = branch_masks(mask, sizes, geometries)
    rows: list[Tensor] = []
    for i, need in enumerate(needs):
        rows.append(rows[-1] if i and need is needs[i - 1] else _rows.active_rows(need))
    if rows[-1].numel() == 0:
        return ACTIVATIONS[activation](shortcut) if activation != "none" else shortcut.clone()
    if _executed_share(rows, needs, convs) > break_even:
        return reference.masked_residual(x, mask, shortcut, convs, activation)
    branch = _branch_rows(x, rows, sizes, convs, packed)
    return _write_back(shortcut, branch, rows[-1], activation)


def _executed_share(rows: Sequence[Tensor], needs: Sequence[Tensor], convs: Sequence[ConvSpec]) -> float:
    executed = sum(r.numel() * c.macs_per_position for r, c in zip(rows, convs, strict=True))
    total = sum(m.numel() * c.macs_per_position for m, c in zip(needs, convs, strict=True))
    return executed / total


def _branch_rows(
    x: Tensor,
    rows: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    convs: Sequence[ConvSpec],
    packed: Sequence[Tensor],
) -> Tensor:
    """Run the chain on compact rows; returns [active, C_out]."""
    n = x.shape[0]
    hidden: Tensor | None = None
    for i, conv in enumerate(convs):
        taps: Tensor | None = None
        if hidden is None:
            hidden = _rows.rows_and_zero(x)
            taps = _rows.tap_table(n, sizes[0], conv.geometry).index_select(0, rows[0])
        elif not conv.geometry.pointwise:
            taps = _compact_taps(n, rows[i - 1], rows[i], sizes[i], conv)
        # The spare last row is the zero that taps outside the image read.
        result = x.new_empty(rows[i].numel() + 1, conv.weight.shape[0])
        result[-1].zero_()
        conv_rows(hidden, taps, packed[i], conv, result[:-1])
        hidden = result
    assert hidden is not None
    return hidden[:-1]


def _compact_taps(n: int, previous: Tensor, rows: Tensor, size: tuple[int, int], conv: ConvSpec) -> Tensor:
    """Compact rows of the previous convolution that each active output reads, [a, taps]."""
    positions = n * size[0] * size[1]
    place = torch.full((positions + 1,), previous.numel(), dtype=torch.int64)
    place[previous] = torch.arange(previous.numel(), dtype=torch.int64)
    taps = _rows.tap_table(n, size, conv.geometry).index_select(0, rows)
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
