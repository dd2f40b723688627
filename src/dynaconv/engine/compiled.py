"""`CompiledModel`: a plan that can be called, checked, measured, saved and turned to another budget."""

from __future__ import annotations

import copy
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from dynaconv import _checks
from dynaconv.budget.calibration import threshold_for
from dynaconv.convert import gates
from dynaconv.engine import files, runtime
from dynaconv.engine.execute import Program
from dynaconv.engine.plan import Plan
from dynaconv.engine.plan_table import PlanTable
from dynaconv.engine.straight import Decisions, Straight
from dynaconv.ops import _native
from dynaconv.testing.masks import ForcedMask

BACKENDS = ("auto", "cpu", "triton", "eager")


@dataclass(frozen=True)
class RunStats:
    """What one forward took.

    Attributes:
        images: N.
        open_rows: of every grid of the plan, over the batch.
        step_ns: wall time of every native step in nanoseconds.
        densities: open share of every gate's mask, by name of block.
        steps: {"layer", "kernel", "ms"} of every native step.
    """

    images: int
    open_rows: list[int]
    step_ns: list[float]
    densities: dict[str, float]
    steps: list[dict[str, Any]]

    @classmethod
    def of(cls, plan: Plan, n: int, open_rows: list[int], step_ns: list[float]) -> RunStats:
        """From what the executor counted."""
        densities = {}
        for gate in plan.gates:
            grid = plan.grids[gate.grid]
            densities[gate.name] = open_rows[gate.grid] / (n * grid.height * grid.width)
        steps = [
            {"layer": step.layer, "kernel": step.kind, "ms": ns / 1e6}
            for step, ns in zip(plan.steps, step_ns, strict=False)
        ]
        return cls(n, open_rows, step_ns[: len(plan.steps)], densities, steps)


