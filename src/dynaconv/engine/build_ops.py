"""Handlers: convolutions, norms, pooling, activations, arithmetic, masks. Views are in build_views.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from dynaconv.engine.build import GETITEM, Builder, channel_vector, handles
from dynaconv.engine.ir import Constant, Node, View
from dynaconv.engine.norm_by_hand import norm_by_hand
from dynaconv.engine.plan import leaky_relu

_ACTIVATIONS = {
    "relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish", "sigmoid": "sigmoid",
    "hardsigmoid": "hardsigmoid", "gelu": "gelu", "hardtanh": "hardtanh", "clamp": "clamp", "clamp_min": "clamp",
    "tanh": "tanh", "elu": "elu", "celu": "elu", "mish": "mish",
}  # fmt: skip


# As in csrc/plan/check.cpp.
MOST_TAPS = 512


def pair(value: Any) -> tuple[int, int]:
    """One number or two as two."""
    value = [value] if isinstance(value, int) else list(value)
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def is_map(view: Any, *layouts: str) -> bool:
    """A view of a map in one of the layouts."""
    return (
        isinstance(view, View)
        and view.node.size is not None
        and view.layout in (layouts or ("nchw", "nhwc", "nc"))
    )


@handles("conv2d", "convolution")
def convolution(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """x, weight, bias, stride, padding, dilation, (transposed, output_padding,) groups."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation")
    long = node.target._schema.name == "aten::convolution"
    names += ("transposed", "output_padding", "groups") if long else ("groups",)
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "transposed": False}
    call = defaults | dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = call["input"], call["weight"], call["bias"]
    if call["transposed"]:
        from dynaconv.engine.build_resampling import transposed_convolution

        return transposed_convolution(b, node, call)
    if not isinstance(weight, Constant) or not (bias is None or isinstance(bias, Constant)):
        return "its weight depends on the input"
    size = b.map_size(node, "nchw")
    if not is_map(x, "nchw") or size is None or weight.tensor.dim() != 4:
        return "only 2-d convolutions in float32 over images of a fixed size have kernels"
    kernel, dilation = tuple(weight.tensor.shape[2:]), pair(call["dilation"])
    if math.prod(kernel) > MOST_TAPS:
        return "its kernel has too many taps"
    padding = call["padding"]
    if isinstance(padding, str):
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            return "its padding is asymmetric"
        padding = [r // 2 for r in reach] if padding == "same" else 0
    source, padding = x.node, pair(padding)
    if source.op == "resample" and source.attrs.get("zeros") is not None:
        padding = tuple(p + more for p, more in zip(padding, source.attrs["zeros"], strict=True))
        source = source.x
    return b.add(
        "conv", node, size, "nchw", {"x": source},
        weight=weight.tensor.float(), bias=None if bias is None else bias.tensor.float(),
        stride=pair(call["stride"]), padding=padding, dilation=dilation, groups=call["groups"], act="none",
    )  # fmt: skip


@handles("linear", "addmm")
def linear(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """A 1x1 convolution; over a flattened map, one whose kernel covers the map."""
    if node.target._schema.name == "aten::addmm":
        return None
    x, weight, bias = (*args, None)[:3]
    if not isinstance(weight, Constant) or not (bias is None or isinstance(bias, Constant)):
        return "its weight depends on the input"
    flat = is_map(x, "flat")
    layout = "nc" if flat else x.layout if isinstance(x, View) else "raw"
    size = b.map_size(node, layout)
    if size is None or not (flat or is_map(x, "nhwc", "nc")):
        return "only linear layers over the channels of an image have kernels"
    w = weight.tensor.float()
    if flat:
        h, wide, c = x.node.size
        if h * wide > MOST_TAPS:
            return "it reads a map of too many positions"
        w = w.reshape(-1, c, h, wide)
    else:
        w = w[:, :, None, None]
    return b.add(
        "conv", node, size, layout, {"x": x.node}, weight=w, bias=None if bias is None else bias.tensor.float(),
        stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, act="none",
    )  # fmt: skip


@handles("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """In evaluation mode: scale and shift of each channel."""
    x, weight, bias, mean, var = args[:5]
    short = node.target._schema.name == "aten::batch_norm"
    if short and args[5]:
        return "a batch norm that normalises by the batch has no kernel"
    eps = args[7] if short else args[6]
    if not is_map(x) or not all(isinstance(t, Constant) or t is None for t in args[1:5]) or mean is None:
        return None
    scale = torch.rsqrt(var.tensor.double() + eps)
    scale = scale if weight is None else scale * weight.tensor.double()
    shift = -mean.tensor.double() * scale
    shift = shift if bias is None else shift + bias.tensor.double()
    return b.add(
        "affine", node, x.node.size, x.layout, {"x": x.node}, scale=scale.float(), shift=shift.float()
    )


@handles(*_ACTIVATIONS)
def activation(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """Those with a kernel; bounds other than the usual ones go to ATen."""
    name = _ACTIVATIONS[node.target._schema.name.removeprefix("aten::")]
    x, rest = args[0], [*args[1:], *kwargs.values()]
    if name == "hardtanh":
        name = "relu6" if [float(v) for v in rest] == [0.0, 6.0] else ""
    elif name == "clamp":
        bounds = (*rest, None)[:2]
        name = {(0, None): "relu", (0, 6): "relu6"}.get(bounds, "")
    elif name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get((*rest, "none")[0], "")
    elif name == "elu":
        name = "elu" if all(factor == 1 for factor in rest) else ""
    if not name or not is_map(x):
        return None
    return b.add("act", node, x.node.size, x.layout, {"x": x.node}, act=name)


@handles("leaky_relu", "prelu", "rrelu")
def leaky(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """With one slope, as an activation where that lies between 0 and 1, or with one for each channel."""
    x, name = args[0], node.target._schema.name
    if not is_map(x):
        return None
    if name == "aten::prelu":
        slopes = args[1].tensor.float() if isinstance(args[1], Constant) else None
        if slopes is None:
            return "its slopes depend on the input"
    elif name == "aten::rrelu":
        lower, upper, training = (*args[1:], *(0.125, 1 / 3, False)[len(args) - 1 :])[:3]
        if training:
            return "its slopes are drawn at random"
        slopes = torch.tensor([(lower + upper) / 2])
    else:
        slopes = torch.tensor([(*args[1:], *kwargs.values(), 0.01)[0]], dtype=torch.float64)
    act = leaky_relu(float(slopes[0])) if bool((slopes == slopes[0]).all()) else None
    if act is not None:
        return b.add("act", node, x.node.size, x.layout, {"x": x.node}, act=act)
    each = slopes.float().expand(x.node.size[2]).contiguous()
    return b.add("slopes", node, x.node.size, x.layout, {"x": x.node}, slopes=each)


@handles("add", "sub", "rsub", "mul", "div", "neg")
def arithmetic(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """Two maps of one size (or one broadcast), or a map with a constant for each channel."""
    name = node.target._schema.name.removeprefix("aten::")
    if name == "div" and not kwargs:
        norm = norm_by_hand(b, node)
        if norm is not None:
            return norm
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") or args[2:] not in ([], [1]):
        return None
    if name == "neg":
        name, args = "mul", [*args, -1]
    a, c = args[:2]
    if name == "rsub":
        name, a, c = "sub", c, a
    if is_map(a) and is_map(c):
        return _of_two(b, node, name, a, c)
    one = 1
    if not is_map(a) and name != "div":
        # k - x = -x + k
        a, c, one = c, a, -1 if name == "sub" else 1
        name = "add" if name == "sub" else name
    if not is_map(a):
        return None
    vector, size = channel_vector(a, c), b.map_size(node, a.layout)
    if vector is None:
        return None
    if size != a.node.size:
        if size is None or a.node.size != (1, 1, 1) or size[2] != 1 or a.layout != "nchw":
            return None
        # Every position of the average of a single one is that one.
        a = b.add("mean", node, size, "nchw", {"x": a.node})
    zero = torch.zeros_like(vector)
    scale, shift = {
        "add": (zero + one, vector), "sub": (zero + 1, -vector), "mul": (vector, zero), "div": (1 / vector, zero)
    }[name]  # fmt: skip
    if bool((scale == 1).all()) and bool((shift == 0).all()):
        return a
    return b.add("affine", node, a.node.size, a.layout, {"x": a.node}, scale=scale, shift=shift)


@handles("addcmul")
def addcmul(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """shift + value * scale * x, with constants for each channel, as global response norms end (arXiv 2301.00808)."""
    start, x, factor = args[0], *args[1:3]
    if not is_map(x):
        x, factor = factor, x
    if not is_map(x) or b.map_size(node, x.layout) != x.node.size:
        return None
    scale, shift = channel_vector(x, factor), channel_vector(x, start)
    if scale is None or shift is None:
        return None
    scale = scale * float(kwargs.get("value", 1))
    return b.add("affine", node, x.node.size, x.layout, {"x": x.node}, scale=scale, shift=shift)


def _of_two(b: Builder, node: fx.Node, name: str, a: View, c: View) -> View | str | None:
    if name == "sub":
        same = a.node.size == c.node.size == b.map_size(node, a.layout) and a.layout == c.layout
        inputs = {"x": a.node, "y": c.node}
        return b.add("sub", node, a.node.size, a.layout, inputs, act="none") if same else None
    if name not in ("add", "mul"):
        return None
    if name == "mul" and a.node.is_grid and c.node.is_grid and a.node.size == c.node.size:
        return _both(b, a, c)
    # Masks and vectors may be written first.
    size = b.map_size(node, a.layout)
    if c.node.size == size and a.node.size != size or (a.node.is_grid and not c.node.is_grid):
        a, c = c, a
    h, w, channels = a.node.size
    fits = c.node.size in ((h, w, channels), (1, 1, channels), (h, w, 1))
    same_layout = a.layout == c.layout or (
        c.node.size[:2] == (1, 1) and c.layout == "nc1" and a.layout == "nchw"
    )
    if size != a.node.size or not fits or not same_layout or (c.node.size == (1, 1, 1) and channels > 1):
        return None
    return b.add(name, node, size, a.layout, {"x": a.node, "y": c.node}, act="none")


def _both(b: Builder, a: View, c: View) -> View | None:
    """Positions that two masks leave open: the decision of the one, within the other."""
    if a.node.op != "threshold" or "within" in a.node.inputs:
        a, c = c, a
    if a.node.op != "threshold" or "within" in a.node.inputs:
        return None
    # The decision is still that of the gate that made it.
    both = Node("threshold", {"x": a.node.x, "within": c.node}, a.node.size, dict(a.node.attrs), a.node.layer)
    b.nodes.append(both)
    return View(both, a.layout)


@handles("max_pool2d", "max_pool2d_with_indices")
def max_pool(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Padding counts as -inf. A mask grown on all sides stays a mask."""
    x, kernel = args[:2]
    call = {"stride": [], "padding": 0, "dilation": 1}
    call |= dict(zip(("stride", "padding", "dilation"), args[2:], strict=False)) | kwargs
    size = b.map_size(node, "nchw") if node.target._schema.name == "aten::max_pool2d" else None
    if not is_map(x, "nchw") or size is None:
        return None
    attrs = {name: pair(call[name]) for name in ("padding", "dilation")}
    attrs |= {"kernel": pair(kernel), "stride": pair(call["stride"] or kernel)}
    if x.node.is_grid and attrs["stride"] == (1, 1) and _centered(**attrs):
        return b.add("dilate", node, size, "nchw", {"grid": x.node}, **attrs)
    if math.prod(attrs["kernel"]) > MOST_TAPS:
        return _max_of_lines(b, node, x, size, attrs)
    return b.add("max_pool", node, size, "nchw", {"x": x.node}, act="none", **attrs)


def _max_of_lines(
    b: Builder, node: fx.Node, x: View, size: tuple[int, int, int], attrs: dict[str, tuple[int, int]]
) -> View:
    """Along columns, then along rows: the largest of the largest."""
    alone = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
    down = {name: (attrs[name][0], one) for name, one in alone.items()}
    across = {name: (one, attrs[name][1]) for name, one in alone.items()}
    tall = (size[0], x.node.size[1], size[2])
    lines = b.add("max_pool", node, tall, "nchw", {"x": x.node}, act="none", **down)
    return b.add("max_pool", node, size, "nchw", {"x": lines.node}, act="none", **across)


def _centered(kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], **_: Any) -> bool:
    """Windows reach as far before a position as behind it."""
    return all(2 * p == d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True))


@handles("avg_pool2d")
def avg_pool(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """With the divisors of PyTorch."""
    x, kernel = args[:2]
    names = ("stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    call = {"stride": [], "padding": 0, "count_include_pad": True, "divisor_override": None}
    call |= dict(zip(names, args[2:], strict=False)) | kwargs
    size = b.map_size(node, "nchw")
    if not is_map(x, "nchw") or size is None or call["divisor_override"] is not None:
        return None
    stride, padding = pair(call["stride"] or kernel), pair(call["padding"])
    # With ceil_mode a window may be larger than the map; what lies outside does not count.
    room = [s + 2 * p for s, p in zip(x.node.size, padding, strict=False)]
    kernel = tuple(min(k, r) for k, r in zip(pair(kernel), room, strict=True))
    if kernel == x.node.size[:2] and padding == (0, 0):
        return b.add("mean", node, size, "nchw", {"x": x.node})
    if math.prod(kernel) > MOST_TAPS:
        return "its windows are too large"
    return b.add(
        "avg_pool", node, size, "nchw", {"x": x.node}, kernel=kernel, stride=stride,
        padding=padding, dilation=(1, 1), include_pad=bool(call["count_include_pad"]),
    )  # fmt: skip


@handles("adaptive_avg_pool2d")
def adaptive_pool(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """To any size."""
    x, size = args[0], b.map_size(node, "nchw")
    if not is_map(x, "nchw") or size is None:
        return None
    if size == x.node.size:
        return x
    return b.add("mean", node, size, "nchw", {"x": x.node})


@handles("adaptive_max_pool2d")
def adaptive_max_pool(b: Builder, node: fx.Node, args: list, kwargs: dict) -> list[View] | str | None:
    """To a size that divides the map, whose places nobody asks for."""
    x, value = args[0], node.meta["val"]
    places = any(user.target is not GETITEM or (user.args[1] and user.users) for user in node.users)
    if not is_map(x, "nchw") or x.node.is_grid or places:
        return "only the largest values themselves have a kernel"
    (h, w, c), out = x.node.size, tuple(value[0].shape[2:])
    if h % out[0] or w % out[1]:
        return "its windows are of different sizes"
    kernel = h // out[0], w // out[1]
    attrs = {"kernel": kernel, "stride": kernel, "padding": (0, 0), "dilation": (1, 1)}
    found = _max_of_lines(b, node, x, (*out, c), attrs)
    return [found, found]


@handles("mean")
def mean(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Over both axes of the grid."""
    x, dims = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if is_map(x, "nc1") and dims and [d % 3 for d in dims] == [2] and not keep and not kwargs.get("dtype"):
        return View(x.node, "nc")
    if is_map(x, "ncl") and dims and [d % 3 for d in dims] == [2] and not keep and not kwargs.get("dtype"):
        return b.add("mean", node, (1, 1, x.node.size[2]), "nc", {"x": x.node})
    if not is_map(x, "nchw", "nhwc") or not dims:
        return None
    if x.layout == "nchw" and [d % 4 for d in dims] == [1] and keep and not kwargs.get("dtype"):
        return _mean_of_channels(b, node, x)
    first = 2 if x.layout == "nchw" else 1
    if sorted(d % 4 for d in dims) != [first, first + 1] or kwargs.get("dtype") is not None:
        return None
    return b.add("mean", node, (1, 1, x.node.size[2]), x.layout if keep else "nc", {"x": x.node})


def _mean_of_channels(b: Builder, node: fx.Node, x: View) -> View:
    h, w, c = x.node.size
    return b.add(
        "conv", node, (h, w, 1), "nchw", {"x": x.node}, weight=torch.full((1, c, 1, 1), 1 / c), bias=None,
        stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, act="none",
    )  # fmt: skip


@handles("layer_norm")
def layer_norm(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Over channels."""
    x, shape = args[:2]
    call = {"weight": None, "bias": None, "eps": 1e-5}
    call |= dict(zip(("weight", "bias", "eps"), args[2:], strict=False)) | kwargs
    if not is_map(x, "nhwc", "nc") or list(shape) != [x.node.size[2]]:
        return None
    weight, bias = call["weight"], call["bias"]
    if not all(t is None or isinstance(t, Constant) for t in (weight, bias)):
        return None
    c = x.node.size[2]
    return b.add(
        "layer_norm", node, x.node.size, x.layout, {"x": x.node}, eps=call["eps"],
        weight=torch.ones(c) if weight is None else weight.tensor.float(),
        bias=torch.zeros(c) if bias is None else bias.tensor.float(),
    )  # fmt: skip


@handles("softmax", "_softmax")
def softmax(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Over channels."""
    x, dim = args[:2]
    if not is_map(x) or b.map_size(node, x.layout) is None:
        return None
    axes, axis = (2, 1) if x.layout == "nc" else (4, 1 if x.layout == "nchw" else 3)
    if dim % axes != axis:
        return None
    return b.add("softmax", node, x.node.size, x.layout, {"x": x.node}, group=x.node.size[2], scale=1.0)


@handles("cat")
def concat(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Along channels."""
    parts, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not parts or not all(is_map(p) and p.layout == parts[0].layout for p in parts):
        return None
    layout = parts[0].layout
    axes, axis = (2, 1) if layout == "nc" else (4, 1 if layout == "nchw" else 3)
    size = b.map_size(node, layout)
    if dim % axes != axis or size is None or any(p.node.is_grid for p in parts):
        return None
    return b.add("concat", node, size, layout, {str(i): p.node for i, p in enumerate(parts)})
