"""Passes about factors: one for each channel and image into mixed kernels, one for all channels to where it is free.

Source of the scaled kernels: ODConv, arXiv 2209.07947, equation 4.
"""

from __future__ import annotations

import torch

from dynaconv.engine.ir import Graph, Node


def fuse_hard_sigmoids(graph: Graph) -> None:
    """relu6(z + 3) / c as the hard sigmoid times 6 / c."""
    for node in list(graph.nodes):
        source = before_hard_gate(node)
        if source is None:
            continue
        gate = Node("act", {"x": source}, node.size, {"act": "hardsigmoid"}, node.layer)
        graph.insert_after(source, gate)
        node.inputs["x"] = gate
        node.attrs["scale"] = 6 * node.attrs["scale"]
        if is_uniform(node, 1, 0):
            graph.replace(node, gate)
    graph.tidy()


def before_hard_gate(node: Node) -> Node | None:
    """z where the node is relu6(z + 3) times one number for all channels."""
    if node.op != "affine" or not is_uniform(node, node.attrs["scale"][0].item(), 0):
        return None
    clamped = node.x
    if clamped.op != "act" or clamped.attrs["act"] != "relu6" or not is_uniform(clamped.x, 1, 3):
        return None
    return clamped.x.x


def is_uniform(node: Node, scale: float, shift: float) -> bool:
    """An affine step with these two numbers for every channel."""
    if node.op != "affine":
        return False
    wanted = ((node.attrs["scale"], scale), (node.attrs["shift"], shift))
    return all(bool(torch.isclose(t, t.new_tensor(want), rtol=1e-6, atol=0).all()) for t, want in wanted)


def fuse_response_norms(graph: Graph) -> None:
    """x + (scale * v * x + shift) as (1 + scale * v) * x + shift, with v [1, 1, C] of each image: one product.

    Source: ConvNeXt V2's global response norm, arXiv 2301.00808, equation 3.
    """
    for node in list(graph.nodes):
        users = graph.users()
        if node.op != "add" or node.x.size != node.inputs["y"].size:
            continue
        for x, y in ((node.x, node.inputs["y"]), (node.inputs["y"], node.x)):
            if (
                y.op != "affine"
                or not _is_scaled(y.x)
                or y.x.x is not x
                or len(users[y]) != 1
                or len(users[y.x]) != 1
            ):
                continue
            product, scale = y.x, y.attrs["scale"]
            factors = Node("affine", {"x": product.inputs["y"]}, (1, 1, x.size[2]), {}, node.layer)
            factors.attrs = {"scale": scale, "shift": torch.ones_like(scale)}
            graph.insert_after(product.inputs["y"], factors)
            product.inputs["y"] = factors
            y.attrs["scale"] = torch.ones_like(scale)
            graph.replace(node, y)
            break
    graph.tidy()


def push_scales(graph: Graph) -> None:
    """One factor for all channels: through products into the static convolutions behind them."""
    for node in list(graph.nodes):
        if node.op != "affine" or node.x.op in ("conv", "affine"):
            continue
        scale, users = node.attrs["scale"][0].item(), graph.users()
        readers = users[node]
        while len(readers) == 1 and readers[0] is not None and _is_product(readers[0]):
            readers = users[readers[0]]
        if is_uniform(node, scale, 0) and readers and all(_is_static(reader) for reader in readers):
            for reader in set(readers):
                reader.attrs["weight"] = reader.attrs["weight"] * scale
            graph.replace(node, node.x)
    graph.tidy()


def _is_product(node: Node) -> bool:
    return node.op == "mul" and node.attrs["act"] == "none"


def _is_static(node: Node | None) -> bool:
    return node is not None and node.op == "conv" and not node.is_mixed


def fuse_scales(graph: Graph) -> None:
    """A factor for each channel, before or behind a mixed convolution, into its kernels.

    ODConv's attention over input and output channels; the maps are then read and written once.
    """
    for node in list(graph.nodes):
        if node.op == "conv" and "experts" in node.attrs:
            _scale_inputs(graph, node)
            _scale_outputs(graph, node)
    graph.tidy()


def _is_scaled(node: Node) -> bool:
    """A map times one number for each channel and image."""
    if node.op != "mul" or node.attrs["act"] != "none" or node.is_grid or node.inputs["y"].is_grid:
        return False
    return node.inputs["y"].size == (1, 1, node.size[2]) and node.x.size == node.size


def _is_depthwise(node: Node) -> bool:
    return node.attrs["groups"] == node.size[2] == node.x.size[2] and node.attrs["groups"] > 1


def _scale_inputs(graph: Graph, node: Node) -> None:
    if not _is_scaled(node.x) or len(graph.users()[node.x]) != 1:
        return
    # A depthwise kernel's input channels are its outputs; biases are added behind both.
    node.inputs["scale_out" if _is_depthwise(node) else "scale_in"] = node.x.inputs["y"]
    node.inputs["x"] = node.x.x


def _scale_outputs(graph: Graph, node: Node) -> None:
    users = graph.users()[node]
    if len(users) != 1 or users[0] is None or not _is_scaled(users[0]) or users[0].x is not node:
        return
    biases = (node.attrs["bias"], node.attrs["expert_bias"])
    if any(t is not None for t in biases) or "scale_out" in node.inputs:
        return
    node.inputs["scale_out"] = users[0].inputs["y"]
    graph.nodes.remove(node)
    graph.insert_after(users[0], node)
    graph.replace(users[0], node)
