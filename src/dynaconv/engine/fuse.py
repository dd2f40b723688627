"""Passes that join operations into what one native step does: activations, residual additions, gates."""

from __future__ import annotations

from dynaconv.engine.fold import zero_bias
from dynaconv.engine.ir import Graph, Node

# Steps with an activation of their own.
_WITH_ACTIVATION = ("conv", "add", "sub", "mul", "scale", "weighted_add")
_NON_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid")


def fuse(graph: Graph) -> None:
    """All passes in order; masks must have been recognised before (see masks.py)."""
    fuse_residuals(graph)
    fuse_activations(graph)


_SWISHES = {"sigmoid": "silu", "hardsigmoid": "hardswish"}


def fuse_silu(graph: Graph) -> None:
    """x * sigmoid(x), and the same with the hard sigmoid."""
    users = graph.users()
    for node in list(graph.nodes):
        if node.op != "mul" or node.size != node.inputs["y"].size:
            continue
        for x, y in ((node.x, node.inputs["y"]), (node.inputs["y"], node.x)):
            if y.op == "act" and y.attrs["act"] in _SWISHES and y.x is x and len(users[y]) == 1:
                node.op, node.inputs, node.attrs = "act", {"x": x}, {"act": _SWISHES[y.attrs["act"]]}
                break
    graph.tidy()


def fuse_activations(graph: Graph) -> None:
    """An activation into the only step whose result it reads."""
    for node in list(graph.nodes):
        if node.op != "act":
            continue
        users, source = graph.users(), node.x
        if source.op not in _WITH_ACTIVATION or len(users[source]) != 1:
            continue
        slot = "final_act" if "residual" in source.inputs else "act"
        if source.attrs.get(slot, "none") != "none":
            continue
        source.attrs[slot] = node.attrs["act"]
        graph.replace(node, source)
    graph.tidy()


def fuse_residuals(graph: Graph) -> None:
    """Additions of two maps of one size into the convolution that makes one of them, through its activation."""
    for node in list(graph.nodes):
        if node.op != "add" or node.x.size != node.inputs["y"].size or node.x is node.inputs["y"]:
            continue
        users = graph.users()
        place = {n: i for i, n in enumerate(graph.nodes)}
        parts = sorted((node.x, node.inputs["y"]), key=place.__getitem__, reverse=True)
        for conv, other in (parts, parts[::-1]):
            if can_take_residual(conv, users):
                join_residual(graph, node, conv, other)
                break
    graph.tidy()


def fuse_weighted_sums(graph: Graph) -> None:
    """a + w * b with one number w for each position, as sums over the units of a halting network have it."""
    for node in list(graph.nodes):
        users = graph.users()
        if node.op != "add" or node.size[2] == 1 or node.x.size != node.inputs["y"].size:
            continue
        for product, other in ((node.inputs["y"], node.x), (node.x, node.inputs["y"])):
            if product.op != "mul" or len(users[product]) != 1 or product.attrs["act"] != "none":
                continue
            weight = product.inputs["y"]
            if weight.size == (*node.size[:2], 1) and not weight.is_grid and other is not product:
                node.op = "weighted_add"
                node.inputs = {"x": other, "y": product.x, "weight": weight}
                break
    graph.tidy()


def can_take_residual(node: Node, users: dict[Node, list[Node]]) -> bool:
    """A convolution that nobody else reads, with nothing added yet."""
    return node.op == "conv" and len(users[node]) == 1 and not {"residual", "grid"} & set(node.inputs)


def join_residual(graph: Graph, add: Node, conv: Node, other: Node) -> None:
    """Let `conv` add `other` to its result, in the place of `add`."""
    conv.inputs["residual"] = other
    conv.attrs["final_act"] = add.attrs.get("act", "none")
    graph.nodes.remove(conv)
    graph.insert_after(add, conv)
    graph.replace(add, conv)


