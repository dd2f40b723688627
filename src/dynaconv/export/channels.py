"""Finding branches whose hidden channels a gate opens image by image: mask * act(conv) before every next convolution.

Source: LAUDNet's channel mode, arXiv 2308.15949; `dynaconv.nn.channel_block`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynaconv.export.branches import SAME_VALUES, Branch, walk_back, walk_on
from dynaconv.export.graph import constant, only_user
from dynaconv.export.parts import Pointwise, Stage, Step, channel_constant, is_static_conv, nodes_of
from dynaconv.export.regions import PerImage, Region


@dataclass(eq=False)
class ChannelBranch(Branch):
    """result = act(shortcut + stages(source)), where every hidden map is multiplied by the mask of its channels.

    The stages' steps hold no products with the mask. product: the last convolution.

    Args:
        decisions: [N, G, 1, 1]; hidden channels are G groups of neighbours.
    """

    decisions: Any = None

    @property
    def mask(self) -> Any:
        """[N, G, 1, 1]."""
        return self.decisions

    @property
    def groups(self) -> int:
        """G."""
        return self.decisions.shape[1]

    @property
    def width(self) -> int:
        """Hidden channels of a group."""
        return self.stages[0].weight.shape[0] // self.groups


def find_channel_branches(masks: dict[str, Any]) -> list[ChannelBranch]:
    """All such branches, in the order of the masks: block -> what its gate decided."""
    found = [_branch(name, mask) for name, mask in masks.items() if _decides_channels(mask)]
    return [branch for branch in found if branch is not None]


def _decides_channels(mask: Any) -> bool:
    shape = [] if mask.shape is None else list(mask.shape)
    return len(shape) == 4 and isinstance(shape[1], int) and shape[1] > 1 and shape[2:] == [1, 1]


def _branch(name: str, mask: Any) -> ChannelBranch | None:
    spread = _spread(mask)
    convs = [_conv_behind(use.node) for value in spread for use in value.uses() if use.node.op_type == "Mul"]
    if not convs or None in convs:
        return None
    # All but the last convolution lie in front of a product, which the next one reads.
    for end in convs:
        stages = _stages(end, spread)
        if len(stages) == len(convs) + 1 and _fits(stages, mask.shape[1]):
            branch = ChannelBranch(name, end, stages, end.outputs[0], decisions=mask)
            branch.inner = [node for stage in stages for node in (stage.conv, *_nodes(stage))]
            walk_on(branch)
            for stage in stages:
                stage.after = [step for step in stage.after if not isinstance(step, PerImage)]
            return branch
    return None


def _spread(mask: Any) -> list[Any]:
    """The mask, and what is made of it alone."""
    found, waiting = [], [mask]
    while waiting:
        value = waiting.pop()
        found.append(value)
        nodes = [use.node for use in value.uses() if use.idx == 0 and use.node.op_type in SAME_VALUES]
        waiting += [node.outputs[0] for node in nodes if node.op_type != "MaxPool"]
    return found


def _conv_behind(product: Any) -> Any:
    """The convolution that alone reads a product with the mask, or None."""
    node = only_user(product.outputs[0])
    return node if is_static_conv(node) and node.inputs[0] is product.outputs[0] else None


def _stages(end: Any, spread: list[Any]) -> list[Stage]:
    """The convolutions up to `end` with a product with the mask between each two."""
    stages = walk_back(end.outputs[0])
    first = len(stages) - 1
    while first > 0 and _masked(stages[first - 1], spread):
        first -= 1
    return stages[first:] if stages and not stages[-1].after else []


def _masked(stage: Stage, spread: list[Any]) -> bool:
    """A static convolution, activations, and the mask."""
    *steps, last = stage.after or [None]
    gated = isinstance(last, PerImage) and any(last.vector is value for value in spread)
    return gated and is_static_conv(stage.conv) and all(map(_treats_channels_alike, steps))


def _treats_channels_alike(step: Step) -> bool:
    """The same function of every number, whatever its channel."""
    if isinstance(step, Region):
        values = [v for node in step.nodes for v in node.inputs if v is not None]
        return not step.last and all(constant(v) is None or constant(v).size == 1 for v in values)
    return isinstance(step, Pointwise) and (step.silu or channel_constant(step.node) is None)


def _fits(stages: list[Stage], groups: int) -> bool:
    """The hidden maps have the same channels, and no group of a convolution is parted; the last one has no groups."""
    *hidden, last = stages
    width = hidden[0].weight.shape[0]
    alike = all(
        stage.weight.shape[0] == width and (stage.groups == 1 or stage.groups % groups == 0)
        for stage in hidden
    )
    whole = hidden[0].groups == 1 or hidden[0].inputs == width
    return alike and whole and last.groups == 1 and width % groups == 0


def _nodes(stage: Stage) -> list[Any]:
    return [node for step in stage.after for node in nodes_of(step)]
