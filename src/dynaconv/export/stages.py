"""One convolution of a masked branch on listed rows: gather what its taps read, multiply."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dynaconv.export import computed, fused, grouped, tables, winograd
from dynaconv.export.parts import ComputedStage, FusedStage, Stage
from dynaconv.export.regions import (
    Joined,
    PerImage,
    Region,
    Squeeze,
    apply_region,
    write_per_image,
    write_squeeze,
)
from dynaconv.export.slots import slots
from dynaconv.export.tables import Grid

# From so many channels on, looking up where a tap's row lies costs less than laying out the map again.
WIDE = 128


class Listed(NamedTuple):
    """Rows [K, C] at `places` [K, 1] of a map, which `mask` lists; other positions are not known and not needed."""

    rows: Any
    places: Any
    mask: Any


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
    if isinstance(stage, ComputedStage):
        # Read in the order in which the product wants it, because to move it there later would cost as much again.
        order = slots(lowering, stage, places, need, outside)
        windows = _read(lowering, stage, x, inside, outside, order.places)
        y = computed.product(lowering, stage, windows, order, outside)
    elif winograd.serves(stage, inside, lowering.images):
        tiles = winograd.open_tiles(lowering, need)
        patches = _windows(
            lowering, winograd.PATCHES, stage.inputs, x, inside, winograd.tile_grid(inside),
            lowering.listing(tiles), (2, 1, 0),
        )  # fmt: skip
        y = winograd.product(lowering, stage, patches, inside, places, need)
    else:
        y = _product(write, stage, _read(lowering, stage, x, inside, outside, places))
    if isinstance(stage, FusedStage):
        window = fused.centre_tap(stage)
        if stage.pointwise or stage.centred:
            centres = _rows_at(lowering, stage.inputs, x, places)
        else:
            centres = _windows(lowering, window, stage.inputs, x, inside, outside, places)
            centres = write("Reshape", centres, write.integers(-1, stage.inputs))
        y = fused.fuse(lowering, stage, y, centres, places, need, outside)
    for step in stage.after:
        if isinstance(step, Squeeze):
            y = write_squeeze(lowering, step, y, places, need, outside)
        elif isinstance(step, PerImage):
            y = write_per_image(lowering, step, y, places, need, outside)
        elif isinstance(step, Region):
            y = apply_region(write, step, y)
        elif isinstance(step, Joined):
            beside = _rows_at(lowering, stage.inputs, x, places)
            y = write("Concat", *((beside, y) if step.first else (y, beside)), axis=1)
        else:
            y = apply_pointwise(write, step, y)
    return y


def _read(lowering: Any, stage: Stage, x: Any, inside: Grid, outside: Grid, places: Any) -> Any:
    """What the outputs at `places` read: rows [K, C] of a pointwise convolution, else windows [K, 1, taps, C]."""
    if not stage.pointwise:
        return _windows(lowering, stage, stage.inputs, x, inside, outside, places)
    return _rows_at(lowering, stage.inputs, x, places)


def _rows_at(lowering: Any, channels: int, x: Any, places: Any) -> Any:
    """Rows [K, C] of a map at `places`: if x lists any, of those, or whichever where a product's slots hold none."""
    write = lowering.write
    if not isinstance(x, Listed):
        return write("GatherND", x, places)
    if places is x.places:
        return x.rows
    # Slots without rows find one in an empty list, too.
    rows = _before_zeros(write, x.rows, channels)
    return write("Gather", rows, write("GatherND", lowering.index(x.mask), places), axis=0)


def _windows(
    lowering: Any, window: Any, channels: int, x: Any, inside: Grid, outside: Grid, places: Any, perm: Any = None
) -> Any:  # fmt: skip
    """Windows [K, 1, taps, C] of the outputs at `places`, zeros where they reach beyond the image.

    Args:
        window: kernel, stride, dilation and pads, as of a `Stage`. perm: of the first three axes.
    """
    write = lowering.write
    key = ("taps", window.kernel, window.stride, window.dilation, window.pads, *inside.key, *outside.key)
    table = lowering.once(key, lambda: tables.tap_table(write, window, inside, outside))
    read = write("Gather", table, places, axis=0)
    if perm is not None:
        read = write("Transpose", read, perm=perm)
    rows, listed = (x.rows, True) if isinstance(x, Listed) else (x, False)
    laid_out = listed and lays_out_map(channels, window.stride)
    if laid_out or any(window.pads):
        # Where the table points to for what is outside of the image.
        rows = _before_zeros(write, rows, channels)
    if not listed:
        return write("Gather", rows, read, axis=0)
    index = lowering.index(x.mask, strict=window is winograd.PATCHES)
    if laid_out:
        # By a gather, because a scatter copies what it writes to, with one thread.
        return write("Gather", write("Gather", rows, index, axis=0), read, axis=0)
    return write("Gather", rows, write("Gather", index, read, axis=0), axis=0)


def _before_zeros(write: Any, rows: Any, channels: int) -> Any:
    """Rows [K + 1, C]: behind all others one of zeros."""
    return write("Concat", rows, write.constant(np.zeros((1, channels), np.float32)), axis=0)


def lays_out_map(channels: int, stride: tuple[int, int]) -> bool:
    """Whether windows over listed rows are read from the whole map, rather than by where a tap's row lies."""
    return channels < WIDE and stride == (1, 1)


def row_shape(write: Any, grid: Grid, channels: int) -> Any:
    """The shape [N * h * w, channels] as a value."""
    count = tables.length(write, tables.multiply(write, *grid))
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
        if bias is not None and outputs > count * inner and not stage.after:
            # See `Rows._project`; a subtraction, since runtimes would make a product with a bias of an addition.
            return write("Sub", write("MatMul", flat, matrix), write.constant(-stage.bias))
        return write("Gemm", flat, matrix, *([] if bias is None else [bias]))
    if stage.depthwise:
        weighted = write(
            "Mul",
            write("Reshape", taps, write.integers(-1, count, groups)),
            write.constant(ordered[:, 0], name),
        )
        y = write("ReduceSum", weighted, write.integers(1), keepdims=0)
    else:
        # [taps, I, groups, O / groups] -> [groups, taps, I, O / groups].
        matrix = ordered.reshape(count, inner, groups, -1).transpose(2, 0, 1, 3)
        matrix = write.constant(matrix.reshape(groups, count * inner, -1), name)
        y = grouped.of_rows(write, taps, matrix, (count, groups, inner, outputs))
    return y if bias is None else write("Add", y, bias)
