"""One forward through a plan: native segments on a backend, ATen steps in between."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.engine import reference_mixed  # noqa: F401  registers its steps
from dynaconv.engine.aten import as_rows, decode, run_aten, target_of
from dynaconv.engine.plan import Plan
from dynaconv.engine.reference import Run
from dynaconv.engine.runtime import NativePlan


class Forward(Protocol):
    """What a backend opens for one forward."""

    n: int
    externals: list[Tensor | None]

    def steps(self, first: int, last: int) -> None:
        """Run native steps [first, last)."""

    def value(self, index: int) -> Tensor:
        """A value as [N, h, w, C]."""

    def close(self) -> None:
        """Give back what the forward holds."""


class EagerPlan:
    """The reference interpreter as a backend; its unpacked weights are kept between calls.

    Args:
        poison: fill the arena with NaN before every forward, so that a result shows what it should not have read.
    """

    memory = 0

    def __init__(self, plan: Plan, poison: bool = False) -> None:
        self.plan, self.poison = plan, poison
        self.weights: dict[int, tuple[Tensor, ...]] = {}

    def open(self, n: int, externals: list[Tensor | None], forced: dict[int, Tensor], threads: int) -> Run:
        """A forward over n images; PyTorch's own number of threads holds."""
        del threads
        return Run(self.plan, n, externals, forced, self.weights, self.poison)


class Program:
    """A plan on a backend, with its ATen operations found; immutable, so that threads can share it."""

    def __init__(self, plan: Plan, backend: str, poison: bool = False) -> None:
        self.plan = plan
        self.native = NativePlan(plan) if backend == "cpu" else EagerPlan(plan, poison)
        self.targets = [target_of(step.target, plan.constants) for step in plan.aten]

    def run(
        self, inputs: list[Any], n: int, forced: dict[int, Tensor], threads: int, timed: bool = False
    ) -> tuple[list[Any], Forward]:
        """Leaves of the result, and the closed forward (its masks' counts and times can still be read)."""
        if isinstance(self.native, NativePlan):
            self.native.admit(n)
        slots: list[Any] = [None] * self.plan.slots
        slots[: len(inputs)] = inputs
        forward = self.open(slots, n, forced, threads)
        forward.timed = timed
        try:
            for segment in self.plan.segments:
                if segment.aten < 0:
                    forward.steps(segment.first, segment.last)
                else:
                    self.aten(segment.aten, slots, forward)
            return decode(self.plan.outputs, self.plan.constants, slots), forward
        finally:
            forward.close()

    def open(self, slots: list[Any], n: int, forced: dict[int, Tensor], threads: int) -> Forward:
        """A forward whose external tensors are there: images as they came, made ones empty."""
        externals: list[Tensor | None] = []
        for external in self.plan.externals:
            value, tensor = self.plan.values[external.value], None
            if external.source == "made":
                tensor = torch.empty(n, *value.size, value.channels, dtype=getattr(torch, value.dtype))
                slots[external.slot] = tensor
            elif external.source == "input":
                tensor = slots[external.slot]
            externals.append(tensor)
        return self.native.open(n, externals, forced, threads)

    def aten(self, index: int, slots: list[Any], forward: Forward) -> None:
        """Run one ATen step, and hand its result to native readers."""
        step = self.plan.aten[index]
        run_aten(step, self.targets[index], self.plan.constants, slots)
        for i, external in enumerate(self.plan.externals):
            if external.source == "slot" and external.slot == step.out:
                rows = as_rows(slots[step.out], external.layout)
                self._fits(rows, forward.n, external.value, step.target)
                forward.externals[i] = rows
        for slot in step.frees:
            slots[slot] = None

    def _fits(self, rows: Tensor, n: int, index: int, target: str) -> None:
        """Raise unless an ATen result is what native readers take it for; a file may say anything."""
        value = self.plan.values[index]
        expected = (*value.size, value.channels)
        if tuple(rows.shape) != (n, *expected) or rows.dtype != getattr(torch, value.dtype):
            raise _checks.engine_result(target, expected, value.dtype, rows)
