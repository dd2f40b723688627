"""Collecting the masks of a forward pass with hooks, and drawing them as computation maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.convert import halting_stages, masked_blocks
from dynaconv.cost.blocks import BlockCost, block_cost, plain
from dynaconv.nn.channel_block import ChannelBlock
from dynaconv.nn.halting import ponder_cost
from dynaconv.nn.masked_block import MaskedBlock
from dynaconv.nn.spatial_mask import SpatialMask
from dynaconv.ops._conv import Geometry
from dynaconv.ops.mask_ops import branch_sizes


class MaskCollection(dict[str, SpatialMask]):
    """Masks of one forward pass: block name -> SpatialMask [N, 1, h, w], in forward order.

    `costs()` counts each block's multiply-adds, `runs` holds what it counts. Where a gate
    decides over channels, `channels` holds its decisions [N, G, 1, 1], and the mask is the share of them that is open.
    `states` holds what a gate was given beside the block's input.
    """

    def __init__(self, blocks: dict[str, MaskedBlock], stages: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.blocks, self.stages = blocks, stages or {}
        self.channels: dict[str, Tensor] = {}
        self.states: dict[str, tuple[Tensor, ...]] = {}
        self.routing: dict[str, Tensor] = {}
        # What a block decided at each of its runs, and the size (H, W) of its input.
        self.runs: dict[str, list[tuple[Tensor, tuple[int, int]]]] = {}

    def record(self, name: str, x: Tensor, mask: Tensor, *state: Tensor) -> None:
        """Keep the mask that block `name` decided for input x and `state`."""
        self.pop(name, None)
        block, size = self.blocks[name], (x.shape[2], x.shape[3])
        if isinstance(block, ChannelBlock):
            self.channels[name] = mask
            h, w = branch_sizes(size, [Geometry.of(conv) for conv in block.convs])[-1]
            mask = mask.mean(1, keepdim=True).expand(-1, 1, h, w)
        # Compilers know no such subclass.
        self[name] = mask if torch.compiler.is_compiling() else SpatialMask(mask)
        # Costs are counted from the masks that are shown, so that they have gradients for them.
        self.runs.setdefault(name, []).append((self.channels.get(name, self[name]), size))
        self.states[name] = state
        spent = block.gate.spent_macs(x, *state)
        if spent is not None:
            self.routing[name] = spent + self.routing.get(name, 0)

    def costs(self) -> dict[str, BlockCost]:
        """Conditional multiply-adds, block by block; a block that runs twice costs what both runs do."""
        return {
            name: BlockCost(
                tuple(
                    conv
                    for mask, size in self.runs[name]
                    for conv in block_cost(self.blocks[name], mask, size).convs
                )
            )
            for name in self
        }

    def ponder_costs(self) -> dict[str, Tensor]:
        """rho = N + R of each stage with halting units, [N, 1, h, w], by the name of its second unit."""
        found = {}
        for name, stage in self.stages.items():
            if all(unit in self for unit in stage):
                masks = [plain(self[unit]) for unit in stage]
                found[name] = ponder_cost([self.states[unit][0] for unit in stage], masks)
        return found

    def conditional_ratio(self) -> Tensor:
        """Executed over dense conditional multiply-adds, per image [N]."""
        costs = self.costs().values()
        return torch.stack([c.executed_macs for c in costs]).sum(0) / sum(c.dense_macs for c in costs)


class MaskHooks:
    """Hooks on the gates of a network that hand their decisions to `current`, while there is one.

    Compilers cannot follow hooks that come and go, so a training step that is compiled as a whole needs these to stay;
    see `MacBudget.attached`.
    """

    def __init__(self, model: nn.Module, *, detach: bool) -> None:
        self.current: MaskCollection | None = None
        self.detach = detach
        self.blocks, self.stages = masked_blocks(model), halting_stages(model)
        self._handles = [b.gate.register_forward_hook(self._hook_for(n)) for n, b in self.blocks.items()]

    def _hook_for(self, name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(gate: nn.Module, args: tuple, output: Tensor) -> None:
            if self.current is not None:
                tensors = [args[0], output, *args[1:]]
                self.current.record(name, *([t.detach() for t in tensors] if self.detach else tensors))

        return hook

    def collect(self) -> MaskCollection:
        """Start a new collection."""
        self.current = MaskCollection(self.blocks, self.stages)
        return self.current

    def stop(self) -> None:
        """Collect no more; the hooks stay."""
        self.current = None

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def collect_masks(model: nn.Module, *, detach: bool = True) -> Iterator[MaskCollection]:
    """Collect the masks that the gates of `model` decide inside the `with` block; nothing is stored on modules.

    Args:
        model: a dynamic network (a static one yields an empty collection).
        detach: drop the gradient (keep it to build a loss).
    Yields:
        MaskCollection; a block that runs twice shows its last mask, and costs what both runs do.

    >>> import dynaconv as dc
    >>> model = dc.create_model("dynconv_resnet8_cifar").eval()
    >>> with dc.collect_masks(model) as masks: _ = model(torch.randn(2, 3, 32, 32))
    >>> [tuple(m.shape) for m in masks.values()]
    [(2, 1, 32, 32), (2, 1, 16, 16), (2, 1, 8, 8)]
    """
    hooks = MaskHooks(model, detach=detach)
    try:
        yield hooks.collect()
    finally:
        hooks.remove()


def ponder_map(
    masks: MaskCollection, *, weighted: bool = False, size: tuple[int, int] | None = None
) -> Tensor:
    """How much is computed at each pixel: the sum over blocks of the masks, [N, H, W], range 0..number of blocks.

    Args:
        masks: from `collect_masks`.
        weighted: let each block add its executed share of multiply-adds at that pixel (dilated masks included), so
            that a fully active block adds 1; otherwise it adds its mask.
        size: output grid; by default that of the finest mask.
    Source: ponder cost map, arXiv 1912.03203, figure 5; the weighted form is ours.
    """
    if not masks:
        raise _checks.no_gates("ponder_map")
    size = size or max((tuple(m.shape[2:]) for m in masks.values()), key=lambda s: s[0] * s[1])
    if not weighted:
        return torch.stack([_upsample(m.as_subclass(Tensor), size) for m in masks.values()]).sum(0)
    return torch.stack([_share_map(cost, size) for cost in masks.costs().values()]).sum(0)


def mac_density_map(masks: MaskCollection, size: tuple[int, int]) -> Tensor:
    """Share of the conditional multiply-adds that is executed at each pixel, [N, H, W], range 0..1."""
    if not masks:
        raise _checks.no_gates("mac_density_map")
    costs = list(masks.costs().values())
    total = sum(c.dense_macs for c in costs)
    return torch.stack([_share_map(c, size) * (c.dense_macs / total) for c in costs]).sum(0)


def _share_map(cost: BlockCost, size: tuple[int, int]) -> Tensor:
    weights = [c.mask[0].numel() * c.macs_per_position for c in cost.convs]
    maps = [_upsample(c.mask, size) * (w / sum(weights)) for c, w in zip(cost.convs, weights, strict=True)]
    return torch.stack(maps).sum(0)


def _upsample(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask.detach().float(), size=tuple(size), mode="nearest")[:, 0]
