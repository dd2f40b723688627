"""Convolutions with a kernel for each image: in the graph nodes `ComputedConv(x, kernels, y)` of our own, see `own`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dynaconv.export import grouped, tables
from dynaconv.export.graph import constant, ir_tensor
from dynaconv.export.own import COMPUTED, geometry_attributes, known_by_name
from dynaconv.export.parts import ComputedStage
from dynaconv.ops.dynamic_conv2d import strategies
from dynaconv.ops.dynamic_conv2d.choice import strategy_for_any_batch
from dynaconv.ops.dynamic_conv2d.execute import add_biases, run
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry
from dynaconv.ops.dynamic_conv2d.reference import mix_biases, mix_kernels


def of_one_image(
    x: Tensor, experts: Tensor, routing: Tensor, bias, static_bias, taps, stride, padding, dilation, groups,
    packed=None,
) -> Tensor:  # fmt: skip
    """A dynamic convolution of a single image: one convolution with a computed weight."""
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    kernels = mix_kernels(experts, routing, taps)
    y = known_by_name(COMPUTED, (x, kernels), geometry.convolve(x, kernels[0]), geometry_attributes(geometry))
    return add_biases(y, mix_biases(bias, routing), static_bias)


def of_any_batch(
    x: Tensor, experts: Tensor, routing: Tensor, bias, static_bias, taps, stride, padding, dilation, groups,
    packed=None,
) -> Tensor:  # fmt: skip
    """A dynamic convolution by operations that do not depend on the batch size."""
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    several = taps is not None and taps.shape[1] > 1
    chosen = strategy_for_any_batch(experts.shape[1:], groups, experts.shape[0], several)
    kernels = mix_kernels(experts, routing, taps)
    if chosen == "unfold":
        y = strategies.unfold(x, kernels, geometry, slices=True)
    else:
        y = run(chosen, x, experts, routing, None, None, taps, geometry)
    y = known_by_name(COMPUTED, (x, kernels), y, geometry_attributes(geometry))
    return add_biases(y, mix_biases(bias, routing), static_bias)


class Slots(NamedTuple):
    """Where the rows of a product lie, image by image, as many for each image.

    places: [N * most, 1], of the output positions; of those that hold no row, the first position. rows: which of them
    hold the listed rows, [K, 1], or None where they are the listed rows themselves. most: [1]. image: of each row, [K].
    """

    places: Any
    rows: Any = None
    most: Any = None
    image: Any = None


def slots(lowering: Any, stage: ComputedStage, places: Any, need: Any, grid: tables.Grid) -> Slots:
    """In which order a convolution's product takes its rows; arguments as of `image_slots`."""
    if stage.depthwise:
        return Slots(places, image=lowering.image(places, need, grid))
    if stage.kernels.shape[0] == 1:
        return Slots(places)
    return image_slots(lowering, places, need, grid)


def image_slots(lowering: Any, places: Any, need: Any, grid: tables.Grid) -> Slots:
    """As many rows for each image as the fullest has, so that they make one batched product.

    Args:
        lowering: the `Rows` in work. places: [K, 1] of the rows. need: the mask that lists them. grid: of the output.
    """
    return lowering.once(("slots", need), lambda: _slots(lowering, places, need, grid))


def product(lowering: Any, stage: ComputedStage, taps: Any, order: Slots) -> Any:
    """taps [slots, taps, C] (or [slots, C]) times the kernels of the image that each row is of: [K, O]."""
    write, count = lowering.write, int(np.prod(stage.kernel))
    outputs, inner = stage.weight.shape[:2]
    if stage.depthwise:
        weight = write("Reshape", _turned(write, stage, 1), write.integers(-1, count, outputs))
        taps = write("Reshape", taps, write.integers(-1, count, outputs))
        weighted = write("Mul", taps, write("Gather", weight, order.image, axis=0))
        return write("ReduceSum", weighted, write.integers(1), keepdims=0)
    weight, groups = _turned(write, stage, stage.groups), stage.groups
    matrix = (*([] if groups == 1 else [groups]), count * inner, outputs // groups)
    weight = write("Reshape", weight, write.integers(*([] if order.rows is None else [-1]), *matrix))
    sizes = count, groups, inner, outputs
    if order.rows is None:
        if groups > 1:
            return grouped.of_rows(write, taps, weight, sizes)
        return write("MatMul", write("Reshape", taps, write.integers(-1, count * inner)), weight)
    if groups > 1:
        y = grouped.of_images(write, taps, weight, sizes, order.most)
    else:
        shape = write("Concat", write.integers(-1), order.most, write.integers(count * inner), axis=0)
        y = write("MatMul", write("Reshape", taps, shape), weight)
    return write("GatherND", write("Reshape", y, write.integers(-1, outputs)), order.rows)


def _turned(write: Any, stage: ComputedStage, groups: int) -> Any:
    """The kernels as [N, groups, taps, I, O / groups] in any shape."""
    outputs, inner = stage.weight.shape[:2]
    form = groups, outputs // groups, inner, int(np.prod(stage.kernel))
    experts, routing = _mixture(stage.kernels)
    if experts is not None:
        # Turned before they are mixed, once and for all: kernels are as large as all other numbers together.
        turned = experts.reshape(-1, *form).transpose(0, 1, 4, 3, 2).reshape(len(experts), -1)
        return write("MatMul", routing, write.constant(turned, "experts"))
    weight = write("Reshape", stage.kernels, write.integers(-1, *form))
    return write("Transpose", weight, perm=(0, 1, 4, 3, 2))


def _mixture(kernels: Any) -> tuple[np.ndarray | None, Any]:
    """Constant experts [E, O, I, kh, kw] and the routing [N, E] that mixes them; (None, None) for other kernels."""
    product = kernels.producer()
    while product is not None and product.op_type == "Reshape":
        product = product.inputs[0].producer()
    if product is None or product.op_type != "MatMul" or product.inputs[0].shape is None:
        return None, None
    routing, experts = product.inputs
    while (
        constant(experts) is None
        and experts.producer() is not None
        and experts.producer().op_type == "Reshape"
    ):
        experts = experts.producer().inputs[0]
    array, shape = constant(experts), list(kernels.shape)[1:]
    if array is None or len(routing.shape) != 2 or array.size != len(array) * int(np.prod(shape)):
        return None, None
    return array.reshape(len(array), *shape), routing


def _slots(lowering: Any, places: Any, need: Any, grid: tables.Grid) -> Slots:
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


__all__ = ["Slots", "image_slots", "of_any_batch", "of_one_image", "product", "slots"]
