"""Kernels for each image, mixed from experts in the layout that a product takes.

The kernels of a batch can be as many numbers as all others together. So experts are turned before they are mixed, once
and for all, and what scales the taps scales whichever has fewer numbers, the kernels or the windows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dynaconv.export.graph import constant
from dynaconv.export.parts import ComputedStage
from dynaconv.export.tables import Grid

# Up to so many positions for each output channel one product for all images, with scaled windows, is no slower than one
# for each image with scaled kernels (ONNX Runtime, 3 x 3, 64 to 512 channels).
SHARED_POSITIONS = 8


class Plan(NamedTuple):
    """How windows and kernels are multiplied; in both cases what scales taps scales the windows, else the kernels.

    shared: all images have one kernel. left: kernels are the left factor.
    """

    shared: bool
    left: bool


def plan(stage: ComputedStage, grid: Grid) -> Plan:
    """By sizes alone; maps of free size count as small. grid: of the output.

    Runtimes copy a right factor into panels, which costs more than the product where an image has few windows.
    """
    outputs, inner = stage.weight.shape[:2]
    positions = grid.height * grid.width if grid.fixed else 0
    plain = stage.groups == 1
    shared = plain and stage.single and positions < SHARED_POSITIONS * outputs
    left = plain and not shared and positions < min(outputs, inner * stage.taps)
    return Plan(shared, left)


def tap_scales(write: Any, stage: ComputedStage) -> Any:
    """What scales the taps of each image, [N, taps] or [N, 1], or None; a single expert's coefficient is part of it."""
    if not stage.single:
        return stage.attention
    if stage.attention is None:
        return stage.routing
    return write("Mul", stage.routing, stage.attention, like=stage.attention)


def kernels(write: Any, stage: ComputedStage, left: bool) -> Any:
    """Without what scales their taps: [N, O, taps, I] for the left factor, else [N, groups, taps, I, O / groups].

    N is 1 of a single expert; a depthwise kernel counts as one group.
    """
    (outputs, inner), taps = stage.weight.shape[:2], stage.taps
    groups = 1 if stage.depthwise else stage.groups
    if left:
        form, perm, shape = (-1, outputs, inner, taps), (0, 1, 3, 2), (-1, outputs, taps, inner)
    else:
        each = outputs // groups
        form, perm, shape = (-1, groups, each, inner, taps), (0, 1, 4, 3, 2), (-1, groups, taps, inner, each)
    if stage.by_channel:
        # Kernels are turned where they are small beside the windows.
        return _mixed_by_channel(write, stage) if left else _turned(write, stage.kernels, form, perm, shape)
    if stage.single:
        return _turned(write, stage.experts, form, perm, shape)
    experts = _turned(write, stage.experts, form, perm, (-1, outputs * inner * taps))
    return write("Reshape", write("MatMul", stage.routing, experts), write.integers(*shape))


def shaped(write: Any, value: Any, *shape: int) -> Any:
    """A value in another shape; constants stay constants."""
    array = constant(value)
    if array is not None:
        return write.constant(array.reshape(shape), "experts")
    return write("Reshape", value, write.integers(*shape))


def _mixed_by_channel(write: Any, stage: ComputedStage) -> Any:
    """[N, O, taps, I] where every output channel has coefficients of its own."""
    outputs, inner = stage.weight.shape[:2]
    form = (-1, outputs, inner, stage.taps)
    experts = _turned(write, stage.experts, form, (1, 0, 3, 2), (outputs, -1, stage.taps * inner))
    mixed = write("MatMul", write("Transpose", stage.routing, perm=(1, 0, 2)), experts)
    shape = write.integers(-1, outputs, stage.taps, inner)
    return write("Reshape", write("Transpose", mixed, perm=(1, 0, 2)), shape)


def _turned(write: Any, value: Any, form: tuple, perm: tuple, shape: tuple) -> Any:
    """A value in another form, its axes in another order, in another shape; constants stay constants."""
    array = constant(value)
    if array is not None:
        return write.constant(array.reshape(form).transpose(perm).reshape(shape), "experts")
    turned = write("Transpose", write("Reshape", value, write.integers(*form)), perm=perm)
    return write("Reshape", turned, write.integers(*shape))
