"""Timing the strategies of dynamic convolutions: what is measured, and the table that comes of it."""

from __future__ import annotations

import json

import pytest

from dynaconv.measure import kernels
from dynaconv.measure.kernels import KernelShape, measure_kernels, to_dict, write_table
from dynaconv.ops.dynamic_conv2d.choice import EXECUTIONS, measured

SHAPES = (
    KernelShape("3x3", 8, 8, 3, 6),
    KernelShape("1x1", 8, 12, 1, 6),
    KernelShape("depthwise", 8, 8, 3, 6, 8),
)


@pytest.fixture(scope="module")
def timings() -> list[kernels.KernelTiming]:
    return list(measure_kernels(SHAPES, (1, 3), rounds=1))


def test_everything_that_can_run_is_timed(timings):
    assert len(timings) == len(SHAPES) * 2 * 2 * 2
    for t in timings:
        assert {"static", "auto", "grouped"} <= set(t.entries)
        assert ("bmm" in t.entries) == (t.shape.kernel == 1)
        assert ("single" in t.entries) == (t.batch == 1)
        assert "compiled" not in t.entries or not t.training
        assert all(e["min_ms"] <= e["median_ms"] and e["peak_mib"] > 0 for e in t.entries.values())
        assert t.fastest in t.strategies


def test_memory_is_that_of_the_tensors(timings):
    plain = next(t for t in timings if t.shape.label == "3x3" and t.batch == 3 and not t.training)
    # Output of the static convolution: 3 images, 8 channels, 6x6 positions, 4 bytes.
    assert plain.entries["static"]["peak_mib"] == pytest.approx(3 * 8 * 36 * 4 / 2**20)


def test_the_memory_of_auto_is_that_of_what_it_runs(timings):
    for t in timings:
        assert t.chosen in (*EXECUTIONS[1:], "compiled")
        if t.chosen in t.entries:
            assert t.entries["auto"]["peak_mib"] == t.entries[t.chosen]["peak_mib"]


def test_the_table_says_what_was_fastest(timings, tmp_path):
    path = write_table(timings, tmp_path / "table.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(timings)
    for row, t in zip(rows, timings, strict=True):
        assert set(row) == set(measured()[0])
        assert row["execution"] in EXECUTIONS[1:] and row["weights"] == t.shape.weights
        assert row["compiled"] == (t.fastest == "compiled")
    assert json.dumps(to_dict(timings[0]))


def test_nothing_is_timed_when_a_strategy_is_wrong(monkeypatch):
    right = kernels._with

    def wrong(layer, execution, x, routing):
        run = right(layer, execution, x, routing)
        return (lambda: run() + 1) if execution == "unfold" else run

    monkeypatch.setattr(kernels, "_with", wrong)
    with pytest.raises(
        RuntimeError, match="unfold disagrees with grouped on 3x3 at batch 1; nothing was timed"
    ):
        next(measure_kernels(SHAPES[:1], (1,), rounds=1))
