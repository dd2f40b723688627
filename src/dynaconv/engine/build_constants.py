"""Handlers of tensors that are the same for every image: they stay constants instead of growing to the batch's size.

One image's constant stands for the batch where every reader broadcasts it against something that depends on the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dynaconv.engine.build import Builder, handles, target_name
from dynaconv.engine.build_ops import is_map
from dynaconv.engine.ir import Constant

_FILLED = {"ones_like": 1.0, "zeros_like": 0.0}
_PAIRS = ("add", "sub", "rsub", "mul")
_EACH = ("to", "_to_copy", "ge", "detach", "alias", "clone")
_CHECKS = ("_assert_tensor_metadata",)


@handles(*_FILLED)
def filled(b: Builder, node: fx.Node, args: list, kwargs: dict) -> Constant | str:
    """Ones and zeros of a map's size."""
    value = node.meta["val"]
    if not value.is_floating_point() or not _broadcasts(b, node, whole=True):
        return "something reads its shape"
    number = _FILLED[target_name(node.target)]
    return Constant(torch.full((1,) * value.dim(), number, dtype=value.dtype))


@handles("expand", "expand_as")
def expand(b: Builder, node: fx.Node, args: list, kwargs: dict) -> Any:
    """A constant for each channel, repeated for every image; maps to the shape that they have, or where sums and
    products spread them anyway.
    """
    x, value = args[0], node.meta["val"]
    if not isinstance(x, Constant):
        shape = b.shape(node)
        spread = is_map(x, "nchw") and all(target_name(user.target) in ("mul", "add") for user in node.users)
        return x if shape is not None and (spread or shape == b.shape(node.args[0])) else None
    fixed = (
        value.dim() == 4 and all(isinstance(d, int) for d in value.shape[1:]) and b._is_batch(value.shape[0])
    )
    if not fixed or tuple(value.shape[2:]) != (1, 1) or not _broadcasts(b, node, whole=False):
        return "it repeats a constant over the batch"
    return Constant(x.tensor.expand(1, *value.shape[1:]).clone())


def _broadcasts(b: Builder, node: fx.Node, whole: bool) -> bool:
    """Everything that reads a constant, or what follows from it alone, joins it with something of the full size.

    Args:
        whole: the constant is one number, so that it broadcasts over channels and positions, too.
    """
    for user in node.users:
        name = target_name(user.target) if user.op == "call_function" else ""
        if name in _CHECKS or (name in _FILLED and user.args[0] is node):
            continue
        if name in _PAIRS and user.kwargs.get("alpha", 1) == 1:
            others = [a for a in user.args[:2] if isinstance(a, fx.Node) and a is not node and _varies(b, a)]
            if not all(_has_shape(other, user, whole) for other in others):
                return False
            if others or _broadcasts(b, user, whole):
                continue
        elif (name in _EACH or (name == "repeat_interleave" and not whole)) and _broadcasts(b, user, whole):
            continue
        return False
    return True


def _has_shape(other: fx.Node, result: fx.Node, whole: bool) -> bool:
    """The result has this operand's shape, or is one that `arithmetic` spreads over a map."""
    own, wanted = tuple(other.meta["val"].shape), tuple(result.meta["val"].shape)
    return own == wanted or (whole and len(wanted) == 4 and own[1:] == (1, 1, 1) and wanted[1] == 1)


def _varies(b: Builder, node: fx.Node) -> bool:
    """It depends on the image."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at in seen or (at.op == "call_function" and target_name(at.target) in (*_FILLED, "sym_size")):
            continue
        seen.add(at)
        if at.op == "placeholder" and not isinstance(b.env[at], Constant):
            return True
        stack += at.all_input_nodes
    return False
