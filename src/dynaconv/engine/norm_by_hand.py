"""A layer norm over channels that a forward writes down: (x - mean) / sqrt(variance + eps) of maps [N, C, h, w]."""

from __future__ import annotations

import torch
from torch import fx

from dynaconv.engine.build import Builder, target_name
from dynaconv.engine.ir import View


def norm_by_hand(b: Builder, node: fx.Node) -> View | None:
    """The layer norm, without weights, that ends in this division, or None."""
    centered, root = node.args[:2]
    difference = _difference(centered)
    if difference is None or not _is(root, "sqrt"):
        return None
    (x, average), shifted = difference, root.args[0]
    if not (_is(shifted, "add") and isinstance(shifted.args[1], float)) or not _is_mean(average, x):
        return None
    variance, view = shifted.args[0], b.value(x)
    if not _is_variance(variance, difference) or not isinstance(view, View) or view.layout != "nchw":
        return None
    size = view.node.size
    if size is None or b.map_size(node, "nchw") != size:
        return None
    ones, zeros = torch.ones(size[2]), torch.zeros(size[2])
    inputs, eps = {"x": view.node}, shifted.args[1]
    return b.add("layer_norm", node, size, "nchw", inputs, eps=eps, weight=ones, bias=zeros)


def _is(node: object, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and target_name(node.target) == name


def _difference(node: object) -> tuple[fx.Node, fx.Node] | None:
    """x and m of x - m, which a converted block writes as x + (-m)."""
    if _is(node, "sub") and not node.kwargs:
        return node.args[0], node.args[1]
    if _is(node, "add") and not node.kwargs and _is(node.args[1], "neg"):
        return node.args[0], node.args[1].args[0]
    return None


def _is_mean(node: object, x: object) -> bool:
    """The mean of x over channels, as a map of one channel."""
    if not _is(node, "mean") or node.args[0] is not x or node.kwargs:
        return False
    return len(node.args) > 2 and [d % 4 for d in node.args[1]] == [1] and bool(node.args[2])


def _is_variance(node: object, difference: tuple[fx.Node, fx.Node]) -> bool:
    """The mean of the square of what was centered, however it subtracts the same."""
    if not _is(node, "mean"):
        return False
    square = node.args[0]
    if _is(square, "pow"):
        inner, whole = square.args[0], square.args[1] == 2
    elif _is(square, "mul"):
        inner, whole = square.args[0], square.args[0] is square.args[1]
    else:
        return False
    return whole and _difference(inner) == difference and _is_mean(node, square)
