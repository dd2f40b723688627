"""The order in which products for each image take listed rows: image by image, as many for each."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dynaconv.export.graph import ir_tensor
from dynaconv.export.mixing import plan
from dynaconv.export.parts import ComputedStage
from dynaconv.export.tables import Grid


class Slots(NamedTuple):
    """Where the rows of a product lie, image by image, as many for each image.

    places: [N * most, 1], of the output positions; of those that hold no row, the first position. rows: which of them
    hold the listed rows, [K, 1], or None where they are the listed rows themselves. most: [1]. image: of each row, [K],
    or None where a batched product or a single image tells.
    """

    places: Any
    rows: Any = None
    most: Any = None
    image: Any = None


def slots(lowering: Any, stage: ComputedStage, places: Any, need: Any, grid: Grid) -> Slots:
    """In which order a convolution's product takes its rows; arguments as of `image_slots`."""
    if stage.kernels.shape[0] == 1:
        return Slots(places)
    if stage.depthwise or plan(stage, grid).shared:
        return Slots(places, image=lowering.image(places, need, grid))
    return image_slots(lowering, places, need, grid)


def image_slots(lowering: Any, places: Any, need: Any, grid: Grid) -> Slots:
    """As many rows for each image as the fullest has, so that they make one batched product.

    Args:
        lowering: the `Rows` in work. places: [K, 1] of the rows. need: the mask that lists them. grid: of the output.
    """
    return lowering.once(("slots", need), lambda: _slots(lowering, places, need, grid))


def _slots(lowering: Any, places: Any, need: Any, grid: Grid) -> Slots:
    write = lowering.write
    image, member = lowering.image(places, need, grid), lowering.member(places, need, grid)
    counts = write("Cast", write("ReduceSum", member, write.integers(1), keepdims=0), to=7, like=image)
    most = write("Max", write("ReduceMax", counts, write.integers(0), keepdims=1), write.integers(1))
    before = write("CumSum", counts, write.constant(np.array(0)), exclusive=1)
    ones = write(
        "ConstantOfShape", write("Shape", image, start=0, end=1), value=ir_tensor(np.ones(1, np.int64))
    )
    number = write("CumSum", ones, write.constant(np.array(0)), exclusive=1)
    rank = write("Sub", number, write("Gather", before, image, axis=0))
    rows = write("Add", write("Mul", image, most), rank)
    rows = write("Reshape", rows, write.integers(-1, 1))
    length = write("Concat", write("Mul", grid.batch, most), write.integers(1), axis=0)
    free = write("ConstantOfShape", length, value=ir_tensor(np.zeros(1, np.int64)))
    return Slots(write("ScatterND", free, rows, places), rows, most)
