"""Where the ways through a traced forward meet: the addition or concatenation that everything passes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import fx

_ADDS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")
_CATS = (torch.cat, torch.concat)


def is_join(node: fx.Node) -> bool:
    """The node adds two values, or concatenates two along channels."""
    return operands_of(node) is not None


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that are added, or the two parts of a concatenation along channels."""
    parts: Sequence[object] = ()
    if (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    ):
        parts = node.args if not node.kwargs else ()
    elif node.op == "call_function" and node.target in _CATS:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        parts = node.args[0] if dim in (1, -3) and isinstance(node.args[0], (tuple, list)) else ()
    if len(parts) != 2:
        return None
    first, second = parts
    both = isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return (first, second) if both and first is not second else None


def is_concatenation(node: fx.Node) -> bool:
    """The node is a concatenation."""
    return node.op == "call_function" and node.target in _CATS


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and everything that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def joins_of(graph: fx.Graph) -> list[fx.Node]:
    """Additions and concatenations of two values of the input that every way from input to output passes."""
    source = next(n for n in graph.nodes if n.op == "placeholder")
    output = next(n for n in graph.nodes if n.op == "output")
    found = []
    for node in graph.nodes:
        operands = operands_of(node)
        if operands is None or not all(source in ancestors([p]) for p in operands):
            continue
        if node in ancestors([output]) and not _reaches(source, output, node):
            found.append(node)
    return found


def _reaches(source: fx.Node, output: fx.Node, barrier: fx.Node) -> bool:
    stack, seen = [source], {barrier}
    while stack:
        node = stack.pop()
        if node is output:
            return True
        if node not in seen:
            seen.add(node)
            stack += node.users
    return False
