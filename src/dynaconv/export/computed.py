"""Convolutions with a kernel for each image: in the graph nodes `ComputedConv` of our own, see `own`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from dynaconv.export import grouped, mixing
from dynaconv.export.own import COMPUTED, geometry_attributes, known_by_name
from dynaconv.export.parts import ComputedStage
from dynaconv.export.slots import Slots
from dynaconv.export.tables import Grid
from dynaconv.ops.dynamic_conv2d import strategies
from dynaconv.ops.dynamic_conv2d.choice import strategy_for_any_batch
from dynaconv.ops.dynamic_conv2d.execute import add_biases, run
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry
from dynaconv.ops.dynamic_conv2d.reference import mix_biases, mix_kernels

# Up to so many positions for each output channel dense blocks scale windows rather than kernels, whose taps lie closest
# together, so that scaling them takes longer for each number.
WINDOWS_SCALED = 2


def of_one_image(
    x: Tensor, experts: Tensor, routing: Tensor, bias, static_bias, taps, stride, padding, dilation, groups,
    packed=None,
) -> Tensor:  # fmt: skip
    """A dynamic convolution of a single image: one convolution with a computed weight."""
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    kernels = mix_kernels(experts, routing, taps)
    y = geometry.convolve(x, kernels[0])
    y = known_by_name(COMPUTED, (x, kernels, experts, routing, taps), y, geometry_attributes(geometry))
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
        y = _of_slices(x, experts, routing, taps, kernels, geometry)
    else:
        y = run(chosen, x, experts, routing, None, None, taps, geometry)
    y = known_by_name(COMPUTED, (x, kernels, experts, routing, taps), y, geometry_attributes(geometry))
    return add_biases(y, mix_biases(bias, routing), static_bias)


def _of_slices(
    x: Tensor, experts: Tensor, routing: Tensor, taps: Tensor | None, kernels: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Windows times kernels; what scales taps scales the windows where they are fewer numbers than kernels.

    A single expert then becomes a static convolution of the windows.
    """
    single = experts.shape[0] == 1 and routing.dim() == 2
    scales = taps if not single else routing if taps is None else routing * taps
    shape, kernel = experts.shape[1:], experts.shape[3:]
    size = geometry.output_size(x.shape[2:], kernel)
    # Free sizes count as small.
    small = any(not isinstance(n, int) for n in size) or math.prod(size) < WINDOWS_SCALED * shape[0]
    if scales is None or geometry.groups > 1 or not small:
        return strategies.unfold(x, kernels, geometry, slices=True)
    columns = strategies.sliced_columns(x, kernel, geometry)
    columns = columns.unflatten(1, (x.shape[1], kernel.numel())) * scales[:, None, :, None]
    if not single:
        mixed = mix_kernels(experts, routing)
        return strategies.product_of_columns(columns, x, mixed, geometry)
    ones, zeros = (1,) * len(size), (0,) * len(size)
    plain = ConvGeometry(ones, zeros, ones, 1)
    return plain.convolve(columns.flatten(1, 2).unflatten(2, size), experts.reshape(shape[0], -1, *ones))


def product(lowering: Any, stage: ComputedStage, windows: Any, order: Slots, grid: Grid) -> Any:
    """windows [slots, taps, C] (or [slots, C]) times the kernels of the image that each row is of: [K, O].

    Args:
        lowering: the `Rows` in work. grid: of the output.
    """
    write, plan = lowering.write, mixing.plan(stage, grid)
    scales, weight = mixing.tap_scales(write, stage), mixing.kernels(write, stage, plan.left)
    if scales is not None and (plan.shared or plan.left):
        windows = _scaled(write, stage, windows, scales, order)
    elif scales is not None:
        each = write("Reshape", scales, write.integers(-1, 1, scales.shape[1], 1, 1))
        weight = write("Mul", weight, each)
    if stage.depthwise:
        return _depthwise(write, stage, windows, weight, order)
    y = _multiplied(write, stage, windows, weight, order, plan.left)
    return y if order.rows is None else write("GatherND", y, order.rows)


def _scaled(write: Any, stage: ComputedStage, windows: Any, scales: Any, order: Slots) -> Any:
    """Windows of which every image has its taps scaled, by [N, taps] or [N, 1]."""
    form = stage.taps, stage.inputs
    if order.rows is None:
        each = scales if order.image is None else write("Gather", scales, order.image, axis=0)
        windows, spread = write("Reshape", windows, write.integers(-1, *form)), (-1, scales.shape[1], 1)
    else:
        shape = write("Concat", write.integers(-1), order.most, write.integers(*form), axis=0)
        each, windows, spread = scales, write("Reshape", windows, shape), (-1, 1, scales.shape[1], 1)
    return write("Mul", windows, write("Reshape", each, write.integers(*spread)))


def _depthwise(write: Any, stage: ComputedStage, windows: Any, weight: Any, order: Slots) -> Any:
    """Rows [K, C], from weights [N, 1, taps, 1, C]."""
    form = -1, stage.taps, stage.inputs
    weight = mixing.shaped(write, weight, *form)
    each = weight if order.image is None else write("Gather", weight, order.image, axis=0)
    weighted = write("Mul", write("Reshape", windows, write.integers(*form)), each)
    return write("ReduceSum", weighted, write.integers(1), keepdims=0)


def _multiplied(write: Any, stage: ComputedStage, windows: Any, weight: Any, order: Slots, left: bool) -> Any:
    """Products of all slots, [slots, O]; weights as of `mixing.kernels`."""
    outputs, inner = stage.weight.shape[:2]
    count, groups, several = stage.taps * inner, stage.groups, () if order.rows is None else (-1,)
    if groups > 1:
        weight, sizes = (
            mixing.shaped(write, weight, *several, groups, count, outputs // groups),
            (stage.taps, groups, inner, outputs),
        )
        if order.rows is None:
            return grouped.of_rows(write, windows, weight, sizes)
        return grouped.of_images(write, windows, weight, sizes, order.most)
    flat = write.integers(-1, count)
    if several:
        flat = write("Concat", write.integers(-1), order.most, write.integers(count), axis=0)
    flat = write("Reshape", windows, flat)
    weight = mixing.shaped(write, weight, *several, *((outputs, count) if left else (count, outputs)))
    if not left:
        return write("Reshape", write("MatMul", flat, weight), write.integers(-1, outputs))
    turn = {"perm": (0, 2, 1) if several else (1, 0)}
    y = write("Transpose", write("MatMul", weight, write("Transpose", flat, **turn)), **turn)
    return write("Reshape", y, write.integers(-1, outputs))


__all__ = ["of_any_batch", "of_one_image", "product"]
