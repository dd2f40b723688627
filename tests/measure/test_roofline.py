"""The least work of a step, and the peaks that it is held against."""

from __future__ import annotations

import pytest
import torch

from dynaconv.engine.plan import NEVER, Conv, Grid, Plan, Step, Value
from dynaconv.measure.roofline import Peaks, measure_peaks, step_work
from dynaconv.ops import _native


@pytest.fixture
def plan() -> Plan:
    """A 3x3 convolution 4 -> 8 on 5x5, on a grid; then an inverted residual 8 -> 48 -> 8 on the same grid."""
    values = [Value(5, 5, 4, 4, 0), Value(5, 5, 8, 8, 1), Value(5, 5, 8, 8, 2)]
    convs = [
        Conv("conv", 4, 8, 1, (3, 3), weight=torch.zeros(3 * 3 * 4 * 32), bias=torch.zeros(32)),
        Conv("conv", 8, 48),
        Conv("depthwise", 48, 48, 48, (3, 3)),
        Conv("conv", 48, 8),
    ]
    steps = [
        Step("conv", input=0, out=1, conv=[0, -1, -1], grid=0, run_all_above=NEVER),
        Step("inverted", input=1, input2=1, out=2, conv=[1, 2, 3], grid=0, grid2=1),
        Step("add", input=1, input2=1, out=2),
    ]
    return Plan(values=values, convs=convs, grids=[Grid(5, 5), Grid(5, 5)], steps=steps)


def test_everything_open(plan) -> None:
    work = step_work(plan, 0, images=2)
    assert work.macs == 2 * 25 * 9 * 4 * 8
    assert work.bytes == 4 * (9 * 4 * 32 + 32) + 4 * 2 * 25 * (4 + 8)
    assert step_work(plan, 1, images=2).macs == 2 * 25 * (8 * 48 + 9 * 48 + 48 * 8)
    assert step_work(plan, 2, images=1).macs == 0


def test_open_rows_closed_rows_and_the_fallback(plan) -> None:
    whole = step_work(plan, 0, images=1).macs
    assert step_work(plan, 0, 1, [5, 10]).macs == whole / 5
    assert step_work(plan, 1, 1, [5, 10]).macs == 10 * 8 * 48 + 5 * (9 * 48 + 48 * 8)
    plan.steps[0].closed = 1
    assert step_work(plan, 0, 1, [5, 10]).macs == pytest.approx(0.8 * whole)
    plan.steps[0].closed, plan.steps[0].run_all_above = 0, 0.1
    assert step_work(plan, 0, 1, [5, 10]).macs == whole


def test_bandwidth_is_that_of_the_level_that_holds_the_bytes() -> None:
    peaks = Peaks({"float32": 1e11, "bfloat16": 0.0}, {1024: 4e11, 4096: 1e11})
    assert [peaks.bandwidth(size) for size in (10, 1024, 1025, 9999)] == [4e11, 4e11, 1e11, 1e11]
    assert peaks.line() == "peaks: float32 200 GFLOP/s; reading, GB/s: 1 KiB 400, 4 KiB 100"


def test_peaks_of_this_machine() -> None:
    if reason := _native.missing():
        with pytest.raises(RuntimeError):
            measure_peaks(1)
        pytest.skip(reason)
    peaks = measure_peaks(1)
    # Between a processor of last century and one of the next.
    assert 1e8 < peaks.macs["float32"] < 1e13 and all(1e8 < rate < 1e13 for rate in peaks.read.values())
    assert peaks.macs["bfloat16"] == 0 or peaks.macs["bfloat16"] > peaks.macs["float32"] / 2
