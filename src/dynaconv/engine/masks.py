"""The pass that turns `shortcut + mask * branch` into sparse execution: which convolution computes which rows.

Source: DynConv, arXiv 1912.03203, section 3.3. Walking back from the masked convolution, each convolution of the
branch needs what the next one reads for its open rows.
"""

from __future__ import annotations

from dynaconv.engine.fuse import already, can_take_residual, join_residual
from dynaconv.engine.ir import Graph, Node


def recognise_masks(graph: Graph) -> None:
    """Give a grid to every convolution that only has to compute open rows.

    The masked convolution gets `masked` (closed rows keep the shortcut), those before it in its branch get a grid of
    needed rows. A mask times something else stays a multiplication.
    """
    for node in list(graph.nodes):
        if node.op == "mul":
            _recognise(graph, node)
    graph.tidy()


def _recognise(graph: Graph, node: Node) -> None:
    users = graph.users()
    mask, conv = node.inputs["y"], node.x
    if not mask.is_grid:
        mask, conv = conv, mask
    if not mask.is_grid or mask.size[:2] != conv.size[:2] or not can_take_residual(conv, users):
        return
    if conv.is_grid or len(users[node]) != 1 or users[node][0] is None or users[node][0].op != "add":
        return
    add = users[node][0]
    shortcut = add.inputs["y"] if add.x is node else add.x
    if shortcut is node or shortcut.size != conv.size:
        return
    join_residual(graph, add, conv, shortcut)
    conv.inputs["grid"] = mask
    conv.attrs["masked"] = True
    walk_back(graph, conv, users)


def walk_back(graph: Graph, conv: Node, users: dict[Node, list[Node]]) -> None:
    """Needed rows of the convolutions before `conv`, as long as nobody else reads their results."""
    need, reader, source = conv.inputs["grid"], conv, conv.x
    while can_take_residual(source, users):
        need = needed(graph, need, reader)
        source.inputs["grid"] = need
        reader, source = source, source.x


def needed(graph: Graph, grid: Node, reader: Node) -> Node:
    """The grid of rows that `reader` reads for the open rows of `grid`."""
    attrs = {k: reader.attrs[k] for k in ("stride", "padding", "dilation")}
    attrs["kernel"] = tuple(reader.attrs["weight"].shape[2:])
    if attrs["kernel"] == attrs["stride"] == (1, 1) and attrs["padding"] == (0, 0):
        return grid
    h, w, _ = reader.x.size
    node = Node("dilate", {"grid": grid}, (h, w, 1), attrs, reader.layer)
    graph.insert_after(grid, node)
    return node


def _can_split(shortcut: Node, users: dict[Node, list[Node]]) -> bool:
    """A step can compute the closed rows of this shortcut, and another the open ones; depthwise ones walk all rows."""
    if (
        not can_take_residual(shortcut, users)
        or shortcut.attrs["act"] != "none"
        or "experts" in shortcut.attrs
    ):
        return False
    return shortcut.attrs["groups"] == 1 or shortcut.attrs["weight"].shape[1] > 1


def place_shortcuts(graph: Graph) -> None:
    """Decide, after activations were fused, how the closed rows of masked convolutions get act(shortcut).

    "ready": the shortcut's value is the result there. "split": the shortcut's convolution computes closed rows with
    the activation and open rows without. "activate": a step of its own.
    """
    users = graph.users()
    for node in graph.nodes:
        if not node.attrs.get("masked"):
            continue
        shortcut, act = node.inputs["residual"], node.attrs["final_act"]
        if act == "none" or already(shortcut, act):
            node.attrs["closed"] = "ready"
        elif _can_split(shortcut, users):
            node.attrs["closed"] = "split"
            shortcut.inputs["grid"] = node.inputs["grid"]
            shortcut.attrs["closed_act"] = act
        else:
            node.attrs["closed"] = "activate"
    graph.tidy()
