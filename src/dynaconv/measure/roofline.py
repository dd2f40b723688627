"""Each step of a compiled network against what this processor can do at most, both measured on the spot."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynaconv.ops import _native

# From the first level of the cache to memory, bytes that all threads read together.
SIZES = tuple(2**k for k in (15, 18, 20, 22, 24, 28))


@dataclass(frozen=True)
class Peaks:
    """Multiply-adds a second by precision (0 where the processor lacks it), bytes a second by the size that is read."""

    macs: dict[str, float]
    read: dict[int, float]

    def bandwidth(self, size: float) -> float:
        """Bytes a second for a step that touches `size` bytes: that of the smallest measured size that holds it."""
        return next((rate for held, rate in self.read.items() if held >= size), list(self.read.values())[-1])

    def line(self) -> str:
        """One line for people."""
        macs = ", ".join(f"{name} {2 * rate / 1e9:.0f} GFLOP/s" for name, rate in self.macs.items() if rate)
        read = ", ".join(f"{size // 1024} KiB {rate / 1e9:.0f}" for size, rate in self.read.items())
        return f"peaks: {macs}; reading, GB/s: {read}"


@dataclass(frozen=True)
class StepWork:
    """What one step does at least: multiply-adds of the rows it computes, bytes of weights and rows it touches once."""

    macs: float
    bytes: float


def measure_peaks(threads: int | None = None) -> Peaks:
    """Multiply-adds and bytes a second of this machine, with `threads` (torch's number) at work; about a second.

    Raises:
        RuntimeError: the compiled kernels are not there.
    """
    library, reason = _native.load()
    if library is None:
        raise RuntimeError(reason)
    threads = threads or torch.get_num_threads()
    macs, read = library.dynaconv_peak_macs, library.dynaconv_peak_read
    macs.restype = read.restype = ctypes.c_double
    macs.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
    data = torch.ones(SIZES[-1] // 4)
    precisions = ("float32", "bfloat16")
    return Peaks(
        {name: max(macs(i, threads, 10**6) for _ in range(20)) for i, name in enumerate(precisions)},
        {
            size: max(read(data.data_ptr(), size // 4, threads, max(1, SIZES[-1] // size)) for _ in range(5))
            for size in SIZES
        },
    )


@dataclass(frozen=True)
class TimedStep:
    """One step of a compiled network: where it comes from, its seconds (median of some runs), its work."""

    layer: str
    kind: str
    seconds: float
    work: StepWork


def timed_steps(fast: Any, x: Tensor, rounds: int = 15) -> list[TimedStep]:
    """Every native step of a `CompiledModel` on a batch x [N, C, H, W], with the masks that it decides."""
    plan = fast._program.plan
    runs = [fast._run((x,), timed=True)[1] for _ in range(rounds + 2)][2:]
    open_rows = list(runs[-1].open_rows)
    return [
        TimedStep(
            step.layer,
            step.kind,
            statistics.median(run.step_ns[i] for run in runs) * 1e-9,
            step_work(plan, i, x.shape[0], open_rows),
        )
        for i, step in enumerate(plan.steps)
    ]


def engine_state() -> tuple[str, str]:
    """Which kernels the engine runs and whether it has bfloat16, or why not, one line each."""
    from dynaconv.engine import runtime

    library, text = _native.load()
    reason = runtime.missing()
    if library is None or reason is not None:
        return f"PyTorch operations: {reason or text}", "no: it needs the compiled kernels"
    able = hasattr(library, "dynaconv_has_bfloat16") and bool(library.dynaconv_has_bfloat16())
    return f"compiled kernels, {text}", "yes" if able else "no: this processor has no AVX512_BF16"


def step_work(plan: Any, index: int, images: int, open_rows: Sequence[int] | None = None) -> StepWork:
    """Multiply-adds and bytes of one step for a batch of `images`.

    Args:
        plan: an engine plan. open_rows: for each of its grids, open rows over the batch; None opens all.
    """
    step = plan.steps[index]
    out = plan.values[step.out] if step.out >= 0 else None
    rows, share = 0.0, 1.0
    if out is not None:
        rows = images * out.height * out.width
        share = _share(plan, step, images, open_rows)
    macs = _macs(plan, step, rows * share, images, open_rows)
    weights = sum(
        t.numel() * t.element_size()
        for c in step.conv
        if c >= 0
        for t in (plan.convs[c].weight, plan.convs[c].bias)
        if t is not None
    )
    touched = sum(_value_bytes(plan.values[v], images) for v in (step.input, step.input2, step.out) if v >= 0)
    return StepWork(macs, weights + share * touched)


def _share(plan: Any, step: Any, images: int, open_rows: Sequence[int] | None) -> float:
    """Share of its output rows that a step computes."""
    if step.grid < 0 or open_rows is None:
        return 1.0
    grid = plan.grids[step.grid]
    share = open_rows[step.grid] / max(1, images * grid.height * grid.width)
    if step.closed:
        return 1.0 - share
    return 1.0 if share > step.run_all_above else share


def _macs(plan: Any, step: Any, rows: float, images: int, open_rows: Sequence[int] | None) -> float:
    convs = [plan.convs[c] for c in step.conv if c >= 0]
    if step.kind in ("conv", "stem", "depthwise", "dynamic_conv", "gate"):
        return rows * sum(_per_row(conv) for conv in convs)
    if step.kind != "inverted":
        return 0.0
    # The expansion computes what the depthwise convolution reads; on all rows where there is no second grid.
    source = plan.values[step.input]
    before = images * source.height * source.width
    if step.grid2 >= 0 and open_rows is not None:
        before = open_rows[step.grid2]
    expand, *others = step.conv
    hidden = before * _per_row(plan.convs[expand]) if expand >= 0 else 0.0
    if step.ints[0]:
        # The last convolution is folded into every image's expansion, a row of it for each input channel and the bias.
        middle, folded = (plan.convs[c] for c in others)
        return hidden + rows * _per_row(middle) + images * (1 + source.channels) * _per_row(folded)
    return hidden + rows * sum(_per_row(plan.convs[c]) for c in others if c >= 0)


def _per_row(conv: Any) -> float:
    if conv.form == "none":
        return 0.0
    return prod(conv.kernel) * (conv.in_channels // conv.groups) * conv.out_channels


def _value_bytes(value: Any, images: int) -> int:
    size = 2 if value.dtype == "bfloat16" else 4
    return images * value.height * value.width * value.channels * size
