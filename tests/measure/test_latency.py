"""How the times of a race become ratios."""

from __future__ import annotations

import pytest

from dynaconv.measure.latency import dynamic_latency
from dynaconv.measure.race import OURS, Race


def test_medians_are_held_against_the_least_median() -> None:
    ours = OURS["float32"]
    result = Race(
        dense={
            ours: {"min_ms": 1.0, "median_ms": 1.5, "runs": 3},
            "onnxruntime": {"min_ms": 1.1, "median_ms": 1.2, "runs": 3},
        },
        dynamic={"0.5": {ours: {"min_ms": 0.5, "median_ms": 0.6, "runs": 3}}},
    )
    found = dynamic_latency(result, "0.5")
    assert found["ratio_min"] == pytest.approx(0.5) and found["ratio_median"] == pytest.approx(0.5)
