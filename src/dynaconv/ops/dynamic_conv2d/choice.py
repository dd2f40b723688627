"""Which strategy runs: an explicit one if it can, `auto` by a measured table of shapes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from dynaconv import _checks

EXECUTIONS = ("auto", "grouped", "feature", "unfold", "bmm", "single")
TABLE = Path(__file__).with_name("table.json")


def cannot_run(
    execution: str, *, batch: int, kernel: Sequence[int], experts: int | None, taps: bool
) -> str | None:
    """Why a strategy cannot run for this shape, or None when it can.

    Args:
        experts: number of experts, or None where only the mixed kernels are known.
        taps: every sample scales the taps of its kernel (ODConv's spatial attention).
    """
    if execution == "bmm" and math.prod(kernel) != 1:
        return f"it needs a kernel of one tap, this one is {'x'.join(map(str, kernel))}"
    if execution == "single" and batch != 1:
        return f"it needs a batch of 1, this one has {batch}"
    if execution == "feature" and experts is None:
        return "it mixes the experts' features, and this layer computes its kernel without a mixture"
    if execution == "feature" and taps:
        return "the attention scales single taps, which cannot be done after the convolution"
    return None


def choose_execution(
    execution: str,
    *,
    batch: int,
    weight_shape: Sequence[int],
    positions: int,
    groups: int,
    experts: int | None,
    taps: bool = False,
    training: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> str:
    """Name of the strategy to run; from shapes only, never from data.

    Args:
        execution: one of `EXECUTIONS`.
        weight_shape: [O, I/g, *kernel] of one sample's kernel.
        positions: output positions of one image.
        training: gradients are needed.
        channels_last: memory format of the input.
        compiled: the compiled kernel could run too; "auto" then may answer "compiled".
    Raises:
        ValueError: unknown strategy, or an explicit one that cannot run for this shape (with the ones that can).
    """
    _checks.one_of("execution", execution, EXECUTIONS)
    kernel = weight_shape[2:]
    if execution != "auto":
        facts = {"batch": batch, "kernel": kernel, "experts": experts, "taps": taps}
        reason = cannot_run(execution, **facts)
        if reason is not None:
            able = [e for e in EXECUTIONS[1:] if cannot_run(e, **facts) is None]
            raise _checks.execution_cannot_run(execution, reason, able)
        return execution
    pointwise, depthwise = math.prod(kernel) == 1, weight_shape[1] == 1 and groups > 1
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return strategy_for_any_batch(weight_shape, groups, experts, taps)
    if batch == 0:
        return "grouped"
    kind = "pointwise" if pointwise else "depthwise" if depthwise else "spatial"
    if kind == "pointwise" and groups > 1:
        kind = "depthwise"
    facts = (batch, tuple(kernel), experts, taps)
    row = _nearest(kind, training, channels_last, weight_shape[0], math.prod(weight_shape), positions, facts)
    if row is None:
        return _able(facts)[0]
    return "compiled" if compiled and row["compiled"] else row["execution"]


def strategy_for_any_batch(weight_shape: Sequence[int], groups: int, experts: int | None, taps: bool) -> str:
    """What a compiled graph runs, which must not depend on the batch size: neither grouped nor single is possible."""
    if math.prod(weight_shape[2:]) == 1:
        return "bmm"
    depthwise = weight_shape[1] == 1 and groups > 1
    return "feature" if depthwise and experts is not None and experts <= 8 and not taps else "unfold"


def _able(facts: tuple) -> list[str]:
    batch, kernel, experts, taps = facts
    return [
        e
        for e in EXECUTIONS[1:]
        if cannot_run(e, batch=batch, kernel=kernel, experts=experts, taps=taps) is None
    ]


@functools.cache
def _nearest(
    kind: str,
    training: bool,
    channels_last: bool,
    out_channels: int,
    weights: int,
    positions: int,
    facts: tuple,
) -> dict | None:
    """The measured row that is nearest in log sizes, of those whose strategy can run."""
    able, here = _able(facts), (facts[0], out_channels, weights, positions)
    here_alike = (kind, training, channels_last)
    alike = [r for r in measured() if (r["kind"], r["training"], r["channels_last"]) == here_alike]
    rows = [r for r in alike if r["execution"] in able]
    return min(
        rows,
        key=lambda r: _distance((r["batch"], r["out_channels"], r["weights"], r["positions"]), here),
        default=None,
    )


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum((math.log2(max(u, 1)) - math.log2(max(v, 1))) ** 2 for u, v in zip(a, b, strict=True))


@functools.cache
def measured() -> list[dict]:
    """Rows of the table that `dynaconv bench kernels --write` makes: shape and fastest strategy."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
