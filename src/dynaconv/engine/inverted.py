"""The pass that joins expansion, depthwise convolution and projection, so that the hidden map never leaves the cache.

Source: MobileNetV2's inverted residual, arXiv 1801.04381, section 3.3.
"""

from __future__ import annotations

from dynaconv.engine.ir import Graph, Node


def fuse_inverted(graph: Graph) -> None:
    """One step for 1x1 -> depthwise -> 1x1, or depthwise -> 1x1, where nobody else reads what lies between."""
    for project in list(graph.nodes):
        users = graph.users()
        parts = _parts(project, users)
        if parts is None:
            continue
        expand, depthwise, _ = parts
        first = depthwise if expand is None else expand
        node = Node("inverted", {"x": first.x}, project.size, {"parts": parts}, project.layer)
        for role in ("residual", "grid", "channels"):
            if role in project.inputs:
                node.inputs[role] = project.inputs[role]
        if "grid" in node.inputs and expand is not None:
            node.inputs["grid2"] = expand.inputs["grid"]
        for name in ("final_act", "masked", "closed"):
            if name in project.attrs:
                node.attrs[name] = project.attrs[name]
        graph.insert_after(project, node)
        graph.replace(project, node)
        graph.tidy()


def _parts(project: Node, users: dict[Node, list[Node]]) -> tuple[Node | None, Node, Node] | None:
    """(expansion or None, depthwise, projection) when `project` ends such a chain."""
    if not pointwise(project) or "closed_act" in project.attrs:
        return None
    depthwise = project.x
    if not (inner(depthwise, users) and is_depthwise(depthwise)) or depthwise.x.op == "input":
        return None
    expand = depthwise.x if inner(depthwise.x, users) and pointwise(depthwise.x) else None
    masked, grid = project.attrs.get("masked", False), project.inputs.get("grid")
    if masked:
        fits = depthwise.inputs.get("grid") is grid and (expand is None or "grid" in expand.inputs)
    else:
        fits = grid is None and all("grid" not in n.inputs for n in (depthwise, expand) if n is not None)
    # A gate closes hidden channels everywhere or nowhere, and those of an expansion.
    deciders = {n.inputs.get("channels") for n in (expand, depthwise, project) if n is not None}
    sides = "open_out" in project.attrs or (expand is not None and "open_in" in expand.attrs)
    if len(deciders) > 1 or (deciders != {None} and (expand is None or sides)):
        return None
    first = depthwise if expand is None else expand
    partial = "grid" in first.x.inputs and not first.x.attrs.get("masked")
    return (expand, depthwise, project) if fits and not partial and first.x.op != "input" else None


def inner(node: Node, users: dict[Node, list[Node]]) -> bool:
    """A convolution that only one reads, with nothing added."""
    return (
        node.op == "conv"
        and len(users[node]) == 1
        and "residual" not in node.inputs
        and "closed_act" not in node.attrs
    )


def pointwise(node: Node, mixed: bool = False) -> bool:
    """A 1x1 convolution on a map; `mixed`: also with a kernel for each image."""
    if node.op != "conv" or node.attrs["groups"] != 1 or node.size[:2] == (1, 1) or node.is_mixed > mixed:
        return False
    attrs = node.attrs
    return tuple(attrs["weight"].shape[2:]) == attrs["stride"] == (1, 1) and attrs["padding"] == (0, 0)


def is_depthwise(node: Node) -> bool:
    """One channel a group, static."""
    weight, groups = node.attrs["weight"], node.attrs["groups"]
    return not node.is_mixed and groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1
