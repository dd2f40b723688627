"""Steps that give a map another grid: their tables of taps, and passes around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynaconv.engine.ir import Graph, Node

# What moves from behind such a step to before it.
_MOVES = ("affine", "act", "slopes")
_CHANGES_ZERO = ("sigmoid", "hardsigmoid")


def taps_of(matrix: Tensor) -> Tensor:
    """[n, taps, 2], which of the inputs each output reads (-1: none) and its factor, of a matrix [n, inputs]."""
    there = matrix != 0
    count = max(1, int(there.sum(1).max()))
    index = there.float().argsort(dim=1, descending=True, stable=True)[:, :count]
    factor = matrix.gather(1, index)
    index = torch.where(factor != 0, index, -1)
    return torch.stack([index.float(), factor.float()], -1)


def matrix_of(taps: Tensor, inputs: int) -> Tensor:
    """Inverse of `taps_of`."""
    wide = torch.zeros(len(taps), inputs + 1).scatter_add_(1, taps[..., 0].long() + 1, taps[..., 1])
    return wide[:, 1:]


def place_resampling(graph: Graph) -> None:
    """Lay channels as the steps want them, and let what follows take place before, where a convolution may take it."""
    for node in list(graph.nodes):
        if node.op == "resample" and node.attrs.get("mixed"):
            _put_in_order(graph, node)
    for node in list(graph.nodes):
        source = node.inputs.get("x")
        if node.op in _MOVES and source is not None and source.op == "resample":
            _move_before(graph, node, source)
    graph.tidy()


def _put_in_order(graph: Graph, node: Node) -> None:
    """Channels c * parts + i as i * channels + c, by the convolution that makes them if it can."""
    node.attrs["mixed"] = False
    parts, channels = node.attrs["parts"][0] * node.attrs["parts"][1], node.size[2]
    order = torch.arange(parts * channels).view(channels, parts).t().reshape(-1)
    users, chain = graph.users(), [node.x]
    while len(users[chain[-1]]) == 1 and chain[-1].op in _MOVES:
        chain.append(chain[-1].x)
    conv = chain[-1]
    alone = conv.op == "conv" and len(users[conv]) == 1
    if alone and not conv.is_mixed and conv.attrs["groups"] == 1:
        for member in chain:
            for name in ("weight", "bias", "scale", "shift", "slopes"):
                value = member.attrs.get(name)
                member.attrs[name] = value[order] if isinstance(value, Tensor) else value
        return
    source, pieces = node.x, {}
    for i in range(parts):
        piece = Node(
            "slice", {"x": source}, (*source.size[:2], channels), {"start": i, "step": parts}, node.layer
        )
        graph.nodes.insert(graph.nodes.index(node), piece)
        pieces[str(i)] = piece
    ordered = Node("concat", pieces, source.size, {}, node.layer)
    graph.nodes.insert(graph.nodes.index(node), ordered)
    node.inputs["x"] = ordered


def _move_before(graph: Graph, node: Node, step: Node) -> None:
    source = step.x
    # A convolution, or what it takes in, takes this in, too.
    free = source.op in ("conv", *_MOVES) or math.prod(source.size) <= math.prod(step.size)
    if len(graph.users()[step]) != 1 or not free or not _commutes(node, step):
        return
    parts = step.attrs["parts"][0] * step.attrs["parts"][1]
    attrs = {k: v.repeat(parts) if isinstance(v, Tensor) else v for k, v in node.attrs.items()}
    moved = Node(node.op, {"x": source}, source.size, attrs, node.layer)
    graph.nodes.insert(graph.nodes.index(step), moved)
    graph.replace(node, step)
    graph.nodes.remove(node)
    step.inputs["x"] = moved


def _commutes(node: Node, step: Node) -> bool:
    """Sums with factors that add up to 1 let shifts through; single positions let everything through."""
    axes = (step.attrs["lines"], step.attrs["columns"])
    whole = all(bool((axis[..., 1].sum(1) - 1).abs().max() < 1e-6) for axis in axes)
    if node.op == "affine":
        return whole
    single = all(
        axis.shape[1] == 1 and bool(((axis[..., 1] == 1) | (axis[..., 0] < 0)).all()) for axis in axes
    )
    return single and (whole or node.op == "slopes" or node.attrs["act"] not in _CHANGES_ZERO)
