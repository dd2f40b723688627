"""The pass that joins an expansion and the depthwise convolution behind it, where the projection cannot join, too.

A router or a squeeze-excite layer looks at all open positions before the projection: the map between them is written,
that before the depthwise convolution is not, and the mean that they look at is taken on the way.
"""

from __future__ import annotations

import math

from dynaconv.engine.inverted import inner, is_depthwise, pointwise
from dynaconv.engine.ir import Graph, Node


def fuse_expansions(graph: Graph) -> None:
    """One step for 1x1 -> depthwise [-> mean], with static weights or a channel fusion."""
    for depthwise in list(graph.nodes):
        users = graph.users()
        if not _is_last(depthwise) or not _is_expansion(depthwise.x, users):
            continue
        expand, grid = depthwise.x, depthwise.inputs.get("grid")
        # Both compute every row, or those that a mask needs.
        if (grid is None) != ("grid" not in expand.inputs):
            continue
        node = Node(
            "expanded", {"x": expand.x}, depthwise.size, {"parts": (expand, depthwise)}, depthwise.layer
        )
        if grid is not None:
            node.inputs |= {"grid": grid, "grid2": expand.inputs["grid"]}
        if expand.is_mixed:
            node.inputs["coefficients"] = expand.inputs["coefficients"]
        graph.insert_after(depthwise, node)
        graph.replace(depthwise, node)
        graph.tidy()
        means = [user for user in graph.users()[node] if user is not None and _is_mean(user, grid)]
        if means:
            # Whoever reads one of several equal means reads the first.
            node.attrs["mean"] = means[0]
            for other in means[1:]:
                graph.replace(other, means[0])
            graph.tidy()


def folds(node: Node) -> bool:
    """A channel fusion that takes fewer multiply-adds as a kernel for each image."""
    taps, positions = math.prod(node.attrs["weight"].shape[2:]), math.prod(node.size[:2])
    return node.attrs["groups"] == 1 and node.attrs["low_rank"].folds(taps, positions)


def _is_last(node: Node) -> bool:
    return (
        node.op == "conv"
        and is_depthwise(node)
        and not {"residual", "channels"} & set(node.inputs)
        and "closed_act" not in node.attrs
        and node.size[:2] != (1, 1)
    )


def _is_expansion(node: Node, users: dict[Node, list[Node]]) -> bool:
    if not inner(node, users) or "channels" in node.inputs or node.x.op == "input":
        return False
    # What a mask left out of the input holds anything.
    if "grid" in node.x.inputs and not node.x.attrs.get("masked"):
        return False
    return (
        pointwise(node, mixed=True)
        and ("low_rank" not in node.attrs or node.attrs["groups"] == 1)
        and "experts" not in node.attrs
    )


def _is_mean(node: Node, grid: Node | None) -> bool:
    """Over the rows that are computed."""
    return node.op == "mean" and node.size[:2] == (1, 1) and node.inputs.get("grid") is grid
