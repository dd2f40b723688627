"""One form for what a forward may write in several ways: sums with a factor or a sign, values changed in place."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

_SUMS = {torch.add: 1, torch.sub: -1, torch.subtract: -1, operator.sub: -1, operator.isub: -1}
_SUM_METHODS = {"add": 1, "add_": 1, "sub": -1, "sub_": -1, "subtract": -1, "subtract_": -1}

_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow)


def in_normal_form(graph: fx.Graph, block: nn.Module) -> fx.Graph:
    """The graph of a block's forward with sums and changes in place written in one way; it is changed itself.

    x - y is x + (-y), add(x, y, alpha=a) is x + y * a, and what is read after an operation in place is its result.
    """
    _read_results(graph, block)
    for node in list(graph.nodes):
        sign = _SUMS.get(node.target) if node.op == "call_function" else None
        if node.op == "call_method":
            sign = _SUM_METHODS.get(node.target)
        if sign is not None:
            _as_plain_sum(graph, node, sign)
    return graph


def _as_plain_sum(graph: fx.Graph, node: fx.Node, sign: int) -> None:
    call = {**dict(zip(("input", "other"), node.args, strict=False)), **node.kwargs}
    factor = sign * call.pop("alpha", 1) if isinstance(call.get("alpha", 1), (int, float)) else None
    if factor is None or call.keys() != {"input", "other"}:
        return
    if not all(isinstance(value, fx.Node) for value in call.values()):
        return
    other = call["other"]
    if factor != 1:
        with graph.inserting_before(node):
            other = (
                graph.call_function(operator.neg, (other,))
                if factor == -1
                else graph.call_function(operator.mul, (other, factor))
            )
        other.meta = dict(node.meta)
    node.args, node.kwargs = (call["input"], other), {}
    if factor != 1:
        node.op, node.target = "call_function", operator.add


def _read_results(graph: fx.Graph, block: nn.Module) -> None:
    """`y.mul_(2)` as a statement of its own changes y; the input is left alone, since the caller's map would change."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = node.args[0] if node.args else None
        if not works_in_place(node, block) or not isinstance(changed, fx.Node) or changed.op == "placeholder":
            continue
        changed.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])


def works_in_place(node: fx.Node, block: nn.Module) -> bool:
    """The operation changes its first argument."""
    if node.op == "call_module":
        return bool(getattr(block.get_submodule(node.target), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    changes = (name.endswith("_") and not name.endswith("__")) or node.target in _OPERATORS
    return node.op in ("call_method", "call_function") and (changes or node.kwargs.get("inplace") is True)
