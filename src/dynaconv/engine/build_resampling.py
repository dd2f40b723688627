"""Handlers of operations that give a map another grid: upsampling, borders, crops, flips, transposed convolutions.

All of them are sums of positions along one axis after the other, so that trying them on a map of unit vectors tells
which positions, with which factors. One kind of step computes them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dynaconv.engine.build import Builder, handles
from dynaconv.engine.build_ops import MOST_TAPS, is_map, pair
from dynaconv.engine.ir import Constant, Node, View
from dynaconv.engine.resampling import matrix_of, taps_of

# Rows that one position sums, as in csrc/plan/run.h.
_MOST_RESAMPLED = 64
_INTERPOLATIONS = (
    "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
)  # fmt: skip


def _tried(function: Callable[[Tensor], Tensor], inputs: int, axis: int) -> Tensor:
    """The matrix of what a function of maps does along one axis, 2 or 3."""
    units = torch.eye(inputs).view((1, inputs, inputs, 1) if axis == 2 else (1, inputs, 1, inputs))
    return function(units)[0].flatten(1).t().contiguous()


def resampled(
    b: Builder, node: fx.Node, x: View, lines: Tensor, columns: Tensor, **attrs: Any
) -> View | str | None:
    """A map whose positions are sums of those of another one: lines [h, H] and columns [w, W] are the factors."""
    source, size = x.node, b.map_size(node, "nchw")
    if size is None or size[:2] != (len(lines), len(columns)):
        return None
    inner = source.attrs if source.op == "resample" and source.attrs["parts"] == (1, 1) else None
    if inner is not None and inner["lines"].shape[1] == inner["columns"].shape[1] == 1:
        lines = lines @ matrix_of(inner["lines"], source.x.size[0])
        columns = columns @ matrix_of(inner["columns"], source.x.size[1])
        source = source.x
    taps = [taps_of(matrix) for matrix in (lines, columns)]
    if taps[0].shape[1] * taps[1].shape[1] > _MOST_RESAMPLED:
        return "its windows are too large"
    attrs = {"parts": (1, 1), "first": (0, 0)} | attrs
    return b.add("resample", node, size, "nchw", {"x": source}, lines=taps[0], columns=taps[1], **attrs)


def _is_picture(x: Any) -> bool:
    return is_map(x, "nchw") and not x.node.is_grid


@handles(*_INTERPOLATIONS)
def interpolate(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """Of any kind and to any size, since they all work on lines and columns apart."""
    x, size = args[0], b.map_size(node, "nchw")
    if not _is_picture(x) or size is None:
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    call = dict(zip(names, args, strict=False)) | kwargs
    matrices = []
    for axis in (0, 1):
        other = 1 - axis
        own = dict(call)
        if own.get("output_size") is not None:
            own["output_size"] = [1, 1]
            own["output_size"][axis] = size[axis]
        if own.get("scale_factors") is not None:
            own["scale_factors"] = [1.0, 1.0]
            own["scale_factors"][axis] = call["scale_factors"][axis]
        if f"scales_{'hw'[other]}" in own:
            own[f"scales_{'hw'[other]}"] = None
        function = lambda units, own=own: node.target(**{**own, names[0]: units})  # noqa: E731
        matrices.append(_tried(function, x.node.size[axis], 2 + axis))
    return resampled(b, node, x, *matrices)


@handles("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def pad(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """Borders of zeros, or of what the map holds; negative ones cut."""
    name, (x, amounts) = node.target._schema.name.removeprefix("aten::"), args[:2]
    mode, value = (*args[2:], *("constant", None)[len(args) - 2 :])[:2]
    mode, value = kwargs.get("mode", mode), kwargs.get("value", value)
    if name != "pad":
        mode, value = {"constant_pad_nd": ("constant", mode)}.get(name, (name.partition("ion_")[0], None))
        mode = {"reflect": "reflect", "replicat": "replicate"}.get(mode, mode)
        value = None if value == "constant" else value
    if mode == "constant" and len(amounts) == 6 and not any(amounts[:4]) and not value and min(amounts) >= 0:
        return _more_channels(b, node, x, *amounts[4:])
    if not _is_picture(x) or value or len(amounts) > 4 or not all(isinstance(n, int) for n in amounts):
        return "only borders of a map that are zeros or its own have a kernel"
    if not any(amounts):
        return x
    left, right, top, bottom = [*amounts, 0, 0][:4]
    h, w, _ = x.node.size
    lines = _tried(lambda units: F.pad(units, (0, 0, top, bottom), mode), h, 2)
    columns = _tried(lambda units: F.pad(units, (left, right, 0, 0), mode), w, 3)
    even = mode == "constant" and min(amounts) >= 0 and left == right and top == bottom
    return resampled(b, node, x, lines, columns, zeros=(top, left) if even else None)


def _more_channels(b: Builder, node: fx.Node, x: Any, before: int, behind: int) -> View | None:
    """Channels of zeros around those of a map: a 1x1 convolution, which takes in what follows and a stride before."""
    size = b.map_size(node, "nchw")
    if not _is_picture(x) or size is None:
        return None
    weight = F.pad(torch.eye(x.node.size[2]), (0, 0, before, behind))[:, :, None, None]
    return b.add(
        "conv", node, size, "nchw", {"x": x.node}, weight=weight, bias=None, stride=(1, 1), padding=(0, 0),
        dilation=(1, 1), groups=1, act="none",
    )  # fmt: skip


@handles("flip")
def flip(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """Of lines, of columns, or of both."""
    x, axes = args[0], {d % 4 for d in args[1]}
    if not _is_picture(x) or not axes <= {2, 3}:
        return None
    matrices = (torch.eye(n) for n in x.node.size[:2])
    return resampled(
        b, node, x, *(m.flip(0) if axis in axes else m for axis, m in zip((2, 3), matrices, strict=True))
    )


def slice_of_positions(b: Builder, node: fx.Node, args: list) -> View | str | None:
    """x[:, :, start::step], or of columns."""
    x, dim, start, _, step = (*args, *(0, 0, None, 1)[len(args) - 1 :])
    size = b.map_size(node, "nchw")
    if not _is_picture(x) or size is None or dim % 4 < 2 or not isinstance(start or 0, int):
        return None
    matrices = [torch.eye(n) for n in x.node.size[:2]]
    axis = dim % 4 - 2
    start = (start or 0) + (x.node.size[axis] if (start or 0) < 0 else 0)
    matrices[axis] = matrices[axis][max(0, start) :: step][: size[axis]]
    return resampled(b, node, x, *matrices)


@handles("pixel_shuffle")
def pixel_shuffle(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """Channels c * r * r + i of a position become channel c of r x r positions."""
    x, r = args[:2]
    if not _is_picture(x):
        return None
    matrices = (torch.eye(n).repeat_interleave(r, 0) for n in x.node.size[:2])
    return _apart(b, node, x.node, *matrices, (r, r), (0, 0), mixed=True)


@handles("pixel_unshuffle")
def pixel_unshuffle(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """r x r positions, each a map of its own, and their channels in turns."""
    x, r = args[:2]
    size = b.map_size(node, "nchw")
    if not _is_picture(x) or size is None:
        return None
    h, w, c = x.node.size
    pieces = {}
    for i in range(r * r):
        axes = (taps_of(torch.eye(n)[start::r]) for n, start in zip((h, w), divmod(i, r), strict=True))
        attrs = dict(zip(("lines", "columns"), axes, strict=True)) | {"parts": (1, 1), "first": (0, 0)}
        pieces[str(i)] = b.add("resample", node, (h // r, w // r, c), "nchw", {"x": x.node}, **attrs).node
    return b.add("interleave", node, size, "nchw", pieces)


@handles("conv_transpose2d")
def transposed(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """x, weight, bias, stride, padding, output_padding, groups, dilation."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    return transposed_convolution(b, node, defaults | dict(zip(names, args, strict=False)) | kwargs)


