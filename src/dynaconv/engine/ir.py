"""The compiler's own graph: few operations, on maps of rows, between `torch.export` and the flat plan.

A node's value is a map [N, h, w, channels] (`size` = (h, w, channels)), a mask on a grid (`is_grid`), or a tensor that
only ATen understands (`size` None). How a tensor of the exported graph looks at a map is a `View`'s layout, so
permutations and flattening cost nothing.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

GRID_OPS = ("threshold", "upsample", "dilate")
# "nc/k": [N, channels / k, k] of a 1x1 grid. "grouped/g": [N, g, channels / g, h, w], "shuffled/g" the same with axes 1
# and 2 exchanged; these two only lead to other views.
LAYOUTS = ("nchw", "nhwc", "nc", "nc1", "flat", "ncl", "raw", "nc/", "grouped/", "shuffled/")


@dataclass(eq=False)
class Node:
    """One operation; `inputs` by role ("x", "residual", "grid", "0", "1", ...)."""

    op: str
    inputs: dict[str, Node] = field(default_factory=dict)
    size: tuple[int, int, int] | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    layer: str = ""

    @property
    def x(self) -> Node:
        """The main input."""
        return self.inputs["x"]

    @property
    def is_grid(self) -> bool:
        """The value is a mask, not a map."""
        return self.op in GRID_OPS

    @property
    def is_mixed(self) -> bool:
        """A convolution with a kernel for each image: mixed from experts, or with channels fused (dynamic.py)."""
        return "experts" in self.attrs or "low_rank" in self.attrs

    def __repr__(self) -> str:
        return f"{self.op}({self.layer})"


class View(NamedTuple):
    """A tensor of the exported graph as a way to look at a node's rows."""

    node: Node
    layout: str


class Constant(NamedTuple):
    """A tensor that does not depend on the input."""

    tensor: Tensor


class Ref(NamedTuple):
    """Place of an input inside the arguments of an ATen node."""

    role: str
    layout: str


@dataclass
class Graph:
    """Nodes in an order of execution; outputs are the leaves of the result (View, Constant or plain values)."""

    nodes: list[Node]
    outputs: list[Any]

    def users(self) -> dict[Node, list[Node]]:
        """Readers of each node, one entry a reading; graph outputs are counted as None."""
        found: dict[Node, list[Any]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs.values():
                found[source].append(node)
        for out in self.outputs:
            if isinstance(out, View):
                found[out.node].append(None)
        return found

    def replace(self, old: Node, new: Node) -> None:
        """Let every reader of `old` read `new`."""
        for node in self.nodes:
            if node is not new:
                for role, source in node.inputs.items():
                    if source is old:
                        node.inputs[role] = new
        self.outputs = [
            View(new, o.layout) if isinstance(o, View) and o.node is old else o for o in self.outputs
        ]

    def insert_after(self, anchor: Node, node: Node) -> None:
        """Put a node behind another one in the list."""
        self.nodes.insert(self.nodes.index(anchor) + 1, node)

    def tidy(self) -> None:
        """Drop what no output needs, and order the rest so that inputs come first."""
        needed: set[Node] = set()
        stack = [o.node for o in self.outputs if isinstance(o, View)]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack += node.inputs.values()
        self.nodes = _ordered([n for n in self.nodes if n in needed])


def _ordered(nodes: list[Node]) -> list[Node]:
    place = {node: i for i, node in enumerate(nodes)}
    waiting = {node: len(node.inputs) for node in nodes}
    readers: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in node.inputs.values():
            readers[source].append(node)
    ready = [place[node] for node in nodes if not node.inputs]
    heapq.heapify(ready)
    done = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        done.append(node)
        for reader in readers[node]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, place[reader])
    assert len(done) == len(nodes)
    return done
