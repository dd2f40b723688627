"""From the compiler's graph to the flat plan: values, grids, convolutions and steps in order of execution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dynaconv.engine import lower_aten, lower_convolutions, lower_maps, lower_masks, lower_mixed
from dynaconv.engine.aten import encode, slot_ref
from dynaconv.engine.ir import Constant, Graph, Node, View
from dynaconv.engine.plan import Conv, External, Plan, Segment, Step, Value

_ALIASING_BYTES, _ALIASING_ELEMENTS = 2048, 16
# What emits the steps of a node, by its operation.
EMIT: dict[str, Callable[[Lowering, Node], None]] = {
    **lower_convolutions.EMIT,
    **lower_mixed.EMIT,
    **lower_maps.EMIT,
    **lower_masks.EMIT,
    **lower_aten.EMIT,
}


def lower(graph: Graph, batch: int | None = None, inputs: int = 1) -> Plan:
    """The plan of a graph whose passes are done; offsets in the arena come later (arena.py)."""
    lowering = Lowering(graph, batch)
    lowering.plan.inputs = lowering.plan.slots = inputs
    return lowering.run()


class Lowering:
    """Walks over the graph, gives every result its place, and lets `EMIT` write the steps."""

    def __init__(self, graph: Graph, batch: int | None) -> None:
        self.graph = graph
        self.plan = Plan(batch=batch)
        self.values: dict[Node, int] = {}
        self.slots: dict[Node, int] = {}
        self.grids: dict[Node, int] = {}
        self.users = graph.users()
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.first_native = 0
        # Memory of which some values are a part.
        self.shared: set[int] = set()
        self.pieces = self._pieces()

    def run(self) -> Plan:
        """Emit every node's steps, in order."""
        plan = self.plan
        for node in self.graph.nodes:
            if node.op == "input":
                self._input(node)
            else:
                EMIT["mixed" if node.op == "conv" and node.is_mixed else node.op](self, node)
        plan.outputs = [encode(self.argument(o), plan.constants) for o in self.graph.outputs]
        self._cut()
        for grid in {s.grid for s in plan.steps if s.closed and s.kind != "stem"}:
            plan.grids[grid].closed = 1
        return plan

    def _pieces(self) -> dict[Node, tuple[Node, int]]:
        """What is computed where its concatenation wants it: in which one, and from which channel on."""
        found = {}
        for node in self.graph.nodes:
            if node.op != "concat" or self.is_made(node):
                continue
            channel = 0
            for piece in node.inputs.values():
                if len(self.users[piece]) == 1 and not piece.is_grid and piece.op not in ("aten", "input"):
                    found[piece] = (node, channel)
                channel += piece.size[2]
        return found

    def room(self, size: tuple[int, int, int], name: str, share: int = -1, external: str = "") -> int:
        """A new value of this size; it shares the memory of another, or lies outside of the arena."""
        h, w, c = size
        stride = c if external or (c * 4) % _ALIASING_BYTES else c + _ALIASING_ELEMENTS
        index = len(self.plan.values)
        storage = index if share < 0 else self.plan.values[share].storage
        value = Value(h, w, c, stride, storage, name=name)
        self.plan.values.append(value)
        if external:
            value.external = len(self.plan.externals)
            self.plan.externals.append(External(index, external))
        return index

    def slot(self, node: Node) -> int:
        """Where the caller, or an ATen step, finds the value."""
        if node not in self.slots:
            self.slots[node] = self.plan.slots
            self.plan.slots += 1
        return self.slots[node]

    def part(self, node: Node, of: int, start: int) -> int:
        """Channels of a value, from `start` on, as the value of a node."""
        source, index = self.plan.values[of], len(self.plan.values)
        value = replace(source, channels=node.size[2], first=source.first + start, name=node.layer)
        self.plan.values.append(value)
        self.shared.add(source.storage)
        self.values[node] = index
        return index

    def whole(self, node: Node) -> int:
        """The value of a concatenation, some of whose parts may already be in it."""
        if node not in self.values:
            self.result(node)
        return self.values[node]

    def is_made(self, node: Node) -> bool:
        """ATen or the caller reads the value, so it lies outside of the arena."""
        return any(user is None or user.op == "aten" for user in self.users[node])

    def result(self, node: Node, share: int = -1) -> int:
        """The value of a node's result."""
        made = self.is_made(node)
        if not made and share < 0 and node in self.pieces:
            whole, start = self.pieces[node]
            return self.part(node, self.whole(whole), start)
        index = self.room(node.size, node.layer, -1 if made else share, "made" if made else "")
        if made:
            external = self.plan.externals[-1]
            external.slot = self.slot(node)
        self.values[node] = index
        return index

    def value(self, node: Node) -> int:
        """Rows that hold a node's value, for a native reader."""
        if node not in self.values:
            if node.is_grid or node.op == "open_channels":
                out = self.result(node)
                self.step("mask_value", node, grid=self.grids[node], out=out)
            else:
                assert node.op in ("aten", "input")
                source = self.external(node)
                self.values[node] = source
                if node.op == "input":
                    self.values[node] = self.room(node.size, node.layer)
                    self.step("layout", node, input=source, out=self.values[node])
        return self.values[node]

    def external(self, node: Node) -> int:
        """An external value that holds the image, or what an ATen step made."""
        source = "input" if node.op == "input" else "slot"
        index = self.room(node.size, node.layer, external=source)
        self.plan.externals[-1].slot = self.slot(node)
        self.plan.externals[-1].layout = node.attrs.get("held", "nchw")
        return index

    def step(self, kind: str, node: Node, **fields: Any) -> Step:
        """One step more."""
        step = Step(kind, layer=node.layer, **fields)
        self.plan.steps.append(step)
        return step

    def conv_data(self, conv: Conv) -> list[int]:
        """A convolution as the only one of a step."""
        self.plan.convs.append(conv)
        return [len(self.plan.convs) - 1, -1, -1]

    def _input(self, node: Node) -> None:
        index = node.attrs["index"]
        self.slots[node] = index
        if node.size is not None and index == 0:
            h, w, c = node.size
            self.plan.image = (c, h, w)

    def is_last_reader(self, node: Node, source: Node) -> bool:
        """Nobody reads this operand later, and its memory is its own."""
        if source.is_grid or source not in self.values:
            return False
        value = self.plan.values[self.values[source]]
        if value.external >= 0 or value.storage in self.shared:
            return False
        return all(u is not None and self.place[u] <= self.place[node] for u in self.users[source])

    def geometry(self, node: Node) -> list[int]:
        """Kernel, stride, padding and dilation of what has no weights, as the only convolution of a step."""
        channels, attrs = node.x.size[2] if "x" in node.inputs else 1, node.attrs
        return self.conv_data(
            Conv(
                "none",
                channels,
                channels,
                1,
                *(attrs[k] for k in ("kernel", "stride", "padding", "dilation")),
            )
        )

    def argument(self, arg: Any) -> Any:
        """A reference to what a view looks at; constants as tensors; others as they are."""
        if isinstance(arg, Constant):
            return arg.tensor
        if not isinstance(arg, View):
            return arg
        node = arg.node
        if node.op in ("aten", "input"):
            held = node.attrs.get("held", "nchw" if node.size is not None else "raw")
            return slot_ref(self.slot(node), held, arg.layout)
        return slot_ref(self.slot(node), "rows", arg.layout)

    def close_segment(self) -> None:
        """What was emitted since the last ATen step is one native call."""
        if len(self.plan.steps) > self.first_native:
            self.plan.segments.append(Segment(self.first_native, len(self.plan.steps)))
            self.first_native = len(self.plan.steps)

    def _cut(self) -> None:
        self.close_segment()
        last: dict[int, int] = {}
        for i, step in enumerate(self.plan.aten):
            for slot in _slots_in([step.args, step.kwargs]):
                last[slot] = i
        keep = set(_slots_in(self.plan.outputs)) | {e.slot for e in self.plan.externals}
        for slot, i in last.items():
            if slot not in keep:
                self.plan.aten[i].frees.append(slot)


def _slots_in(tree: Any) -> list[int]:
    if isinstance(tree, list):
        return [s for t in tree for s in _slots_in(t)]
    if isinstance(tree, dict):
        return [tree["slot"]] if tree.get("$") == "slot" else [s for t in tree.values() for s in _slots_in(t)]
    return []
