"""Budget losses, and the bounds that let blocks move away from the target.

Source: DynConv, arXiv 1912.03203, section 3.4 and the released code; ConvNet-AIG, 1711.11503, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("network", "blocks")


def bounds(target: float, progress: float) -> tuple[float, float]:
    """(upper, lower) bound of a block's executed share; progress p runs from 0 to 1 while the bounds open.

    q = cos^2(p * pi / 2); upper = 1 - q (1 - target); lower = q * target.

    >>> [round(v, 4) for v in bounds(0.3, 0.25)]
    [0.4025, 0.2561]
    """
    q = math.cos(min(max(progress, 0.0), 1.0) * math.pi / 2) ** 2
    return 1 - q * (1 - target), q * target


@dataclass(frozen=True)
class BudgetLoss:
    """The two terms (scalars), the ratios they were made of, and the multiply-adds of each block."""

    network: Tensor
    blocks: Tensor
    ratio: Tensor
    block_ratios: Tensor
    upper: float | Tensor
    lower: float | Tensor
    executed_macs: Tensor
    dense_macs: Tensor

    @property
    def total(self) -> Tensor:
        """L_net + L_block, to be multiplied by alpha."""
        return self.network + self.blocks


def budget_loss(
    executed_macs: Tensor, dense_macs: Tensor, target: float, progress: float, kind: str = "network"
) -> BudgetLoss:
    """Sparsity loss over a batch.

    Args:
        executed_macs: [B] conditional multiply-adds executed in each of B blocks, summed over the batch (c_i).
        dense_macs: [B] the same with every position open (t_i).
        target: budget in (0, 1].
        progress: 0..1, how far the block bounds have opened.
        kind: "network" (DynConv) or "blocks" (ConvNet-AIG).
    Returns:
        network: L_net = (sum c / sum t - target)^2 and
        L_block = mean of max(0, r_i - upper)^2 + max(0, lower - r_i)^2 with r_i = c_i / t_i;
        blocks: L_net = 0 and L_block = mean of (r_i - target)^2.
    """
    upper, lower = limits(target, progress, kind)
    return loss_terms(executed_macs, dense_macs, target, upper, lower, kind)


def limits(target: float, progress: float, kind: str) -> tuple[float, float]:
    """(upper, lower) of a block's share: opening bounds, or the target itself."""
    return bounds(target, progress) if kind == "network" else (target, target)


def loss_terms(
    executed_macs: Tensor,
    dense_macs: Tensor,
    target: float | Tensor,
    upper: float | Tensor,
    lower: float | Tensor,
    kind: str,
) -> BudgetLoss:
    """`budget_loss` with given limits; as tensors they may change without a compiled step being compiled again."""
    block_ratios = executed_macs / dense_macs
    ratio = executed_macs.sum() / dense_macs.sum()
    over = torch.clamp(block_ratios - upper, min=0) ** 2
    under = torch.clamp(lower - block_ratios, min=0) ** 2
    whole = (ratio - target) ** 2 if kind == "network" else torch.zeros_like(ratio)
    blocks = (over + under).mean()
    return BudgetLoss(whole, blocks, ratio, block_ratios, upper, lower, executed_macs, dense_macs)