def transposed_convolution(b: Builder, node: fx.Node, call: dict[str, Any]) -> View | str | None:
    """A convolution for stride x stride outputs beside each other, which then take their places.

    Output s * q + p of a transposed convolution of stride s reads inputs q - j with the taps s * j + p: for each p this
    is an ordinary convolution of every s-th tap.
    """
    x, weight, bias = call["input"], call["weight"], call["bias"]
    if not isinstance(weight, Constant) or not (bias is None or isinstance(bias, Constant)):
        return "its weight depends on the input"
    size = b.map_size(node, "nchw")
    if not _is_picture(x) or size is None or weight.tensor.dim() != 4:
        return "only 2-d convolutions in float32 over images of a fixed size have kernels"
    if call["groups"] != 1 or pair(call["dilation"]) != (1, 1):
        return "transposed convolutions with groups or dilation have no kernel"
    stride, padding = pair(call["stride"]), pair(call["padding"])
    weight, each = beside_each_other(weight.tensor.float(), stride)
    if each[0] * each[1] > MOST_TAPS:
        return "its kernel has too many taps"
    parts = stride[0] * stride[1]
    wide = tuple(n + k - 1 for n, k in zip(x.node.size, each, strict=False))
    if any(n + p > s * m for n, p, s, m in zip(size, padding, stride, wide, strict=False)):
        return "its output padding reaches beyond what its kernel writes"
    conv = b.add(
        "conv", node, (*wide, parts * size[2]), "nchw", {"x": x.node}, weight=weight,
        bias=None if bias is None else bias.tensor.float().repeat(parts), stride=(1, 1),
        padding=tuple(k - 1 for k in each), dilation=(1, 1), groups=1, act="none",
    )  # fmt: skip
    matrices = (
        torch.eye(m)[(torch.arange(n) + p).div(s, rounding_mode="floor")]
        for n, p, s, m in zip(size, padding, stride, wide, strict=False)
    )
    first = tuple(p % s for p, s in zip(padding, stride, strict=True))
    return _apart(b, node, conv.node, *matrices, stride, first)


def beside_each_other(weight: Tensor, stride: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Weights [I, O, kh, kw] of a transposed convolution as those of an ordinary one, [parts * O, I, mh, mw].

    Returns:
        The weights, and (mh, mw).
    """
    inputs, outputs, *kernel = weight.shape
    each = tuple(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    behind = [m * s - k for m, s, k in zip(each, stride, kernel, strict=True)]
    full = F.pad(weight, (0, behind[1], 0, behind[0]))
    taps = full.view(inputs, outputs, each[0], stride[0], each[1], stride[1]).flip(2, 4)
    parts = taps.permute(3, 5, 1, 0, 2, 4)
    return parts.reshape(-1, inputs, *each).contiguous(), (each[0], each[1])


def _apart(
    b: Builder, node: fx.Node, source: Node, lines: Tensor, columns: Tensor, parts: tuple[int, int],
    first: tuple[int, int], mixed: bool = False,
) -> View | str | None:  # fmt: skip
    """Rows that hold several positions as these; `mixed`: their channels lie in turns."""
    size = b.map_size(node, "nchw")
    if size is None:
        return None
    axes = {"lines": taps_of(lines), "columns": taps_of(columns)}
    return b.add("resample", node, size, "nchw", {"x": source}, parts=parts, first=first, mixed=mixed, **axes)
