"""Finding masked branches in an ONNX graph: shortcut + mask * (convolutions of x), by structure, not by class.

Source: DynConv, arXiv 1912.03203, equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynaconv.export.graph import attribute, constant, only_user
from dynaconv.export.own import BINNED, COMPUTED, FUSED
from dynaconv.export.parts import (
    ComputedStage,
    FusedStage,
    Pointwise,
    RoutedStage,
    Stage,
    Step,
    channel_constant,
    is_sigmoid,
    is_static_conv,
    is_unary,
    nodes_of,
)
from dynaconv.export.regions import Joined, find_per_image, find_pooled, find_region, find_squeeze

# A mask of 0 and 1 stays one.
SAME_VALUES = (
    "Cast", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Expand", "Slice", "Identity", "MaxPool", "Transpose", "Tile",
    "Gather",
)  # fmt: skip


@dataclass(eq=False)
class Branch:
    """result = act(shortcut + mask * stages(source)); shortcut and act may be missing."""

    name: str
    product: Any
    stages: list[Stage]
    result: Any
    add: Any = None
    act: Any = None
    inner: list[Any] = field(default_factory=list)

    @property
    def own(self) -> list[Any]:
        """Nodes of our own: its convolutions that depend on the image, and the means over parts of what they read."""
        routed = [stage for stage in self.stages if isinstance(stage, RoutedStage)]
        totals = [stage.pooled.total for stage in routed if stage.pooled is not None]
        return [*(stage.conv for stage in routed), *(node for node in totals if node.op_type == BINNED)]

    # Asked of the nodes each time, because the graph changes while it is rewritten.
    @property
    def mask(self) -> Any:
        """[N, 1, h, w] or [N, 1, 1, 1]."""
        end = self._end
        return next(v for v in self.product.inputs if v is not end)

    @property
    def channels(self) -> int:
        """Of its result."""
        return self.product.outputs[0].shape[1]

    @property
    def source(self) -> Any:
        """The map that the first convolution reads."""
        return self.stages[0].conv.inputs[0]

    @property
    def shortcut(self) -> Any:
        """What passes where the mask is closed; None: zeros."""
        return (
            None if self.add is None else next(v for v in self.add.inputs if v is not self.product.outputs[0])
        )

    @property
    def _end(self) -> Any:
        last = self.stages[-1]
        return last.after[-1].node.outputs[0] if last.after else last.conv.outputs[0]


def binary_values(graph: Any, masks: dict[str, Any]) -> dict[Any, str]:
    """Values that hold only 0 and 1: what gates decided, other comparisons, and what is made of them alone.

    Returns:
        value -> the block whose gate decided it; of several the last, and nothing where no gate did.
    """
    import onnx_ir as ir

    found: dict[Any, str] = {value: name for name, value in masks.items()}
    order = {"": -1} | {name: i for i, name in enumerate(masks)}
    for node in graph:
        x = node.inputs[0] if node.inputs else None
        names = [found[v] if v in found else "" if _is_ones(v) else None for v in node.inputs]
        made = node.op_type == "Cast" and x is not None and x.dtype == ir.DataType.BOOL
        made = made or (node.op_type in SAME_VALUES and x is not None and names[0] is not None)
        if made or (node.op_type == "Mul" and None not in names):
            name = max((n for n in names if n), key=order.__getitem__, default="")
            for value in node.outputs:
                found.setdefault(value, name)
    return found


def _is_ones(value: Any) -> bool:
    array = constant(value)
    return array is not None and bool(np.isin(array, (0, 1)).all())


def find_branches(graph: Any, masks: dict[str, Any]) -> list[Branch]:
    """All masked branches, in the order of the graph; named after the block whose mask they use."""
    binary = binary_values(graph, masks)
    found, taken = [], set()
    for node in graph:
        branch = _branch(node, binary) if node.op_type == "Mul" else None
        if branch is not None and not taken & set(branch.inner):
            branch.name = binary[branch.mask] or branch.name
            taken |= set(branch.inner)
            found.append(branch)
    return found


def _branch(node: Any, binary: dict[Any, str]) -> Branch | None:
    masks = [i for i, v in enumerate(node.inputs) if v in binary and _is_grid(v)]
    if len(masks) != 1:
        return None
    mask, end = node.inputs[masks[0]], node.inputs[1 - masks[0]]
    stages = walk_back(end)
    if not stages or end.shape is None or not isinstance(end.shape[1], int):
        return None
    branch = Branch(mask.name, node, stages, node.outputs[0], inner=[node])
    for stage in stages:
        branch.inner += [stage.conv, *(n for step in stage.after for n in nodes_of(step))]
    walk_on(branch)
    return branch


def _is_grid(value: Any) -> bool:
    """[N, 1, h, w]."""
    return value.shape is not None and len(value.shape) == 4 and value.shape[1] == 1


def walk_back(value: Any) -> list[Stage]:
    """Convolutions that nobody else reads, up to `value`."""
    stages: list[Stage] = []
    after: list[Step] = []
    readers = 1
    while value.producer() is not None and len(value.uses()) == readers and not value.is_graph_output():
        node, readers = value.producer(), 1
        silu = _silu_source(node)
        place = channel_constant(node)
        joined = _joined(node)
        if is_static_conv(node):
            stages.insert(0, Stage(node, after))
            after, value = [], node.inputs[0]
            readers += sum(isinstance(step, Joined) and step.beside is value for step in stages[0].after)
        elif joined is not None:
            after, value = [joined, *after], joined.source
        elif _routed(node) is not None:
            stage = _routed(node)(node, after)
            stages.insert(0, stage)
            after, value = [], node.inputs[0]
            readers = _readers(stage, value)
        elif silu is not None:
            after, value, readers = [Pointwise(node, True), *after], silu, 2
        elif is_unary(node):
            after, value = [Pointwise(node), *after], node.inputs[0]
        elif place is not None:
            after, value = [Pointwise(node), *after], node.inputs[1 - place]
        else:
            step = find_squeeze(node) or find_per_image(node) or find_region(node)
            if step is None:
                break
            after, value = [step, *after], step.source
            readers = sum(use.node in nodes_of(step) for use in value.uses())
    return stages


def _joined(node: Any) -> Joined | None:
    """The step, if this node joins the map that a convolution reads with what activations make of its result."""
    if node.op_type != "Concat" or len(set(node.inputs)) != 2 or attribute(node, "axis") % 4 != 1:
        return None
    for beside, source in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        made = source.producer()
        while is_unary(made) and only_user(made.outputs[0]) is not None:
            made = made.inputs[0].producer()
        if is_static_conv(made) and made.inputs[0] is beside and Stage(made, []).centred:
            return Joined(node, beside, source)
    return None


def _routed(node: Any) -> type[RoutedStage] | None:
    """What this node is, if it is a convolution that depends on the image and the shapes of its parts are known."""
    if node.op_type == COMPUTED:
        shape = node.inputs[1].shape
        known = shape is not None and len(shape) == 5 and all(isinstance(d, int) for d in list(shape)[1:])
        return ComputedStage if known else None
    if node.op_type == FUSED:
        parts = [constant(v) is not None for v in node.inputs[1:5] + node.inputs[7:11] if v is not None]
        return FusedStage if all(parts) else None
    return None


def _readers(stage: RoutedStage, value: Any) -> int:
    """How many uses of a map belong to the convolution that reads it, with its router; -1: others read it, too."""
    ends = [stage.conv]
    for use in value.uses():
        pooled = find_pooled(use.node, value, stage.decided)
        if pooled is not None and stage.pooled is None:
            stage.pooled = pooled
            ends.append(pooled.total)
    for use in value.uses():
        pools = stage.pooled is not None and use.node in stage.pooled.nodes
        if not pools and use.node is not stage.conv and not any(_leads_to(use.node, end) for end in ends):
            return -1
    return len(value.uses())


def _leads_to(node: Any, end: Any) -> bool:
    """Nothing but the dense result of `end`, a node of our own, needs what this node makes."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is end or node in seen:
            continue
        seen.add(node)
        uses = [use for value in node.outputs for use in value.uses()]
        if not uses or any(value.is_graph_output() for value in node.outputs):
            return False
        if any(use.node is end and use.idx != len(end.inputs) - 1 for use in uses):
            return False
        waiting += [use.node for use in uses]
    return True


def walk_on(branch: Branch) -> None:
    """The addition of a shortcut behind the product, and the activation behind that."""
    use = only_user(branch.result)
    if use is None or use.op_type != "Add":
        return
    other = next(v for v in use.inputs if v is not branch.result) if len(set(use.inputs)) == 2 else None
    shapes = [
        None if v is None or v.shape is None else tuple(map(str, v.shape)) for v in (other, branch.result)
    ]
    if other is None or shapes[0] is None or shapes[0][1:] != shapes[1][1:]:
        return
    branch.add, branch.result = use, use.outputs[0]
    branch.inner.append(use)
    act = only_user(branch.result)
    if is_unary(act):
        if act.outputs[0].shape is None:
            act.outputs[0].shape = branch.result.shape
        branch.act, branch.result = act, act.outputs[0]
        branch.inner.append(act)


def _silu_source(node: Any) -> Any:
    """x of x * sigmoid(x)."""
    if node.op_type != "Mul" or len(node.inputs) != 2:
        return None
    for x, gate in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        if is_sigmoid(gate) and gate.producer().inputs[0] is x and only_user(gate) is node:
            return x
    return None
