"""Handlers of this library's own operators for masks, where a network calls them by name."""

from __future__ import annotations

from torch import fx

from dynaconv.engine.build import Builder, handles
from dynaconv.engine.build_ops import is_map
from dynaconv.engine.ir import Constant, View
from dynaconv.engine.masks import covering


@handles("dynaconv::masked_conv2d")
def masked_conv2d(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str:
    """mask * conv(x); with a shortcut added to it, only open rows are computed (masks.py)."""
    x, mask, weight, bias, stride, padding, dilation, groups = args
    size = b.map_size(node, "nchw")
    if not is_map(x, "nchw") or not is_map(mask, "nchw") or size is None:
        return "its mask is no float map"
    if not isinstance(weight, Constant) or not (bias is None or isinstance(bias, Constant)):
        return "its weight depends on the input"
    conv = b.add(
        "conv", node, size, "nchw", {"x": x.node},
        weight=weight.tensor.float(), bias=None if bias is None else bias.tensor.float(), stride=tuple(stride),
        padding=tuple(padding), dilation=tuple(dilation), groups=groups, act="none",
    )  # fmt: skip
    return b.add("mul", node, size, "nchw", {"x": conv.node, "y": mask.node}, act="none")


@handles("dynaconv::masked_mean")
def masked_mean(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str:
    """The average over open rows, as squeeze-excite layers inside masked blocks take it."""
    x, mask = args
    if not is_map(x, "nchw") or not is_map(mask, "nchw") or not mask.node.is_grid:
        return "its mask is no decision of a gate"
    if mask.node.size[:2] != x.node.size[:2]:
        return "its mask has another size"
    inputs = {"x": x.node, "grid": mask.node}
    return b.add("mean", node, (1, 1, x.node.size[2]), "nchw", inputs)


@handles("maximum")
def maximum(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str:
    """What several readers in a masked branch need together, where one of them needs all that the others do."""
    x, y = args
    if not all(is_map(mask, "nchw") and mask.node.is_grid for mask in (x, y)):
        return "no kernel for maximum"
    widest = covering([x.node, y.node])
    return "neither of its masks holds the other" if widest is None else View(widest, "nchw")


@handles("dynaconv::mask_logits")
def mask_logits(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str:
    """Logits of a squeeze unit."""
    x, weight, linear, bias, stride = args
    size = b.map_size(node, "nchw")
    if not is_map(x, "nchw") or size is None:
        return "only logits of float maps have a kernel"
    if not all(isinstance(t, Constant) for t in (weight, linear, bias)):
        return "its weight depends on the input"
    weights = {"weight": weight.tensor.float(), "linear": linear.tensor.float().reshape(-1)}
    return b.add(
        "gate", node, size, "nchw", {"x": x.node}, **weights, bias=bias.tensor.float().reshape(-1), squeeze=True,
        stride=(stride, stride), padding=(1, 1), dilation=(1, 1),
    )  # fmt: skip
