"""Handlers of operations that only look at a map in another way, and of those that make masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dynaconv.engine.build import GETITEM, Builder, handles
from dynaconv.engine.build_ops import is_map
from dynaconv.engine.build_parts import GROUPED, SHUFFLED, channel_slice, regrouped, shuffled
from dynaconv.engine.build_resampling import slice_of_positions
from dynaconv.engine.ir import Constant, Node, View


@handles("permute")
def permute(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Between [N, C, H, W] and [N, H, W, C]."""
    x, order = args[:2]
    if not is_map(x):
        return None
    turns = {("nchw", (0, 2, 3, 1)): "nhwc", ("nhwc", (0, 3, 1, 2)): "nchw"}
    layout = turns.get((x.layout, tuple(d % 4 for d in order)))
    return None if layout is None else View(x.node, layout)


@handles("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze")
def reshape(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Of maps on a 1x1 grid (any arrangement of ones), a map flattened to [N, C * H * W], and channels in groups."""
    x, shape = args[0], b.shape(node)
    if not isinstance(x, View) or x.node.size is None or x.layout == "raw" or shape is None:
        return None
    h, w, c = x.node.size
    before = b.shape(node.args[0])
    if shape == before:
        return x
    if x.layout.startswith(SHUFFLED):
        return shuffled(b, node, x)
    if x.layout.startswith(GROUPED) and shape == (c, h, w):
        return View(x.node, "nchw")
    if (h, w) == (1, 1):
        layouts = {(1, 1, c): "nhwc", (c,): "nc", (c, 1): "nc1"}
        if c > 1 or x.layout != "nhwc":
            layouts[(c, 1, 1)] = "nchw"
        return View(x.node, layouts[shape]) if shape in layouts else regrouped(b, node, x)
    layouts = {(c * h * w,): "flat", (c, h * w): "ncl"}
    if x.layout == "nchw" and shape in layouts:
        return View(x.node, layouts[shape])
    return regrouped(b, node, x)


@handles("slice")
def slice_(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Everything, the corner that crops an upsampled mask, or some channels."""
    x = args[0]
    if not isinstance(x, View) or b.shape(node) is None:
        return None
    if b.shape(node) == b.shape(node.args[0]):
        return x
    if not x.node.is_grid:
        return channel_slice(b, node, args) or slice_of_positions(b, node, args)
    start, step = (*args[2:], 0)[0] or 0, args[4] if len(args) > 4 else 1
    size = b.map_size(node, x.layout)
    if x.node.op != "upsample" or start or step != 1 or size is None or size[2] != 1:
        return None
    return b.add("upsample", node, size, x.layout, dict(x.node.inputs), **x.node.attrs)


@handles(
    "dropout", "contiguous", "clone", "detach", "alias", "feature_dropout", "lift_fresh_copy", "dropout_"
)
def same(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | Constant | None:
    """What changes nothing in evaluation."""
    x = args[0]
    if "dropout" in node.target._schema.name and args[2] and args[1]:
        return None
    return x if isinstance(x, (View, Constant)) else None


@handles("to", "_to_copy", "type_as")
def cast(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """To float32: nothing for a float, and a mask for a comparison with a threshold."""
    x, value, source = args[0], node.meta["val"], node.args[0].meta["val"]
    if not isinstance(x, View) or value.dtype != torch.float32 or value.device != source.device:
        return None
    if source.dtype == torch.float32:
        return x
    bits = x.node.attrs.get("comparison")
    if source.dtype != torch.bool or bits is None:
        return None
    logits, threshold = bits
    if logits.node.size[2] > 1:
        size = logits.node.size
        return b.add("open_channels", node, size, logits.layout, {"x": logits.node}, threshold=threshold)
    return b.add("threshold", node, logits.node.size, "nchw", {"x": logits.node}, threshold=threshold)


@handles("ge")
def greater_equal(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """Runs through ATen unless it is only cast to a mask."""
    x, threshold = args[:2]
    result = b.aten(node, "a comparison that is no mask has no kernel")
    if isinstance(threshold, Constant) and threshold.tensor.numel() == 1:
        threshold = float(threshold.tensor)
    one = is_map(x, "nchw") and 1 in (x.node.size[2], x.node.size[0] * x.node.size[1])
    if one and isinstance(threshold, (int, float)):
        result.node.attrs["comparison"] = (x, float(threshold))
    return result


@handles("repeat_interleave")
def upsample(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Of a mask: one decision for several positions, or for several channels."""
    x, dim = args[0], args[2] if len(args) > 2 else kwargs.get("dim")
    size = b.map_size(node, "nchw")
    if not isinstance(args[1], int):
        return None
    if is_map(x, "nchw") and x.node.op == "threshold" and x.node.size == (1, 1, 1) and dim == 1:
        # One decision for all channels.
        one = Node("open_channels", {"x": x.node.x}, x.node.size, dict(x.node.attrs), x.node.layer)
        b.nodes.append(one)
        x = View(one, "nchw")
    if is_map(x, "nchw") and x.node.op == "open_channels" and size is not None and dim == 1:
        return b.add("repeat", node, size, "nchw", {"x": x.node}, times=args[1])
    if not is_map(x, "nchw") or not x.node.is_grid or size is None or dim not in (2, 3, -1, -2):
        return None
    factors = list(x.node.attrs.get("factors", (1, 1)))
    factors[dim % 4 - 2] *= args[1]
    source = x.node.x if x.node.op == "upsample" else x.node
    return b.add("upsample", node, size, "nchw", {"x": source}, factors=tuple(factors))


@handles("getitem")
def getitem(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """The first result of a batch norm in evaluation mode."""
    x: Any = args[0]
    assert node.target is GETITEM
    return x if isinstance(x, View) and x.node.op == "affine" and args[1] == 0 else None
