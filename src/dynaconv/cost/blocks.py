"""Conditional multiply-adds of a masked block, counted from its mask (rules: docs/concepts.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.masked_block import MaskedBlock
from dynaconv.ops._conv import Geometry
from dynaconv.ops.mask_ops import branch_masks, branch_sizes


@dataclass(frozen=True)
class ConvCost:
    """One convolution (its path from the masked block), the mask it runs on [N, 1, h, w], multiply-adds a position."""

    name: str
    mask: Tensor
    macs_per_position: int


@dataclass(frozen=True)
class BlockCost:
    """Conditional multiply-adds of one block over a batch."""

    convs: tuple[ConvCost, ...]

    @property
    def executed_macs(self) -> Tensor:
        """Multiply-adds that the masks ask for, per image [N], float64, carrying gradient."""
        parts = [c.mask.sum((1, 2, 3), dtype=torch.float64) * c.macs_per_position for c in self.convs]
        return torch.stack(parts).sum(0)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of one image with every position open."""
        return sum(c.mask[0].numel() * c.macs_per_position for c in self.convs)


def conv_macs_per_position(conv: nn.Module) -> int:
    """kh * kw * C_in * C_out / groups, plus C_out for a bias; the kernel of one sample where it is dynamic."""
    if isinstance(conv, DynamicConv):
        return conv.kernel_numel
    return conv.weight.numel() + (0 if conv.bias is None else conv.out_channels)


def block_cost(block: MaskedBlock, mask: Tensor, size: tuple[int, int]) -> BlockCost:
    """Cost of a block that was given an input of `size` = (H, W) and decided `mask`."""
    convs = block.convs
    geometries = [Geometry.of(conv) for conv in convs]
    plain = mask.as_subclass(Tensor)
    needs = branch_masks(plain, branch_sizes(size, geometries), geometries, gradient=block.dilation_gradient)
    names = block.conv_paths
    return BlockCost(
        tuple(
            ConvCost(name, need, conv_macs_per_position(conv))
            for name, need, conv in zip(names, needs, convs, strict=True)
        )
    )
