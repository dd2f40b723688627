"""Branches with channel gates: every image computes its open hidden channels, as many groups as the fullest has.

Where an image has fewer, groups of zeros stand for the rest. Hidden maps are rows of open channels, and a convolution
is one product for each image: windows [h * w, taps * open inputs] with weights that are gathered in blocks, open inputs
times open outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dynaconv.export import tables
from dynaconv.export.channels import ChannelBranch
from dynaconv.export.parts import Stage
from dynaconv.export.regions import Region, apply_region
from dynaconv.export.tables import Grid, multiply


class Open(NamedTuple):
    """The open groups of each image, [N, M], of `count`; the number `count` stands for none.

    most: M, [1]. width: channels of a group. channels: M * width, [1].
    """

    groups: Any
    most: Any
    count: int
    width: int
    channels: Any


def run_branch(lowering: Any, branch: ChannelBranch, grids: list[Grid]) -> Any:
    """Rows [N * h * w, O] of the last convolution.

    Args:
        lowering: the `Rows` in work. grids: of the branch's input and of every convolution's output.
    """
    from dynaconv.export.rows import apply_pointwise

    write, (first, *_, last) = lowering.write, branch.stages
    open_ = open_groups(write, branch)
    rows, channels = lowering.rows(branch.source), first.inputs
    if first.groups > 1:
        rows, channels = _narrowed(write, rows, open_, channels, grids[0]), open_.channels
    for stage, inside, outside in zip(branch.stages, grids[:-1], grids[1:], strict=True):
        windows = _windows(lowering, stage, rows, channels, inside, outside)
        if stage.groups > 1:
            y = (
                _depthwise(write, stage, windows, open_)
                if stage.depthwise
                else _grouped(write, stage, windows, open_)
            )
        else:
            y = write("MatMul", windows, _matrix(write, stage, open_, stage is not first, stage is not last))
        y = _with_bias(write, stage, y, open_, stage is not last)
        for step in stage.after:
            y = apply_region(write, step, y) if isinstance(step, Region) else apply_pointwise(write, step, y)
        channels = branch.channels if stage is last else open_.channels
        rows = write("Reshape", y, _shape(write, -1, channels))
    return rows


def open_groups(write: Any, branch: ChannelBranch) -> Open:
    """Lists them in their order."""
    count = branch.groups
    mask = write("Reshape", branch.mask, write.integers(-1, count))
    place = write("Mul", write("CumSum", mask, write.constant(np.array(1))), mask)
    # [N, places, groups]: which group is at a place; a row without any gives `count`.
    places = write.constant(np.arange(1, count + 1, dtype=np.float32)[:, None])
    hits = write("Cast", write("Equal", write("Unsqueeze", place, write.integers(1)), places), to=1)
    number = write.constant(np.arange(count, dtype=np.float32) - count)
    groups = write("Add", write("MatMul", hits, number), write.constant(np.float32([count])))
    sums = write("Cast", write("ReduceSum", mask, write.integers(1), keepdims=0), to=7)
    most = write("Max", write("ReduceMax", sums, write.integers(0), keepdims=1), write.integers(1))
    groups = write("Slice", write("Cast", groups, to=7), write.integers(0), most, write.integers(1))
    return Open(groups, most, count, branch.width, multiply(write, most, branch.width))


def _shape(write: Any, *sizes: Any) -> Any:
    """A shape of numbers and values [1]."""
    return write("Concat", *(tables.length(write, size) for size in sizes), axis=0)


def _narrowed(write: Any, rows: Any, open_: Open, channels: int, grid: Grid) -> Any:
    """Rows [N * h * w, open channels] of rows [N * h * w, C], which a first convolution in groups reads."""
    width, area = channels // open_.count, multiply(write, grid.height, grid.width)
    whole = write("Reshape", rows, _shape(write, -1, area, open_.count, width))
    whole = write("Reshape", write("Transpose", whole, perm=(0, 2, 1, 3)), _shape(write, -1, area, width))
    number = write("Unsqueeze", tables.count(write, grid.batch), write.integers(1))
    # Any group will do where there is none, since the weights are zeros.
    groups = write("Min", open_.groups, write.integers(open_.count - 1))
    places = write("Add", write("Mul", number, write.integers(open_.count)), groups)
    taken = write("Transpose", write("Gather", whole, places, axis=0), perm=(0, 2, 1, 3))
    return write("Reshape", taken, _shape(write, -1, open_.channels))


def _windows(lowering: Any, stage: Stage, rows: Any, channels: Any, inside: Grid, outside: Grid) -> Any:
    """What every position of the output reads, [N, h * w, taps * channels], zeros beyond the image."""
    write, count = lowering.write, int(np.prod(stage.kernel))
    if not stage.pointwise:
        key = ("taps", stage.kernel, stage.stride, stage.dilation, stage.pads, *inside.key, *outside.key)
        table = lowering.once(key, lambda: tables.tap_table(write, stage, inside, outside))
        if any(stage.pads):
            rows = write("Concat", rows, write("ConstantOfShape", _shape(write, 1, channels)), axis=0)
        rows = write("Gather", rows, table, axis=0)
    area = multiply(write, outside.height, outside.width)
    return write("Reshape", rows, _shape(write, -1, area, multiply(write, channels, count)))


def _matrix(write: Any, stage: Stage, open_: Open, inputs: bool, outputs: bool) -> Any:
    """[N, taps * inputs, outputs] of a convolution without groups; which of both are open channels only."""
    (out, inner), count = stage.weight.shape[:2], int(np.prod(stage.kernel))
    sizes = [[open_.count, open_.width] if chosen else [n] for n, chosen in ((inner, inputs), (out, outputs))]
    blocks = stage.weight.reshape(out, inner, count).transpose(2, 1, 0).reshape(count, *sizes[0], *sizes[1])
    axes = [axis for axis, chosen in ((1, inputs), (1 + len(sizes[0]), outputs)) if chosen]
    rows, columns = (open_.channels if chosen else n for n, chosen in ((inner, inputs), (out, outputs)))
    shape = _shape(write, -1, multiply(write, rows, count), columns)
    return write("Reshape", _chosen(write, blocks, open_, axes), shape)


def _depthwise(write: Any, stage: Stage, windows: Any, open_: Open) -> Any:
    """[N, h * w, open channels] of a convolution with one filter a channel."""
    count = int(np.prod(stage.kernel))
    blocks = stage.weight.reshape(open_.count, open_.width, count).transpose(2, 0, 1)
    weight = write("Reshape", _chosen(write, blocks, open_, [1]), _shape(write, -1, 1, count, open_.channels))
    split = write("Reshape", windows, _shape(write, 0, 0, count, open_.channels))
    return write("ReduceSum", write("Mul", split, weight), write.integers(2), keepdims=0)


def _grouped(write: Any, stage: Stage, windows: Any, open_: Open) -> Any:
    """[N, h * w, open channels] of a convolution with groups, some to every group of the gate."""
    (out, inner), count = stage.weight.shape[:2], int(np.prod(stage.kernel))
    each, groups = out // stage.groups, multiply(write, open_.most, stage.groups // open_.count)
    # [groups, taps, I, O / groups].
    blocks = stage.weight.reshape(stage.groups, each, inner, count).transpose(0, 3, 2, 1)
    own = _chosen(write, blocks.reshape(open_.count, -1), open_, [0])
    weight = write("Reshape", own, _shape(write, -1, groups, count * inner, each))
    split = write("Reshape", windows, _shape(write, 0, 0, count, groups, inner))
    split = write("Transpose", split, perm=(0, 3, 1, 2, 4))
    flat = write("Reshape", split, write.integers(0, 0, -1, count * inner))
    y = write("Transpose", write("MatMul", flat, weight), perm=(0, 2, 1, 3))
    return write("Reshape", y, _shape(write, 0, 0, open_.channels))


def _with_bias(write: Any, stage: Stage, y: Any, open_: Open, outputs: bool) -> Any:
    """[N, h * w, channels] with the bias of those channels."""
    if stage.bias is None:
        return y
    if not outputs:
        return write("Add", y, write.constant(stage.bias))
    own = _chosen(write, stage.bias.reshape(open_.count, open_.width), open_, [0])
    return write("Add", y, write("Reshape", own, _shape(write, -1, 1, open_.channels)))


def _chosen(write: Any, blocks: np.ndarray, open_: Open, axes: list[int]) -> Any:
    """Constants with the open groups along some axes, [N, *shape]: one gather, of blocks behind the last of the axes.

    Args:
        blocks: any axes; those in `axes` are groups.
    """
    padded = np.pad(blocks, [(0, int(axis in axes)) for axis in range(blocks.ndim)])
    depth = max(axes) + 1
    index, stride = None, 1
    for axis in reversed(range(depth)):
        behind, size = [1] * (depth - axis - 1), padded.shape[axis]
        if axis in axes:
            part = write("Reshape", open_.groups, _shape(write, -1, *[1] * axis, open_.most, *behind))
            part = multiply(write, part, stride)
        else:
            part = write.constant(np.arange(size).reshape(1, *[1] * axis, -1, *behind) * stride)
        index = part if index is None else write("Add", part, index)
        stride *= size
    flat = write.constant(padded.reshape(stride, -1).astype(np.float32), "blocks")
    return write("Gather", flat, index, axis=0)