class CompiledModel:
    """A network as a plan of native steps; made by `dynaconv.compile` or `dynaconv.engine.load`.

    Calling it with images [N, C, H, W] (float32, on the CPU) gives what the network gives, without gradients. The
    batch size is free, the size of an image is not; N = 0 gives an empty result. It may be called from several
    threads at once. Masks are not decided from NaN: that is an error, where the network itself closes the position.

    Attributes:
        backend: "cpu" (compiled kernels) or "eager" (the plan on PyTorch operations).
        backend_reason: why `auto` did not take the compiled kernels, or None.
        threads: for the native steps; None follows `torch.get_num_threads()`.
    """

    def __init__(
        self, plan: Plan, out_spec: Any, *, backend: str = "auto", threads: int | None = None,
        source: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.backend, self.backend_reason = choose_backend(backend, getattr(torch, plan.dtype))
        if self.backend_reason == _native.STALE:
            # Somebody built the kernels and expects their speed.
            warnings.warn(
                f"{_native.STALE}; until then plans run on PyTorch operations, slowly", stacklevel=3
            )
        self.threads = threads
        self._program = Program(plan, self.backend)
        self._out_spec = out_spec
        self._straight = Straight.of(plan, self._program.native, out_spec)
        self._source = None if source is None else weakref.ref(source)
        self._source_gates = {} if source is None else {n: weakref.ref(g) for n, g in gates(source).items()}
        # Of the gates: empty while nobody forces anything on the network, which a call sees at a glance.
        self._source_hooks = [] if source is None else [g._forward_hooks for g in gates(source).values()]
        self._forced: dict[str, ForcedMask] = {}
        self._decided: tuple[dict[str, ForcedMask], int, Decisions] | None = None

    @property
    def plan(self) -> PlanTable:
        """Each step with its kernel, times, break-even density and the reason for the choice; print it."""
        return PlanTable(self._program.plan, self.backend, self.backend_reason)

    @property
    def gates(self) -> list[str]:
        """Names of the blocks whose gates decide inside of the plan."""
        return [g.name for g in self._program.plan.gates]

    @property
    def memory(self) -> int:
        """Bytes that the arenas hold between calls."""
        return self._program.native.memory

    def __call__(self, *inputs: Any) -> Any:
        """Images [N, C, H, W] -> what the network returns.

        Raises:
            TypeError, ValueError: no tensor, another shape, dtype or device than the network was compiled for, or a
            gate whose logits are NaN.
        """
        straight = self._straight
        if straight is not None and len(inputs) == 1 and straight.takes(inputs[0]):
            forced = (
                self._decisions(len(inputs[0]), straight) if self._forced or any(self._source_hooks) else None
            )
            return straight(inputs[0], self.threads or torch.get_num_threads(), forced)
        return self._run(inputs)[0]

    def run_with_stats(self, *inputs: Any) -> tuple[Any, RunStats]:
        """The result, and what it took: see `RunStats`."""
        y, forward, n = self._run(inputs, timed=True)
        return y, RunStats.of(self._program.plan, n, list(forward.open_rows), list(forward.step_ns))

    def _run(self, inputs: tuple[Any, ...], timed: bool = False, forced: dict[str, Tensor] | None = None):
        program = self._program
        inputs = tuple(_pytree.tree_leaves(inputs))
        _checks.engine_inputs(inputs, program.plan)
        empty = inputs[0].dim() > 0 and inputs[0].shape[0] == 0
        if empty:
            # Shapes follow from one image.
            inputs = (inputs[0].new_zeros(1, *inputs[0].shape[1:]), *inputs[1:])
        n = inputs[0].shape[0] if inputs[0].dim() else 1
        grids = self._forced_grids(n, program.plan, forced)
        autocast = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
        with torch.no_grad(), autocast:
            tensors = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
            leaves, forward = program.run(tensors, n, grids, self.threads or torch.get_num_threads(), timed)
        if empty:
            leaves = [v[:0] if isinstance(v, Tensor) and v.dim() else v for v in leaves]
        return _pytree.tree_unflatten(leaves, self._out_spec), forward, n

    def _forced_grids(self, n: int, plan: Plan, forced: dict[str, Tensor] | None) -> dict[int, Tensor]:
        """Decisions [N, h, w] that replace those of gates, by grid."""
        found = {}
        masks = self._active_masks() if forced is None else {}
        for gate in plan.gates:
            grid = plan.grids[gate.grid]
            if forced is not None and gate.name in forced:
                found[gate.grid] = forced[gate.name].reshape(n, grid.height, grid.width) > 0.5
            elif gate.name in masks:
                found[gate.grid] = masks[gate.name].decisions(n, (grid.height, grid.width))
        return found

    def _decisions(self, n: int, straight: Straight) -> Decisions:
        """Forced decisions for n images; kept while only this model is forced, and by the same masks."""
        kept = self._decided
        if kept is not None and kept[0] is self._forced and kept[1] == n and not any(self._source_hooks):
            return kept[2]
        forced = self._forced
        decisions = Decisions(straight.grids, self._forced_grids(n, self._program.plan, None))
        if forced is self._forced and not any(self._source_hooks):
            self._decided = forced, n, decisions
        return decisions

    def _active_masks(self) -> dict[str, ForcedMask]:
        """Masks forced on the network that this came from, overruled by those forced on this model."""
        found = {}
        for name, reference in self._source_gates.items():
            gate = reference()
            hooks = () if gate is None else gate._forward_hooks.values()
            found.update((name, hook) for hook in hooks if isinstance(hook, ForcedMask))
        missing = found.keys() - set(self.gates)
        if missing:
            raise _checks.engine_unforced_gates(sorted(missing))
        return found | self._forced

    def force(self, masks: dict[str, ForcedMask]) -> dict[str, ForcedMask]:
        """Replace gates' decisions, by name of block, and return what was forced before ({} for nothing).

        `dynaconv.testing.force_masks` does so inside a `with` block.
        """
        before, self._forced = self._forced, dict(masks)
        return before

    def set_budget(self, target: float | None) -> float | None:
        """Turn a calibrated network to a budget, as `dynaconv.set_budget_` does; the plan is not measured again.

        Args:
            target: share of the conditional MACs in (0, 1]; 1 opens everything; None is the threshold of training.
        Returns:
            The threshold of the first gate (-inf for 1).
        Raises:
            ValueError: no gates, not calibrated, a target outside of the calibrated range, or gates whose thresholds
            were compiled in (halting, channels).
        """
        plan = self._program.plan
        if plan.fixed_gates:
            raise _checks.engine_fixed_gates(plan.fixed_gates)
        if not plan.gates:
            raise _checks.no_gates("set_budget")
        thresholds = [threshold_for(torch.tensor(g.budgets), target) for g in plan.gates]
        changed = copy.copy(plan)
        changed.steps = list(plan.steps)
        for gate, threshold in zip(plan.gates, thresholds, strict=True):
            changed.steps[gate.step] = replace(plan.steps[gate.step], floats=[threshold, 0.0, 0.0, 0.0])
        # One assignment: calls that run keep the program that they started with.
        self._program = Program(changed, self.backend)
        self._straight = Straight.of(changed, self._program.native, self._out_spec)
        return thresholds[0]

    def verify(self, inputs: tuple[Any, ...], tolerance: float | None = None) -> dict[str, Any]:
        """Compare with the network in eager mode, or with the reference interpreter where it is gone.

        Both get the same masks (those of the network), so a logit beside its threshold cannot part them; the logits
        themselves are compared like every other step.

        Args:
            tolerance: accepted error, relative to the largest magnitude of each result; default 1e-4, and 1e-1 in
                bfloat16, where each step by itself may be off by 1e-2 (see verify.py).
        Returns:
            {"error", "tolerance", "reference", "worst_layer", "worst_kernel", "worst_error"}.
        Raises:
            RuntimeError: the error exceeds the tolerance; names the worst layer.
        """
        from dynaconv.engine.verify import verify

        return verify(self, tuple(inputs), tolerance)

    def save(self, path: str | Path) -> Path:
        """Write the plan and its packed weights to one safetensors file, whole or not at all.

        Raises:
            TypeError: an ATen step or the structure of the result cannot be written. OSError: no room, no right.
        """
        return files.save(self._program.plan, self._out_spec, path)

    def __repr__(self) -> str:
        plan = self._program.plan
        return (
            f"CompiledModel({len(plan.steps)} native steps, {len(plan.aten)} through ATen, backend={self.backend!r}, "
            f"image={list(plan.image)})"
        )


def choose_backend(backend: str, dtype: torch.dtype = torch.float32) -> tuple[str, str | None]:
    """The backend that runs, and why it is not the fastest.

    Raises:
        ValueError: an unknown name, or a dtype that this processor has no kernels for. RuntimeError: an explicit choice
        that cannot run, with the reason.
    """
    _checks.one_of("backend", backend, BACKENDS)
    if backend == "eager":
        return "eager", None
    if backend == "triton":
        raise _checks.grad_free_backend("compile", "triton", "the engine has no Triton kernels yet")
    reason = runtime.missing()
    if reason is None:
        if dtype == torch.bfloat16 and (lacks := runtime.missing_bfloat16()) is not None:
            raise _checks.engine_dtype(dtype, lacks)
        return "cpu", None
    if backend == "cpu":
        raise _checks.grad_free_backend("compile", "cpu", reason)
    return "eager", reason


def load(path: str | Path, *, backend: str = "auto", threads: int | None = None) -> CompiledModel:
    """Read what `CompiledModel.save` wrote; the network that it was compiled from is not needed.

    Raises:
        FileNotFoundError. ValueError: a truncated or foreign file, or one of another version.
    """
    plan, out_spec = files.load(path)
    try:
        return CompiledModel(plan, out_spec, backend=backend, threads=threads)
    except runtime.RefusedPlan as error:
        raise _checks.engine_damaged_file(str(path), error) from error