def fuse_gates(graph: Graph) -> None:
    """Logits: a 3x3 convolution to one channel plus a linear layer of the average, or a 1x1 convolution alone."""
    users = graph.users()
    for node in list(graph.nodes):
        if node.op == "add" and node.size[2] == 1:
            _fuse_squeeze(graph, node, users)
        elif node.op == "conv" and _is_pointwise_gate(node, users):
            node.op = "gate"
            node.attrs |= {"squeeze": False, "bias": zero_bias(node)}
    graph.tidy()


def _fuse_squeeze(graph: Graph, node: Node, users: dict[Node, list[Node]]) -> None:
    conv, linear = node.x, node.inputs["y"]
    if conv.op != "conv" or linear.op != "conv" or linear.x.op != "mean":
        return
    norm = conv.x if _is_norm(conv.x) and len(users[conv.x]) == 1 else None
    source = conv.x if norm is None else norm.x
    if linear.x.x is not source:
        return
    if linear.x.size[:2] != (1, 1) or conv.is_mixed or linear.is_mixed:
        return
    weight = conv.attrs["weight"]
    fits = weight.shape[0] == 1 and tuple(weight.shape[2:]) == (3, 3) and conv.attrs["padding"] == (1, 1)
    plain = conv.attrs["dilation"] == (1, 1) and conv.attrs["groups"] == 1
    stride = conv.attrs["stride"]
    plain = plain and (norm is None or stride == (1, 1))
    if not (fits and plain and stride[0] == stride[1] and conv.attrs["act"] == linear.attrs["act"] == "none"):
        return
    if any(len(users[n]) != 1 for n in (conv, linear, linear.x)):
        return
    act = node.attrs.get("act", "none")
    if act != "none":
        # A gate's step has no activation: a halting score is one of its logits.
        gate = Node("gate", {}, node.size, {}, conv.layer)
        graph.insert_after(node, gate)
        node.op, node.inputs, node.attrs = "act", {"x": gate}, {"act": act}
        node = gate
    node.op, node.inputs = "gate", {"x": source}
    node.attrs = {
        **conv.attrs, "squeeze": True, "linear": linear.attrs["weight"].reshape(-1),
        "bias": zero_bias(conv) + zero_bias(linear),
    }  # fmt: skip
    if norm is not None:
        # The padding lies behind the norm, so its shift counts only for taps inside of the map.
        scale, shift = norm.attrs["weight"].reshape(1, -1, 1, 1), zero_bias(norm).reshape(1, -1, 1, 1)
        node.attrs |= {"weight": weight * scale, "tap_bias": (weight * shift).sum(1).reshape(-1)}


def _is_norm(node: Node) -> bool:
    """A scale and shift for each channel, and nothing else."""
    if node.op != "conv" or node.is_mixed or {"residual", "grid"} & set(node.inputs):
        return False
    weight, attrs = node.attrs["weight"], node.attrs
    each = attrs["groups"] == weight.shape[0] == node.x.size[2] and tuple(weight.shape[1:]) == (1, 1, 1)
    return each and attrs["act"] == "none" and attrs["stride"] == (1, 1) and node.size == node.x.size


def _is_pointwise_gate(node: Node, users: dict[Node, list[Node]]) -> bool:
    weight = node.attrs["weight"]
    if node.is_mixed:
        return False
    plain = (
        tuple(weight.shape[2:]) == (1, 1) and node.attrs["padding"] == (0, 0) and node.attrs["groups"] == 1
    )
    reads = [u for u in users[node] if u is not None]
    only_masks = (
        reads
        and len(reads) == len(users[node])
        and all(u.op in ("threshold", "avg_pool", "mean") for u in reads)
    )
    return weight.shape[0] == 1 and plain and bool(only_masks) and node.attrs["act"] == "none"


def already(node: Node, activation: str) -> bool:
    """The activation would not change the values of this node."""
    if activation == "none":
        return True
    if activation not in ("relu", "relu6"):
        return False
    if node.op in ("max_pool", "avg_pool", "mean", "concat", "slice", "interleave"):
        return all(already(source, activation) for source in node.inputs.values())
    last = node.attrs.get("final_act" if "residual" in node.inputs else "act", "none")
    return last == activation or (activation == "relu" and last in _NON_NEGATIVE)
