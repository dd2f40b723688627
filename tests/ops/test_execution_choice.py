"""Which strategy "auto" runs one kernel per sample by: one that can, and the fastest that was measured."""

from __future__ import annotations

import itertools
import math

import pytest

from dynaconv.ops.dynamic_conv2d import EXECUTIONS, choice, choose_execution

STRATEGIES = EXECUTIONS[1:]
SHAPES = list(
    itertools.product(
        (1, 2, 3, 7, 8, 64),
        [
            (64, 64, 3, 3),
            (24, 96, 1, 1),
            (512, 512, 3, 3),
            (96, 1, 3, 3),
            (64, 8, 1, 1),
            (3, 5, 7),
            (4, 2, 3, 3, 3),
        ],
        (1, 49, 3136),
        (None, 1, 4, 16),
        (False, True),
        (False, True),
    )
)


def _facts(shape) -> dict:
    batch, weight, positions, experts, taps, training = shape
    groups = 8 if weight[1] in (1, 8) else 1
    facts = {"batch": batch, "weight_shape": weight, "positions": positions, "groups": groups}
    taps = taps and math.prod(weight[2:]) > 1
    return {**facts, "experts": experts, "taps": taps, "training": training}


def _runs(execution: str, facts: dict) -> bool:
    known = {"batch": facts["batch"], "experts": facts["experts"], "taps": facts["taps"]}
    return choice.cannot_run(execution, kernel=facts["weight_shape"][2:], **known) is None


def test_auto_chooses_what_can_run() -> None:
    for shape in SHAPES:
        facts = _facts(shape)
        chosen = choose_execution("auto", **facts)
        assert chosen in STRATEGIES and _runs(chosen, facts), facts


@pytest.mark.parametrize("favourite", STRATEGIES)
def test_auto_chooses_what_can_run_whatever_was_measured(favourite: str, monkeypatch) -> None:
    rows = [{**row, "execution": favourite} for row in choice.measured()[::2]] + choice.measured()[1::2]
    monkeypatch.setattr(choice, "measured", lambda: rows)
    choice._nearest.cache_clear()
    try:
        for shape in SHAPES:
            facts = _facts(shape)
            assert _runs(choose_execution("auto", **facts), facts), facts
    finally:
        choice._nearest.cache_clear()


def test_auto_repeats_the_measured_table() -> None:
    table = choice.measured()
    assert {row["kind"] for row in table} == {"spatial", "pointwise", "depthwise"}
    for row in table:
        weights = {
            "spatial": (row["out_channels"], row["weights"] // 9 // row["out_channels"], 3, 3),
            "pointwise": (row["out_channels"], row["weights"] // row["out_channels"], 1, 1),
            "depthwise": (row["weights"] // 9, 1, 3, 3),
        }[row["kind"]]
        groups = weights[0] if row["kind"] == "depthwise" else 1
        facts = {
            "batch": row["batch"],
            "weight_shape": weights,
            "positions": row["positions"],
            "groups": groups,
        }
        assert math.prod(weights) == row["weights"]
        facts |= {"training": row["training"], "channels_last": row["channels_last"]}
        chosen = choose_execution("auto", experts=4, **facts)
        assert chosen == row["execution"], row
        compiled = choose_execution("auto", experts=4, compiled=True, **facts)
        assert compiled == ("compiled" if row["compiled"] else row["execution"]), row
