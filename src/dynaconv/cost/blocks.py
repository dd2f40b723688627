"""Conditional multiply-adds of a masked block, counted from its mask (rules: docs/concepts.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.nn.channel_block import ChannelBlock, conv_share
from dynaconv.nn.masked_block import MaskedBlock
from dynaconv.nn.spatial_mask import SpatialMask
from dynaconv.ops._conv import Geometry
from dynaconv.ops.mask_ops import branch_sizes


@dataclass(frozen=True)
class ConvCost:
    """One convolution (its path from the masked block), the mask it runs on [N, 1, h, w], multiply-adds a position.

    The mask holds shares between 0 and 1 where channels are skipped instead of positions.
    """

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


def block_cost(block: MaskedBlock, mask: Tensor, size: tuple[int, int]) -> BlockCost:
    """Cost of a block that was given an input of `size` = (H, W) and decided `mask`.

    mask: [N, 1, h, w], or the decisions [N, G, 1, 1] of a `ChannelBlock`; a convolution's mask is then the share of its
    multiply-adds that is executed, at every position.
    """
    if isinstance(block, ChannelBlock):
        return _channel_cost(block, mask, size)
    needs = _needs(block, plain(mask), size)
    return BlockCost(
        tuple(
            ConvCost(name, need, macs)
            for name, need, macs in zip(block.conv_paths, needs, block.macs_per_position, strict=True)
        )
    )


def plain(mask: Tensor) -> Tensor:
    """The mask as an ordinary tensor."""
    return mask.as_subclass(Tensor) if isinstance(mask, SpatialMask) else mask


def _needs(block: MaskedBlock, mask: Tensor, size: tuple[int, int]) -> list[Tensor]:
    if not (block.gate.scope == "image" and mask.requires_grad):
        return block.needs(mask, size, block.dilation_gradient)
    # One decision opens every position at once, so its gradient is what an open image needs.
    decision = mask[:, :, :1, :1]
    change = decision - decision.detach()
    needs, full = block.needs(mask.detach(), size), block.needs(torch.ones_like(mask[:1]), size)
    return [need + change * open_ for need, open_ in zip(needs, full, strict=True)]


def _channel_cost(block: ChannelBlock, mask: Tensor, size: tuple[int, int]) -> BlockCost:
    kept = mask.double().mean(1, keepdim=True)
    convs = block.convs
    sizes = branch_sizes(size, [Geometry.of(conv) for conv in convs])[1:]
    shares = [conv_share(i, conv, len(convs) - 1, kept) for i, conv in enumerate(convs)]
    return BlockCost(
        tuple(
            ConvCost(name, share.expand(-1, 1, *grid), macs)
            for name, share, grid, macs in zip(
                block.conv_paths, shares, sizes, block.macs_per_position, strict=True
            )
        )
    )
