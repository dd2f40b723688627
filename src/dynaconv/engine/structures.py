"""Mirrors of the structures in csrc/plan/plan.h, filled from a plan."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_uint8, c_void_p

from torch import Tensor

from dynaconv.engine import plan as plans
from dynaconv.engine.plan import DTYPES, KINDS, Plan, activation_code

PLAN_ABI = 9


class Value(ctypes.Structure):
    """struct Value."""

    _fields_ = [("offset", c_int64), *((n, c_int32) for n in (
        "height", "width", "channels", "stride", "dtype", "external", "first", "reserved"))]  # fmt: skip


class Conv(ctypes.Structure):
    """struct Conv."""

    _fields_ = [
        ("weight", c_void_p), ("bias", c_void_p), ("winograd", c_void_p),
        ("in_channels", c_int32), ("out_channels", c_int32), ("groups", c_int32),
        *((n, c_int32 * 2) for n in ("kernel", "stride", "padding", "dilation")), ("reserved", c_int32),
    ]  # fmt: skip


class Grid(ctypes.Structure):
    """struct Grid."""

    _fields_ = [(n, c_int32) for n in ("height", "width", "closed", "tiles")]


class Step(ctypes.Structure):
    """struct Step."""

    _fields_ = [
        ("kind", c_int32), ("input", c_int32), ("input2", c_int32), ("out", c_int32), ("conv", c_int32 * 3),
        ("activation", c_int32 * 3), ("final_activation", c_int32), ("grid", c_int32), ("grid2", c_int32),
        ("closed", c_int32), ("run_all_above", c_float), ("aux", c_int32 * 4), ("ints", c_int32 * 8),
        ("floats", c_float * 4),
    ]  # fmt: skip


class PlanData(ctypes.Structure):
    """struct PlanData."""

    _fields_ = [
        *((n, c_int32) for n in (
            "abi", "value_count", "conv_count", "grid_count", "step_count", "external_count")),
        ("arena_bytes", c_int64), ("values", POINTER(Value)), ("convs", POINTER(Conv)), ("grids", POINTER(Grid)),
        ("steps", POINTER(Step)),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """struct Call."""

    _fields_ = [
        ("images", c_int64), ("threads", c_int32), ("first", c_int32), ("last", c_int32), ("reserved", c_int32),
        ("externals", POINTER(c_void_p)), ("external_planes", POINTER(c_int32)), ("forced", POINTER(c_void_p)),
        ("open_rows", POINTER(c_int64)), ("step_ns", POINTER(c_double)),
    ]  # fmt: skip


# As the compiler lays them out on 64-bit machines.
SIZES = {Value: 40, Conv: 72, Grid: 16, Step: 124, PlanData: 64, Call: 64}
assert all(ctypes.sizeof(kind) == size for kind, size in SIZES.items())
BYTE = c_uint8


def plan_data(plan: Plan) -> tuple[PlanData, list[object]]:
    """The structures of a plan, and everything that must stay alive as long as they are used."""
    values = (Value * len(plan.values))(*(_value(v) for v in plan.values))
    convs = (Conv * len(plan.convs))(*(_conv(c) for c in plan.convs))
    grids = (Grid * len(plan.grids))(*(Grid(g.height, g.width, g.closed, g.tiles) for g in plan.grids))
    steps = (Step * len(plan.steps))(*(_step(s) for s in plan.steps))
    data = PlanData(
        PLAN_ABI, len(values), len(convs), len(grids), len(steps), len(plan.externals), plan.arena_bytes,
        values, convs, grids, steps,
    )  # fmt: skip
    keep: list[object] = [values, convs, grids, steps, plan.convs]
    return data, keep


def _value(v: plans.Value) -> Value:
    return Value(
        v.offset, v.height, v.width, v.channels, v.stride, DTYPES.index(v.dtype), v.external, v.first, 0
    )


def _conv(c: plans.Conv) -> Conv:
    pair = c_int32 * 2
    return Conv(
        _pointer(c.weight), _pointer(c.bias), _pointer(c.winograd), c.in_channels, c.out_channels, c.groups,
        pair(*c.kernel), pair(*c.stride), pair(*c.padding), pair(*c.dilation), 0,
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _step(s: plans.Step) -> Step:
    return Step(
        KINDS.index(s.kind), s.input, s.input2, s.out, (c_int32 * 3)(*s.conv),
        (c_int32 * 3)(*map(activation_code, s.activation)), activation_code(s.final_activation), s.grid, s.grid2,
        s.closed, s.run_all_above, (c_int32 * 4)(*s.aux), (c_int32 * 8)(*s.ints), (c_float * 4)(*s.floats),
    )  # fmt: skip
