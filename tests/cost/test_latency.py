"""Timing: who runs how often."""

from __future__ import annotations

import time

from dynaconv.cost import compare_latency


def test_what_is_fast_runs_once_untimed_after_the_pause() -> None:
    counts, gaps, last = {"fast": 0, "slow": 0}, [], [time.monotonic()]

    def work(name: str, seconds: float) -> None:
        counts[name] += 1
        gaps.append(time.monotonic() - last[0])
        time.sleep(seconds)
        last[0] = time.monotonic()

    functions = {"fast": lambda: work("fast", 0.001), "slow": lambda: work("slow", 0.03)}
    without = compare_latency(functions, rounds=2)
    before = dict(counts)
    del gaps[:]
    times = compare_latency(functions, rounds=2, settle_seconds=0.05)
    assert counts["slow"] == 2 * before["slow"]
    # A call more in each of two rounds than the timed ones and the four that find out how fast it is.
    assert counts["fast"] - before["fast"] == times["fast"]["runs"] + 4 + 2
    assert before["fast"] == without["fast"]["runs"] + 4
    assert sum(gap > 0.049 for gap in gaps) == 4
