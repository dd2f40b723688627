"""Timing masked convolutions on this machine: above which open share it is faster to compute every row."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynaconv.engine.execute import Program
from dynaconv.engine.plan import NEVER, Plan
from dynaconv.testing.masks import blob_mask

DENSITIES = (0.25, 0.5)
REPEATS = 5


def measure_plan(plan: Plan, example: tuple[Any, ...], threads: int | None) -> None:
    """Fill `plan.measured` by step, and set `run_all_above` of the convolutions that may compute more than is needed.

    A convolution's time on open rows is taken as a + b * share, from two densities; the break-even share is where it
    meets the time for all rows.
    """
    threads = threads or torch.get_num_threads()
    sparse = [_times(_with(plan, NEVER), example, density, threads) for density in DENSITIES]
    dense, _ = _times(_with(plan, -1.0), example, 1.0, threads)
    for i, step in enumerate(plan.steps):
        if step.kind in ("threshold", "dilate", "mask_value"):
            continue
        times = plan.measured.setdefault(str(i), {})
        times["dense_ms"] = dense[i]
        if step.grid < 0 or step.closed or step.kind == "mean":
            continue
        (low_ms, low), (high_ms, high) = ((times_[i], shares[step.grid]) for times_, shares in sparse)
        times["sparse_ms"], times["density"] = high_ms, DENSITIES[1]
        slope = (high_ms - low_ms) / (high - low) if high > low else 0.0
        times["break_even"] = 1.0 if slope <= 0 else min(1.0, max(0.0, low + (dense[i] - low_ms) / slope))
        if step.run_all_above < NEVER:
            step.run_all_above = times["break_even"] if times["break_even"] < 1.0 else NEVER


def _with(plan: Plan, run_all_above: float) -> Plan:
    changed = copy.copy(plan)
    changed.steps = [
        replace(s, run_all_above=run_all_above) if s.run_all_above < NEVER else s for s in plan.steps
    ]
    return changed


def _times(
    plan: Plan, example: tuple[Any, ...], density: float, threads: int
) -> tuple[list[float], dict[int, float]]:
    """Milliseconds of each step (the median of a few runs), and the open share of each grid."""
    program, n = Program(plan, "cpu"), example[0].shape[0]
    forced: dict[int, Tensor] = {}
    for seed, gate in enumerate(plan.gates):
        grid = plan.grids[gate.grid]
        forced[gate.grid] = blob_mask(n, (grid.height, grid.width), density, seed)[:, 0] > 0.5
    times: list[list[float]] = []
    with torch.no_grad():
        for _ in range(REPEATS):
            _, forward = program.run(list(example), n, forced, threads, timed=True)
            times.append([ns / 1e6 for ns in list(forward.step_ns)[: len(plan.steps)]])
    shares = {g: forward.open_rows[g] / (n * grid.height * grid.width) for g, grid in enumerate(plan.grids)}
    return [statistics.median(column) for column in zip(*times, strict=True)], shares
