"""3 x 3 convolutions of listed rows by Winograd's F(2 x 2, 3 x 3): 16 products for a tile of four positions, not 36.

Source: arXiv 1509.09308, section 4.1. A tile is computed where any of its positions is listed. Its three steps are one
matrix product each: the patches' transform, the batch of sixteen products, and the transform of what they give.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dynaconv.export import tables
from dynaconv.export.parts import ComputedStage, Stage
from dynaconv.export.tables import Grid

# With fewer channels the transforms cost what the products save. Of fewer positions, in all images together, reading
# the weights does, which are 16 / 9 as many, and which ONNX Runtime lays out in each run, being more than a matrix.
CHANNELS, POSITIONS = 128, 1024
# Per axis, from right to left: of a patch of four, of the weights, of four products.
_PATCH = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
_WEIGHT = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_RESULT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)


class _Patches(NamedTuple):
    """The windows that tiles read, as a `Stage` describes its own."""

    kernel: tuple[int, int] = (4, 4)
    stride: tuple[int, int] = (2, 2)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)


PATCHES = _Patches()


def serves(stage: Stage, grid: Grid, images: int) -> bool:
    """Whether a convolution runs by tiles over the maps of so many images, of this grid.

    Where height or width is odd, tiles reach beyond the map, and such maps are mostly small.
    """
    square = stage.kernel == (3, 3) and stage.stride == stage.dilation == (1, 1) and set(stage.pads) == {1}
    if isinstance(stage, ComputedStage) or not square or stage.groups != 1 or not grid.fixed:
        return False
    even = grid.height % 2 == grid.width % 2 == 0
    many = images * grid.height * grid.width >= POSITIONS and min(stage.weight.shape[:2]) >= CHANNELS
    return even and many


def tile_grid(grid: Grid) -> Grid:
    """Tiles of a map."""
    return Grid(grid.batch, grid.height // 2, grid.width // 2)


def open_tiles(lowering: Any, need: Any) -> Any:
    """1 where a tile holds an open position of the mask `need` [N, 1, h, w], else 0: [N, 1, h / 2, w / 2]."""
    return lowering.once(
        ("tiles", need),
        lambda: lowering.write("MaxPool", need, kernel_shape=(2, 2), strides=(2, 2)),
    )


def product(lowering: Any, stage: Stage, patches: Any, grid: Grid, places: Any, need: Any) -> Any:
    """Rows [K, O] of the convolution at `places`, its bias included.

    Args:
        lowering: the `Rows` in work. patches: [16, T, C] in any shape, of the tiles that `open_tiles(need)` lists.
            grid: of the map. need: the mask that `places` [K, 1] lists.
    """
    write, (outputs, inputs) = lowering.write, stage.weight.shape[:2]
    weight = np.einsum("ai,bj,ocij->abco", _WEIGHT, _WEIGHT, stage.weight.astype(np.float64))
    weight = write.constant(
        weight.reshape(16, inputs, outputs).astype(np.float32), f"{stage.conv.inputs[1].name}.tiles"
    )
    flat = write.integers(16, -1)
    patches = write("MatMul", write.constant(np.kron(_PATCH, _PATCH)), write("Reshape", patches, flat))
    products = write("MatMul", write("Reshape", patches, write.integers(16, -1, inputs)), weight)
    quarters = write("MatMul", write.constant(np.kron(_RESULT, _RESULT)), write("Reshape", products, flat))
    rows = write("Reshape", quarters, write.integers(-1, outputs))
    found = write("GatherND", _rows_of_positions(lowering, grid, need), places)
    y = write("Gather", rows, found, axis=0)
    return y if stage.bias is None else write("Add", y, write.constant(stage.bias))


def _rows_of_positions(lowering: Any, grid: Grid, need: Any) -> Any:
    """Which row of [4 * T, O], T tiles four times, each position of the map is: [N * h * w] int32."""

    def make() -> Any:
        write, tile, quarter = lowering.write, *_tables(lowering, grid)
        tiles = open_tiles(lowering, need)
        count = write("Cast", write("Shape", lowering.listing(tiles), start=0, end=1), to=6)
        # What a position without an open tile finds is not asked for.
        return write("Add", write("Gather", lowering.index(tiles), tile), write("Mul", quarter, count))

    return lowering.once(("rows of tiles", need), make)


def _tables(lowering: Any, grid: Grid) -> tuple[Any, Any]:
    """Of each position of all images: its tile, [N * h * w], and which quarter of it, int32 likewise."""
    y, x = np.divmod(np.arange(grid.height * grid.width), grid.width)
    tile = y // 2 * (grid.width // 2) + x // 2
    quarter = (y % 2 * 2 + x % 2).astype(np.int32)
    write, flat = lowering.write, lowering.write.integers(-1)

    def tiles() -> Any:
        return write("Reshape", tables.of_images(write, tile_grid(grid), tile[None, :, None]), flat)

    def quarters() -> Any:
        shape = write("Concat", grid.batch, write.integers(quarter.size), axis=0)
        return write("Reshape", write("Expand", write.constant(quarter), shape), flat)

    return lowering.once(("tile", *grid.key), tiles), lowering.once(("quarter", *grid.key), quarters)
