"""Measured milliseconds: alternatives interleaved in one process, minimum and median reported."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from dynaconv.convert.fuse import fuse_

LEAST_ROUNDS = 3


def compare_latency(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 25,
    min_round_ms: float = 20.0,
    threads: int | None = None,
    progress: Callable[[], None] | None = None,
    seconds: float | None = None,
    settle_seconds: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Time several functions against each other, interleaved, so that a noisy machine disturbs all alike.

    Some thread pools wait for more work spinning, and slow down what runs after them: before its turn every function
    waits for `settle_seconds`; then it runs twice untimed.

    Args:
        functions: name -> function without arguments.
        rounds: measurements of each function; every round times each function once.
        seconds: no further round begins after so long, once there are three.
        min_round_ms: a fast function is repeated within a round until it takes about this long.
        threads: intra-op threads, default torch's current number.
    Returns:
        name -> {"min_ms", "median_ms", "runs"}, milliseconds for one call.
    """
    threads = threads or torch.get_num_threads()
    timers = {name: Timer("f()", globals={"f": f}, num_threads=threads) for name, f in functions.items()}
    repeats = {}
    for name, timer in timers.items():
        once_ms = timer.timeit(1).mean * 1e3
        if once_ms < min_round_ms:
            once_ms = timer.timeit(3).mean * 1e3
        repeats[name] = max(1, round(min_round_ms / max(once_ms, 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in timers}
    started = time.monotonic()
    for done in range(rounds):
        if seconds is not None and done >= LEAST_ROUNDS and time.monotonic() - started > seconds:
            break
        for name, timer in timers.items():
            time.sleep(settle_seconds)
            times[name].append(timer.timeit(repeats[name]).mean * 1e3)
        if progress is not None:
            progress()
    return {
        name: {"min_ms": min(ts), "median_ms": statistics.median(ts), "runs": len(ts) * repeats[name]}
        for name, ts in times.items()
    }


def prepare_for_timing(model: nn.Module) -> nn.Module:
    """A copy as a deployment would run it in eager PyTorch: evaluation mode, channels-last, batch norm folded.

    Folding happens in static and dynamic networks alike, so that a comparison between them is fair; where the network
    cannot be traced, the copy keeps its batch norms.
    """
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    # A network that cannot be traced is timed as it is.
    with contextlib.suppress(ValueError):
        fuse_(model)
    return model.to(memory_format=torch.channels_last)


def latency_of(
    models: Mapping[str, nn.Module],
    batches: Tensor | Sequence[Tensor],
    *,
    rounds: int = 25,
    min_round_ms: float = 20.0,
    threads: int | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Interleaved latency of several networks on the same pictures, each network prepared for timing.

    Args:
        batches: one batch [N, C, H, W] or several of equal size; a dynamic network's time depends on its pictures, so
            give it several when N is small.
    Returns:
        name -> {"min_ms", "median_ms", "runs"}, milliseconds for one batch.
    """
    batches = [batches] if isinstance(batches, Tensor) else list(batches)
    batches = [x.contiguous(memory_format=torch.channels_last) for x in batches]
    ready = {name: prepare_for_timing(model) for name, model in models.items()}

    def call(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            for x in batches:
                model(x)

        return run

    with torch.inference_mode():
        times = compare_latency(
            {name: call(model) for name, model in ready.items()},
            rounds=rounds,
            min_round_ms=min_round_ms,
            threads=threads,
            progress=progress,
        )
    count = len(batches)
    return {
        name: {"min_ms": t["min_ms"] / count, "median_ms": t["median_ms"] / count, "runs": t["runs"] * count}
        for name, t in times.items()
    }
