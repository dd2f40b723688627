"""Passes that remove per-channel scales and shifts: into a convolution before or behind, or as a 1x1 depthwise one."""

from __future__ import annotations

import torch

from dynaconv.engine.ir import Graph, Node


def fold(graph: Graph) -> None:
    """Batch norm, layer scale and constants in evaluation mode; the graph computes the same afterwards."""
    for node in list(graph.nodes):
        if node.op == "affine":
            users = graph.users()
            source = node.x
            if source.op == "affine" and len(users[source]) == 1:
                _into_affine(graph, source, node)
            elif source.op == "conv" and len(users[source]) == 1 and source.attrs["act"] == "none":
                _into_conv(graph, source, node)
            elif source.op == "layer_norm" and len(users[source]) == 1:
                _into_norm(graph, source, node)
    for node in list(graph.nodes):
        if node.op == "affine":
            readers = graph.users()[node]
            if len(readers) == 1 and _takes_affine(readers[0]):
                _into_reader(graph, node, readers[0])
    for node in graph.nodes:
        if node.op == "affine" and node.size[2] == 1:
            # Rows of one number: lines of them are as good as channels.
            node.op = "scale"
            node.attrs = {k: float(node.attrs[k]) for k in ("scale", "shift")} | {"act": "none"}
        elif node.op == "affine":
            _as_depthwise(node)
    graph.tidy()


def _into_conv(graph: Graph, conv: Node, node: Node) -> None:
    scale, shift = node.attrs["scale"].double(), node.attrs["shift"].double()
    weight, bias = conv.attrs["weight"].double(), conv.attrs["bias"]
    conv.attrs["weight"] = (weight * scale[:, None, None, None]).float()
    conv.attrs["bias"] = (shift if bias is None else shift + bias.double() * scale).float()
    if "low_rank" in conv.attrs:
        conv.attrs["low_rank"] = conv.attrs["low_rank"].scaled(scale)
    if "experts" in conv.attrs:
        conv.attrs["experts"] = (conv.attrs["experts"].double() * scale[:, None, None, None]).float()
        if conv.attrs["expert_bias"] is not None:
            conv.attrs["expert_bias"] = (conv.attrs["expert_bias"].double() * scale).float()
    graph.replace(node, conv)


def _into_norm(graph: Graph, norm: Node, node: Node) -> None:
    scale, shift = node.attrs["scale"], node.attrs["shift"]
    norm.attrs["weight"] = norm.attrs["weight"] * scale
    norm.attrs["bias"] = norm.attrs["bias"] * scale + shift
    graph.replace(node, norm)


def _takes_affine(reader: Node | None) -> bool:
    """A static convolution every tap of which always reads the map; padding would not be shifted."""
    if reader is None or reader.op != "conv" or reader.is_mixed:
        return False
    return reader.attrs["padding"] == (0, 0) and reader.attrs["groups"] == 1


def _into_reader(graph: Graph, node: Node, conv: Node) -> None:
    scale, shift = (node.attrs[k].double().reshape(1, -1, 1, 1) for k in ("scale", "shift"))
    weight, bias = conv.attrs["weight"].double(), zero_bias(conv).double()
    conv.attrs["weight"] = (weight * scale).float()
    conv.attrs["bias"] = (bias + (weight * shift).sum((1, 2, 3))).float()
    graph.replace(node, node.x)


def _into_affine(graph: Graph, first: Node, second: Node) -> None:
    scale = second.attrs["scale"]
    first.attrs["shift"] = first.attrs["shift"] * scale + second.attrs["shift"]
    first.attrs["scale"] = first.attrs["scale"] * scale
    graph.replace(second, first)


def _as_depthwise(node: Node) -> None:
    channels = node.size[2]
    scale, shift = node.attrs["scale"], node.attrs["shift"]
    node.op = "conv"
    node.attrs = {
        "weight": scale.reshape(channels, 1, 1, 1).clone(), "bias": shift.clone(), "stride": (1, 1), "padding": (0, 0),
        "dilation": (1, 1), "groups": channels, "act": "none",
    }  # fmt: skip


def zero_bias(node: Node) -> torch.Tensor:
    """The bias of a convolution, or zeros."""
    bias = node.attrs["bias"]
    return torch.zeros(node.attrs["weight"].shape[0]) if bias is None else bias
