"""Timing: who runs how often."""

from __future__ import annotations

import pytest

from dynaconv.cost import compare_latency, latency


@pytest.mark.parametrize("settle", [0.0, 0.05])
def test_every_function_waits_before_its_turn(monkeypatch, settle) -> None:
    seen: list[object] = []
    monkeypatch.setattr(latency.time, "sleep", seen.append)
    functions = {"one": lambda: seen.append("one"), "two": lambda: seen.append("two")}
    compare_latency(functions, rounds=3, min_round_ms=1e-3, settle_seconds=settle)
    turns = [(a, b) for a, b in zip(seen, seen[1:], strict=False) if not isinstance(a, str)]
    assert turns == [(settle, "one"), (settle, "two")] * 3
