"""The passes that make one step of the small network behind a mean, and one mean of equal ones."""

from __future__ import annotations

from dynaconv.engine.ir import Graph, Node


def fuse_routers(graph: Graph) -> None:
    """One step for linear [-> times a linear layer of itself] -> linear, where the first reads a whole map."""
    for last in list(graph.nodes):
        if not _is_linear(last) or last.x.size[:2] != (1, 1):
            continue
        squeeze, gate = _hidden(last.x, graph.users())
        if squeeze is None or squeeze.x.op in ("input", "aten"):
            continue
        node = Node("router", {"x": squeeze.x}, last.size, {"parts": (squeeze, gate, last)}, last.layer)
        graph.insert_after(last, node)
        graph.replace(last, node)
        graph.tidy()


def share_means(graph: Graph) -> None:
    """One mean where several routers look at the same map: a block's first convolution and its shortcut's."""
    known: dict[tuple[Node, Node | None, tuple[int, int, int]], Node] = {}
    for node in list(graph.nodes):
        if node.op != "mean":
            continue
        first = known.setdefault((node.x, node.inputs.get("grid"), node.size), node)
        if first is not node:
            graph.replace(node, first)
    graph.tidy()


def _hidden(node: Node, users: dict[Node, list[Node]]) -> tuple[Node | None, Node | None]:
    """The layer whose result it is, and the layer that gates that; None where it is something else."""
    if len(users[node]) != 1:
        return None, None
    if _is_linear(node):
        return node, None
    if node.op != "mul" or node.attrs["act"] != "none" or node.size != node.inputs["y"].size:
        return None, None
    for squeeze, gate in ((node.x, node.inputs["y"]), (node.inputs["y"], node.x)):
        linear = _is_linear(squeeze) and _is_linear(gate) and gate.x is squeeze
        if linear and len(users[squeeze]) == 2 and len(users[gate]) == 1:
            return squeeze, gate
    return None, None


def _is_linear(node: Node) -> bool:
    """A static convolution that makes one row an image of all positions of its input."""
    if (
        node.op != "conv"
        or node.is_mixed
        or {"grid", "residual", "channels"} & set(node.inputs)
        or "closed_act" in node.attrs
    ):
        return False
    attrs, source = node.attrs, node.x
    whole = source.size is not None and tuple(attrs["weight"].shape[2:]) == source.size[:2]
    return whole and attrs["groups"] == 1 and attrs["padding"] == (0, 0) and node.size[:2] == (1, 1)
