"""Index lists of masks, and tables that say which rows the taps of a convolution read.

A map is held as rows, [N * h * w, C]: one row a position, images one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dynaconv.export.graph import Writer, ir_tensor
from dynaconv.export.parts import Stage

# Behind every row of any map, and a sum with any of them still fits the 32 bits that OpenVINO counts places with.
OUTSIDE = 2**30


class Grid(NamedTuple):
    """Sizes of a map: whole numbers, or values [1] of int64 where they are free. batch is always a value [1]."""

    batch: Any
    height: Any
    width: Any

    @property
    def fixed(self) -> bool:
        """Height and width are known."""
        return isinstance(self.height, int) and isinstance(self.width, int)

    @property
    def key(self) -> tuple[Any, ...]:
        """To recognise equal grids by."""
        return tuple(v if isinstance(v, int) else id(v) for v in self)


def length(write: Writer, size: Any) -> Any:
    """A size as a value [1]."""
    return write.integers(size) if isinstance(size, int) else size


def shape_of(write: Writer, grid: Grid, *behind: int, front: tuple[Any, ...] | None = None) -> Any:
    """The shape (batch, height, width, *behind) as a value; `front` replaces the first three."""
    sizes = [*(tuple(grid) if front is None else front), *behind]
    if all(isinstance(s, int) for s in sizes):
        return write.integers(*sizes)
    if front is None and grid.fixed:
        return write.integers(-1, *sizes[1:])
    return write("Concat", *(length(write, s) for s in sizes), axis=0)


def multiply(write: Writer, *factors: Any) -> Any:
    """A product of sizes: a whole number, or a value [1]."""
    number = int(np.prod([f for f in factors if isinstance(f, int)], dtype=np.int64))
    free = [f for f in factors if not isinstance(f, int)]
    if not free:
        return number
    y = free[0]
    for factor in [*free[1:], *([write.integers(number)] if number != 1 else [])]:
        y = write("Mul", y, factor)
    return y


def add(write: Writer, size: Any, amount: int) -> Any:
    """size + amount."""
    if isinstance(size, int):
        return size + amount
    return size if amount == 0 else write("Add", size, write.integers(amount))


def output_grid(write: Writer, stage: Stage, grid: Grid) -> Grid:
    """The grid of a convolution's output."""
    sizes = []
    for axis, size in enumerate((grid.height, grid.width)):
        lost = stage.dilation[axis] * (stage.kernel[axis] - 1) + 1
        room, step = add(write, size, stage.pads[axis] + stage.pads[axis + 2] - lost), stage.stride[axis]
        if isinstance(room, int):
            sizes.append(room // step + 1)
        else:
            sizes.append(add(write, room if step == 1 else write("Div", room, write.integers(step)), 1))
    return Grid(grid.batch, *sizes)


def open_rows(write: Writer, mask: Any) -> Any:
    """Places of the open positions of a mask [N, 1, h, w] in its rows, all images in one list: [K, 1] int64."""
    flat = write("Reshape", mask, write.integers(-1))
    found = write("NonZero", flat)
    return write("Reshape", found, write.integers(-1, 1))


def ranks(write: Writer, mask: Any, strict: bool = False) -> Any:
    """Which entry of `open_rows` each open position of a mask of zeros and ones is.

    Returns:
        [N * h * w + 1] int32; the last one, behind all positions, is the number of entries. Closed positions have some
        entry or that number, too; -1 with `strict`, which takes two operations more.
    """
    listed = write("Cast", write("Reshape", mask, write.integers(-1)), to=6)
    listed = write("Concat", listed, write.constant(np.zeros(1, np.int32)), axis=0)
    first = write.constant(np.array(0))
    if not strict:
        return write("CumSum", listed, first, exclusive=1)
    counted = write("Mul", write("CumSum", listed, first), listed)
    return write("Sub", counted, write.constant(np.ones(1, np.int32)))


def members(write: Writer, image: Any, batch: Any) -> Any:
    """1 where a row belongs to an image, else 0: [N, K] float, from the image [K] of each row."""
    numbers = write("Unsqueeze", count(write, batch), write.integers(1))
    return write("Cast", write("Equal", numbers, write("Unsqueeze", image, write.integers(0))), to=1)


def tap_table(write: Writer, stage: Stage, grid: Grid, out: Grid) -> Any:
    """Rows of the input map that each output position reads: [N * h * w, taps] int64.

    A tap outside the image reads the row behind the last one, which holds zeros.

    Args:
        grid: the input map. out: the convolution's output.
    """
    axes = [
        _axis(write, *sizes, stage.stride[i], stage.pads[i], np.arange(stage.kernel[i]) * stage.dilation[i])
        for i, sizes in enumerate(((grid.height, out.height), (grid.width, out.width)))
    ]
    if grid.fixed and out.fixed:
        (y, y_inside), (x, x_inside) = axes
        rows = y[:, None, :, None] * grid.width + x[None, :, None, :]
        image = np.where(y_inside[:, None, :, None] & x_inside[None, :, None, :], rows, OUTSIDE)
        image = image.reshape(1, out.height * out.width, -1)
    else:
        image = _free_table(write, axes, grid.width, int(np.prod(stage.kernel)))
    table = of_images(write, grid, image)
    if any(stage.pads):
        table = write("Min", table, length(write, multiply(write, *grid)))
    return write("Reshape", table, write.integers(-1, int(np.prod(stage.kernel))))


def of_images(write: Writer, grid: Grid, table: Any) -> Any:
    """A table of places in one map of this grid, [1, rows, columns], for all images: [N, rows, columns] int64."""
    area = length(write, multiply(write, grid.height, grid.width))
    start = write("Reshape", write("Mul", count(write, grid.batch), area), write.integers(-1, 1, 1))
    return write("Add", start, _value(write, table))


def _axis(write: Writer, size: Any, out: Any, stride: int, pad: int, offsets: np.ndarray) -> tuple[Any, Any]:
    """Along one axis: what each output position reads, [out, k], and which of that lies in the image."""
    if isinstance(size, int) and isinstance(out, int):
        at = np.arange(out)[:, None] * stride - pad + offsets
        return at, (at >= 0) & (at < size)
    first = write("Unsqueeze", write("Mul", count(write, out), write.integers(stride)), write.integers(1))
    at = write("Add", first, write.constant((offsets - pad).astype(np.int64)))
    inside = write("GreaterOrEqual", at, write.integers(0)), write("Less", at, length(write, size))
    return at, write("And", *inside)


def _free_table(write: Writer, axes: list[tuple[Any, Any]], width: Any, taps: int) -> Any:
    """`tap_table` of one image, [1, h * w, taps], where sizes are free."""
    places = write.integers(1, 3), write.integers(0, 2)
    (y, y_inside), (x, x_inside) = (
        [write("Unsqueeze", _value(write, part), place) for part in axis]
        for axis, place in zip(axes, places, strict=True)
    )
    rows = write("Add", write("Mul", y, length(write, width)), x)
    rows = write("Where", write("And", y_inside, x_inside), rows, write.integers(OUTSIDE))
    return write("Reshape", rows, write.integers(1, -1, taps))


def _value(write: Writer, part: Any) -> Any:
    return write.constant(part) if isinstance(part, np.ndarray) else part


def count(write: Writer, size: Any) -> Any:
    """0, 1, ..., size - 1."""
    if isinstance(size, int):
        return write.constant(np.arange(size))
    # A sum, because runtimes fold it where they know the size; ONNX Runtime 1.31 refuses such a Range.
    ones = write("ConstantOfShape", size, value=ir_tensor(np.ones(1, np.int64)))
    return write("CumSum", ones, write.constant(np.array(0)), exclusive=1)


def needed(write: Writer, mask: Any, stage: Stage, inside: Grid, outside: Grid) -> Any:
    """1 at positions of the convolution's input map that open outputs read, else 0: [N, 1, H, W].

    Args:
        mask: [N, 1, h, w], of the outputs. inside, outside: grids of the input map and of the outputs.

    Source: arXiv 1912.03203, section 3.3, for any geometry.
    """
    (top, left, bottom, right), kernel, dilation = stage.pads, stage.kernel, stage.dilation
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if (
        stage.stride == (1, 1)
        and (top + bottom, left + right) == tuple(reach)
        and (top, left) == (bottom, right)
        # ONNX Runtime refuses a border as wide as the kernel, though dilation may reach farther.
        and all(p < k for p, k in zip((top, left), kernel, strict=True))
    ):
        return write(
            "MaxPool", mask, kernel_shape=kernel, pads=stage.pads, strides=(1, 1), dilations=dilation
        )
    enlarged = _enlarged(write, mask, stage, inside, outside)
    if enlarged is not None:
        return enlarged
    ones = write.constant(np.ones((1, 1, *kernel), np.float32))
    spread = write("ConvTranspose", mask, ones, kernel_shape=kernel, strides=stage.stride, dilations=dilation)
    # The last rows of the input may lie beyond the last window.
    extra = [max(0, s - 1) for s in stage.stride]
    if any(extra):
        spread = write("Pad", spread, write.integers(0, 0, 0, 0, 0, 0, *extra))
    starts, axes = write.integers(top, left), write.integers(2, 3)
    ends = shape_of(write, inside, front=(add(write, inside.height, top), add(write, inside.width, left)))
    return write("Min", write("Slice", spread, starts, ends, axes), write.constant(np.ones(1, np.float32)))


def _enlarged(write: Writer, mask: Any, stage: Stage, inside: Grid, outside: Grid) -> Any:
    """`needed` of a strided convolution as a maximum over the mask enlarged by its strides, or None.

    Position p is read by outputs (p + pad - kernel + 1) / stride to (p + pad) / stride, rounded inwards: in the mask
    with each position repeated `stride` times, by those at p + pad - kernel + stride to p + pad.
    """
    if not (inside.fixed and outside.fixed) or stage.dilation != (1, 1):
        return None
    window = tuple(k - s + 1 for k, s in zip(stage.kernel, stage.stride, strict=True))
    before = [w - 1 - p for w, p in zip(window, stage.pads[:2], strict=True)]
    enlarged = [d * s for d, s in zip(outside[1:], stage.stride, strict=True)]
    behind = [n + w - 1 - e - b for n, w, e, b in zip(inside[1:], window, enlarged, before, strict=True)]
    if not all(0 <= p < w for p, w in zip((*before, *behind), (*window, *window), strict=True)):
        return None
    scales = write.constant(np.array([1, 1, *stage.stride], np.float32))
    repeated = write(
        "Resize", mask, None, scales, mode="nearest", coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )  # fmt: skip
    return write("MaxPool", repeated, kernel_shape=window, strides=(1, 1), pads=(*before, *behind))
