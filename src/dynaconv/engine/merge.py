"""One convolution for a sum of convolutions of the same map, as RepVGG's deployment does.

Source: arXiv 2101.03697, section 3.3.
"""

from __future__ import annotations

from torch import Tensor

from dynaconv.engine.fold import zero_bias
from dynaconv.engine.ir import Graph, Node
from dynaconv.nn._fold import kernel_within


def merge_parallel(graph: Graph) -> None:
    """Sums of static convolutions whose taps fit one kernel that multiplies no more than they do together."""
    for node in list(graph.nodes):
        if node.op != "add" or node.attrs["act"] != "none":
            continue
        users, pair = graph.users(), (node.x, node.inputs["y"])
        if pair[0] is pair[1] or not all(_is_alone(conv, users) for conv in pair):
            continue
        merged = _merged(node, *pair)
        if merged is not None:
            graph.insert_after(node, merged)
            graph.replace(node, merged)
    graph.tidy()


def _is_alone(node: Node, users: dict[Node, list[Node]]) -> bool:
    """A convolution with constant weights and nothing behind it, which only the sum reads."""
    if node.op != "conv" or node.is_mixed or len(users[node]) != 1 or set(node.inputs) != {"x"}:
        return False
    return node.attrs["act"] == "none" and node.attrs["dilation"] == (1, 1)


def _merged(total: Node, a: Node, b: Node) -> Node | None:
    """One convolution for both, or None."""
    # The one with more of everything keeps its place; the other one is laid into it.
    wide, narrow = (a, b) if a.attrs["weight"].numel() >= b.attrs["weight"].numel() else (b, a)
    sums = _sums(wide, narrow) if a.size == total.size else None
    return None if sums is None else Node("conv", {"x": wide.x}, total.size, wide.attrs | sums, wide.layer)


def take_shortcut(node: Node, shortcut: Node, users: dict[Node, list[Node]]) -> bool:
    """Let a convolution compute its shortcut, a convolution of the same map, along where its mask is open.

    The shortcut's own step is left with the closed rows. False, and nothing changed, where the shortcut does not fit.
    """
    if node.op != "conv" or node.is_mixed or set(node.inputs) != {"x", "residual", "grid"}:
        return False
    if node.attrs["act"] != "none" or node.attrs["dilation"] != (1, 1) or not _is_alone(shortcut, users):
        return False
    sums = _sums(node, shortcut)
    if sums is None:
        return False
    final = node.attrs["final_act"]
    node.attrs |= sums | {"act": final, "final_act": "none", "closed": "apart"}
    shortcut.inputs["grid"] = node.inputs["grid"]
    shortcut.attrs["closed_act"], shortcut.attrs["closed_only"] = final, True
    return True


def _sums(wide: Node, narrow: Node) -> dict[str, Tensor] | None:
    """Weight and bias of one convolution for two of the same map, or None where `narrow` does not fit into `wide`."""
    if wide.x is not narrow.x or wide.size != narrow.size or wide.attrs["stride"] != narrow.attrs["stride"]:
        return None
    weight = _within(narrow, wide)
    if weight is None:
        return None
    bias = zero_bias(wide).double() + zero_bias(narrow).double()
    return {"weight": (wide.attrs["weight"].double() + weight).float(), "bias": bias.float()}


def _within(narrow: Node, wide: Node) -> Tensor | None:
    """The weight of a convolution in the shape of another's, or None where it does not fit."""
    parts = [(n.attrs["weight"], n.attrs["groups"], n.attrs["padding"]) for n in (narrow, wide)]
    return kernel_within(*parts[0], parts[1][0].shape, *parts[1][1:])
