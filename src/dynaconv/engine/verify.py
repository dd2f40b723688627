"""Comparing a compiled model with what it should compute, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.engine.aten import decode
from dynaconv.engine.execute import Program
from dynaconv.engine.reference import copied, fills
from dynaconv.testing.tolerances import TOLERANCES

# One step alone, in bfloat16, given the same operands, is off by one rounding.
STEP_TOLERANCE = 1e-2


def verify(compiled: Any, inputs: tuple[Any, ...], tolerance: float | None) -> dict[str, Any]:
    """See `CompiledModel.verify`."""
    plan = compiled._program.plan
    tolerance = TOLERANCES["network"][getattr(torch, plan.dtype)] if tolerance is None else float(tolerance)
    source = None if compiled._source is None else compiled._source()
    _checks.engine_inputs(inputs, plan)
    if source is not None and not source.training:
        expected, masks, against = *_eager(source, inputs), "eager"
    else:
        expected, masks, against = None, {}, "interpreter"
    forced = compiled._forced_grids(inputs[0].shape[0], plan, masks or None)
    worst, reference = _worst_step(compiled, inputs, forced)
    if expected is None:
        expected = reference
    got = _pytree.tree_leaves(compiled._run(inputs, forced=masks or None)[0])
    error = max((difference(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)
    report = {"error": error, "tolerance": tolerance, "reference": against, **worst}
    if plan.dtype == "bfloat16" and not worst["worst_error"] <= STEP_TOLERANCE:
        alone = {"error": worst["worst_error"], "tolerance": STEP_TOLERANCE, "reference": "interpreter's"}
        raise _checks.engine_not_verified(report | alone)
    if not error <= tolerance:
        raise _checks.engine_not_verified(report)
    return report


def difference(a: Any, b: Any) -> float:
    """Largest difference relative to the largest magnitude of b; infinite where only one of them is finite."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if a is b or a == b else float("inf")
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    scale = b.abs()[b.isfinite()]
    value = float(apart.max()) / max(float(scale.max()) if scale.numel() else 0.0, 1e-12)
    return value if value == value else float("inf")


def _eager(source: Any, inputs: tuple[Any, ...]) -> tuple[list[Any], dict[str, Tensor]]:
    """Leaves of the network's result, and the masks that it used; not those of a gate that decided several times."""
    masks: dict[str, Tensor] = {}
    decided: set[str] = set()

    def keep(name: str) -> Any:
        def hook(_gate: Any, _args: Any, mask: Tensor) -> None:
            if name in decided:
                masks.pop(name, None)
            else:
                masks[name] = mask.detach()
            decided.add(name)

        return hook

    handles = [gate.register_forward_hook(keep(name)) for name, gate in gates(source).items()]
    try:
        with torch.no_grad():
            return _pytree.tree_leaves(source(*inputs)), masks
    finally:
        for handle in handles:
            handle.remove()


def _worst_step(
    compiled: Any, inputs: tuple[Any, ...], forced: dict[int, Tensor]
) -> tuple[dict[str, Any], list]:
    """The step whose result differs most from the interpreter's, and the interpreter's results.

    In float32 each follows its own chain of values. In bfloat16 the interpreter goes on from our values, or a rounding
    that falls the other way would grow from step to step.
    """
    program = compiled._program
    plan, n = program.plan, inputs[0].shape[0]
    other = Program(plan, "eager")
    runs = []
    for one in (program, other):
        slots: list[Any] = [None] * plan.slots
        slots[: len(inputs)] = inputs
        runs.append((one, slots, one.open(slots, n, forced, torch.get_num_threads())))
    worst = {"worst_layer": "", "worst_kernel": "", "worst_error": 0.0}
    try:
        with torch.no_grad():
            for segment in plan.segments:
                if segment.aten >= 0:
                    for one, slots, forward in runs:
                        one.aten(segment.aten, slots, forward)
                    continue
                for i in range(segment.first, segment.last):
                    for _, _, forward in runs:
                        forward.steps(i, i + 1)
                    error = _step_error(plan.steps[i], runs[0][2], runs[1][2], plan.dtype == "bfloat16")
                    if error > worst["worst_error"]:
                        step = plan.steps[i]
                        worst = {"worst_layer": step.layer, "worst_kernel": step.kind, "worst_error": error}
            return worst, decode(plan.outputs, plan.constants, runs[1][1])
    finally:
        for _, _, forward in runs:
            forward.close()


def _step_error(step: Any, ours: Any, reference: Any, together: bool) -> float:
    if step.out < 0:
        return 0.0
    rows = None
    if step.kind == "narrow":
        rows = _written(step, reference)
    elif step.grid >= 0 and step.kind not in ("mean", "mask_value") and not fills(step):
        # Above its break-even a step also computes rows that nobody needs.
        rows = reference.masks[step.grid]
        rows = ~rows if step.closed else rows
    a, b = ours.value(step.out), reference.value(step.out)
    if step.kind == "copy":
        a, b = copied(step, a), copied(step, b)
        source = ours.plan.values[step.input].channels
        count = min(a.shape[3], -(-(source - step.ints[1]) // max(step.ints[3], 1)))
        a, b = a[..., :count], b[..., :count]
    if rows is None:
        rows = ...
    error = difference(a[rows], b[rows])
    if together:
        b[rows] = a[rows]
    return error


def _written(step: Any, reference: Any) -> Tensor:
    """Which values of its result a step over open channels writes, as a mask: those of open channels come first."""
    value, decisions = reference.value(step.out), reference.masks[step.grid][:, 0]
    if not step.ints[2]:
        return torch.ones_like(value, dtype=torch.bool)
    width = reference.conv(step.conv[0]).out_channels // decisions.shape[1]
    counts = decisions.sum(1) * width
    return (torch.arange(value.shape[3]) < counts[:, None])[:, None, None].expand(value.shape)
