"""Passes about closed channels: cut out where they are closed for every image, skipped where a gate decides for each.

Source of the decisions: LAUDNet's channel mode, arXiv 2308.15949.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.engine.ir import Graph, Node

# Between a convolution and what closes its channels.
_EACH_CHANNEL = ("affine", "act")


@dataclass
class _Closed:
    """A product with zeros: which channels stay, the convolution that makes them, what lies between, who reads them."""

    keep: Tensor
    maker: Node
    between: list[Node]
    readers: list[Node]

    def fits(self, conv: Node) -> bool:
        """No group of this convolution would be parted."""
        groups = self.keep.view(conv.attrs["groups"], -1)
        return bool((groups == groups[:, :1]).all())


def drop_channels(graph: Graph) -> None:
    """Take closed channels out of the convolutions on both sides of each product with a constant that has zeros."""
    users = graph.users()
    found = {node: closed for node in graph.nodes if (closed := _closed(node, users)) is not None}
    makers = {closed.maker: node for node, closed in found.items()}
    for _ in range(len(found) + 1):
        alone = [node for node, closed in found.items() if not _stands(closed, found, makers)]
        for node in alone:
            del makers[found.pop(node).maker]
    for node, closed in found.items():
        _cut(graph, node, closed)
    graph.tidy()


def _closed(node: Node, users: dict[Node, list[Node]]) -> _Closed | None:
    if node.op != "affine" or node.size[:2] == (1, 1) or bool((node.attrs["shift"] != 0).any()):
        return None
    keep, readers, between = node.attrs["scale"] != 0, users[node], []
    if not 0 < int(keep.sum()) < keep.numel() or not all(_is_static(reader) for reader in readers):
        return None
    at = node.x
    while at.op in _EACH_CHANNEL and len(users[at]) == 1:
        between.append(at)
        at = at.x
    if not _is_static(at) or len(users[at]) != 1 or "residual" in at.inputs:
        return None
    return _Closed(keep, at, between, readers)


def _is_static(node: Node | None) -> bool:
    return node is not None and node.op == "conv" and not node.is_mixed


def _stands(closed: _Closed, found: dict[Node, _Closed], makers: dict[Node, Node]) -> bool:
    """What a convolution in groups reads is closed where its results are."""
    if closed.maker.attrs["groups"] > 1:
        before = found.get(closed.maker.x)
        if before is None or not torch.equal(before.keep, closed.keep) or not closed.fits(closed.maker):
            return False
    for reader in closed.readers:
        if reader.attrs["groups"] > 1:
            after = found.get(makers.get(reader))
            if after is None or not torch.equal(after.keep, closed.keep):
                return False
    return True


def _cut(graph: Graph, node: Node, closed: _Closed) -> None:
    keep, maker = closed.keep, closed.maker
    size = (*node.size[:2], int(keep.sum()))
    attrs = maker.attrs
    if attrs["groups"] > 1:
        attrs["groups"] = attrs["groups"] * size[2] // keep.numel()
    attrs["weight"] = attrs["weight"][keep]
    attrs["bias"] = None if attrs["bias"] is None else attrs["bias"][keep]
    for part in (maker, *closed.between, node):
        part.size = size
        if part.op == "affine":
            part.attrs |= {k: part.attrs[k][keep] for k in ("scale", "shift")}
    for reader in closed.readers:
        if reader.attrs["groups"] == 1:
            reader.attrs["weight"] = reader.attrs["weight"][:, keep]
    if bool((node.attrs["scale"] == 1).all()):
        graph.replace(node, node.x)


def skip_channels(graph: Graph) -> None:
    """Let convolutions compute and read only the channels that a gate opens for an image (`channels` and the sides).

    What is times the gate's decision between two convolutions is then that of the open channels, side by side.
    """
    users = graph.users()
    for decision in [node for node in graph.nodes if node.op == "open_channels"]:
        products = _products(decision, users)
        if not products or not all(_skips(product, products, users) for product in products):
            continue
        for product in products:
            for conv, side in ((product.x, "open_out"), *((reader, "open_in") for reader in users[product])):
                conv.inputs["channels"] = decision
                conv.attrs[side] = True
            graph.replace(product, product.x)
    graph.tidy()


def _products(decision: Node, users: dict[Node, list[Node]]) -> set[Node]:
    """Maps times the decision; none where something else reads it, too."""
    found: set[Node] = set()
    for repeated in users[decision]:
        if repeated is None or repeated.op != "repeat":
            return set()
        for product in users[repeated]:
            if product is None or product.op != "mul" or product.inputs["y"] is not repeated:
                return set()
            found.add(product)
    return found


def _skips(product: Node, products: set[Node], users: dict[Node, list[Node]]) -> bool:
    maker, readers = product.x, users[product]
    if not all(_is_static(node) for node in (maker, *readers)) or product.attrs["act"] != "none":
        return False
    if len(users[maker]) != 1 or maker.x.op == "input" or {"residual", "channels"} & set(maker.inputs):
        return False
    # A convolution in groups reads what is closed where its results are.
    if maker.attrs["groups"] > 1 and maker.x not in products:
        return False
    return all(
        reader.attrs["groups"] == 1 or (len(users[reader]) == 1 and users[reader][0] in products)
        for reader in readers
    )
