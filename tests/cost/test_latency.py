"""Timing: who runs how often."""

from __future__ import annotations

import time

from dynaconv.cost import compare_latency


def test_every_function_waits_before_its_turn() -> None:
    gaps, last = [], [time.monotonic()]

    def work() -> None:
        gaps.append(time.monotonic() - last[0])
        time.sleep(0.001)
        last[0] = time.monotonic()

    functions = {"one": work, "two": work}
    compare_latency(functions, rounds=3, min_round_ms=5.0, settle_seconds=0.05)
    assert sum(gap > 0.049 for gap in gaps) == 6
    del gaps[:]
    compare_latency(functions, rounds=3, min_round_ms=5.0)
    assert sum(gap > 0.049 for gap in gaps) < 6
