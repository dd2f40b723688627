"""One convolution of a masked branch on listed rows: gather what its taps read, multiply."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dynaconv.export import computed, tables
from dynaconv.export.branches import ComputedStage, Stage
from dynaconv.export.regions import PerImage, Region, Squeeze, apply_region, write_per_image, write_squeeze
from dynaconv.export.tables import Grid


class Listed(NamedTuple):
    """Rows [K, C] at `places` [K, 1] of a map; other positions are not known and not needed."""

    rows: Any
    places: Any


def run_stage(
    lowering: Any, stage: Stage, x: Any, inside: Grid, outside: Grid, places: Any, need: Any
) -> Any:
    """Rows [K, O] of the convolution's output at `places`, with what follows it.

    Args:
        lowering: the `Rows` in work. x: rows of the whole input map, or `Listed` ones. need: the mask that
            `places` lists.
    """
    from dynaconv.export.rows import apply_pointwise

    write = lowering.write
    if stage.pointwise:
        taps = x.rows if isinstance(x, Listed) else write("GatherND", x, places)
    else:
        whole = _with_zeros(lowering, stage, x, inside)
        key = ("taps", stage.kernel, stage.stride, stage.dilation, stage.pads, *inside.key, *outside.key)
        table = lowering.once(key, lambda: tables.tap_table(write, stage, inside, outside))
        taps = write("Gather", whole, write("GatherND", table, places), axis=0)
    if isinstance(stage, ComputedStage):
        y = computed.product(lowering, stage, taps, places, need, outside)
    else:
        y = _product(write, stage, taps)
    for step in stage.after:
        if isinstance(step, Squeeze):
            y = write_squeeze(lowering, step, y, places, need, outside)
        elif isinstance(step, PerImage):
            y = write_per_image(lowering, step, y, places, need, outside)
        elif isinstance(step, Region):
            y = apply_region(write, step, y)
        else:
            y = apply_pointwise(write, step, y)
    return y


def _with_zeros(lowering: Any, stage: Stage, x: Any, grid: Grid) -> Any:
    """The input map as rows, and where windows reach beyond the image, a row of zeros behind them."""
    write, channels, frame = lowering.write, stage.weight.shape[1] * stage.groups, any(stage.pads)
    if not isinstance(x, Listed):
        zero = write.constant(np.zeros((1, channels), np.float32)) if frame else None
        return write("Concat", x, zero, axis=0) if frame else x
    shape = lowering.once(
        ("zeros", channels, frame, *grid.key), lambda: row_shape(write, grid, channels, frame)
    )
    return write("ScatterND", write("ConstantOfShape", shape), x.places, x.rows)


def row_shape(write: Any, grid: Grid, channels: int, more: int = 0) -> Any:
    """The shape [N * h * w + more, channels] as a value."""
    count = tables.add(write, tables.length(write, tables.multiply(write, *grid)), int(more))
    return write("Concat", count, write.integers(channels), axis=0)


def _product(write: Any, stage: Stage, taps: Any) -> Any:
    """taps [K, taps, C] (or [K, C]) times the weights: [K, O]."""
    weight, groups, name = stage.weight, stage.groups, f"{stage.conv.inputs[1].name}.rows"
    outputs, inner, *kernel = weight.shape
    count = int(np.prod(kernel))
    bias = None if stage.bias is None else write.constant(stage.bias)
    # [O, I, taps] -> [taps, I, O].
    ordered = weight.reshape(outputs, inner, count).transpose(2, 1, 0)
    if groups == 1:
        flat = (
            taps
            if count == 1 and stage.pointwise
            else write("Reshape", taps, write.integers(-1, count * inner))
        )
        matrix = write.constant(ordered.reshape(count * inner, outputs), name)
        return write("Gemm", flat, matrix, *([] if bias is None else [bias]))
    if stage.depthwise:
        weighted = write(
            "Mul",
            write("Reshape", taps, write.integers(-1, count, groups)),
            write.constant(ordered[:, 0], name),
        )
        y = write("ReduceSum", weighted, write.integers(1), keepdims=0)
    else:
        y = _grouped(write, taps, ordered, groups, name)
    return y if bias is None else write("Add", y, bias)


def _grouped(write: Any, taps: Any, ordered: np.ndarray, groups: int, name: str) -> Any:
    count, inner, outputs = ordered.shape
    per_group = outputs // groups
    split = write("Reshape", taps, write.integers(-1, count, groups, inner))
    split = write("Transpose", split, perm=(2, 0, 1, 3))
    flat = write("Reshape", split, write.integers(groups, -1, count * inner))
    # [taps, I, groups, O / groups] -> [groups, taps * I, O / groups].
    matrix = ordered.reshape(count, inner, groups, per_group).transpose(2, 0, 1, 3)
    matrix = write.constant(matrix.reshape(groups, count * inner, per_group), name)
    y = write("Transpose", write("MatMul", flat, matrix), perm=(1, 0, 2))
    return write("Reshape", y, write.integers(-1, outputs))
