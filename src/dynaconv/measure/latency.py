"""Milliseconds of a dynamic network beside its dense rival, interleaved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dynaconv.convert import revert_
from dynaconv.cost import latency_of


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy of a dynamic network without its gates: same architecture, same weights, everything computed."""
    twin = copy.deepcopy(model)
    revert_(twin)
    return twin.eval()


def latency_ratios(
    dense: nn.Module,
    dynamic: Mapping[str, nn.Module],
    batches: Tensor | Sequence[Tensor],
    *,
    rounds: int = 25,
    threads: int | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time a dense network and several dynamic ones on the same batches [N, C, H, W], interleaved.

    All are prepared alike (evaluation mode, channels-last, batch norm folded).

    Returns:
        name -> {"min_ms", "median_ms", "runs"}, and for the dynamic ones "ratio_min" and "ratio_median": dynamic over
        dense, below 1 is faster. The dense network's name is "dense".
    """
    times = latency_of(
        {"dense": dense, **dynamic}, batches, rounds=rounds, threads=threads, progress=progress
    )
    base = times["dense"]
    for name in dynamic:
        times[name]["ratio_min"] = times[name]["min_ms"] / base["min_ms"]
        times[name]["ratio_median"] = times[name]["median_ms"] / base["median_ms"]
    return times
