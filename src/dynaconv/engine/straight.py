"""The short way through a plan that needs no ATen: from one image tensor to the results in one call of the kernels.

A forward leaves nothing of the interpreter in the processor's caches, so that every line of Python between two forwards
costs a microsecond and every operation of torch ten or more: what does not change from call to call is made once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from dynaconv.engine.aten import look
from dynaconv.engine.plan import Plan
from dynaconv.engine.runtime import NativePlan, library
from dynaconv.engine.structures import Call

_TEXT = 512
_FLOAT32, _STRIDED = torch.float32, torch.strided
_NO_CONTEXT = 2  # of dynaconv_plan_forward


class Decisions:
    """Forced decisions [N, h, w] by grid, as the kernels take them."""

    def __init__(self, grids: int, forced: dict[int, Tensor]) -> None:
        self._masks = {grid: mask.contiguous() for grid, mask in forced.items()}
        self.array = (ctypes.c_void_p * grids)()
        for grid, mask in self._masks.items():
            self.array[grid] = mask.data_ptr()


class _Ready:
    """The structures of one call; lent to one call at a time."""

    def __init__(self, count: int, steps: int) -> None:
        self.pointers, self.layouts = (ctypes.c_void_p * count)(), (ctypes.c_int32 * count)()
        self.text = ctypes.create_string_buffer(_TEXT)
        self.call = Call(0, 0, 0, steps, 0, self.pointers, self.layouts, None, None, None)
        self.address = ctypes.byref(self.call)


class Straight:
    """A forward of a plan with one native segment; what it needs to know is looked up once."""

    def __init__(self, plan: Plan, native: NativePlan, out_spec: Any) -> None:
        self.native, self.out_spec = native, out_spec
        self.shape = torch.Size(plan.image)
        self.grids = len(plan.grids)
        self._sizes = len(plan.externals), len(plan.steps)
        self._images = [i for i, e in enumerate(plan.externals) if e.source == "input"]
        made = {e.slot: (i, plan.values[e.value]) for i, e in enumerate(plan.externals) if e.source == "made"}
        self._made = []
        for output in plan.outputs:
            index, value = made[output["slot"]]
            self._made.append((index, *_maker(value, output["layout"])))
        self.single = len(self._made) == 1 and out_spec == _pytree.tree_structure(0)
        self._idle: list[_Ready] = []
        self._forward = library().dynaconv_plan_forward

    @classmethod
    def of(cls, plan: Plan, native: object, out_spec: Any) -> Straight | None:
        """None where the long way must be taken."""
        if not isinstance(native, NativePlan) or plan.aten or plan.batch is not None or plan.inputs != 1:
            return None
        made = [e.slot for e in plan.externals if e.source == "made"]
        rows = all(
            isinstance(ref, dict) and ref.get("$") == "slot" and ref["held"] == "rows" and ref["slot"] in made
            for ref in plan.outputs
        )
        # Every made tensor is one result.
        once = rows and sorted(made) == sorted(ref["slot"] for ref in plan.outputs)
        known = all(e.source in ("input", "made") for e in plan.externals)
        return cls(plan, native, out_spec) if once and known and len(plan.segments) == 1 else None

    def takes(self, x: Any) -> bool:
        """Whether this is a plain batch of images; everything else, errors too, is for the long way."""
        if type(x) is not Tensor or x.dtype is not _FLOAT32 or not x.is_cpu or x.layout is not _STRIDED:
            return False
        shape = x.shape
        return shape[1:] == self.shape and shape[0] > 0

    def __call__(self, x: Tensor, threads: int, decisions: Decisions | None) -> Any:
        """Run it."""
        n = x.shape[0]
        if n > self.native.most_images:
            self.native.admit(n)
        planes = x.is_contiguous()
        if not planes:
            rows = x.is_contiguous(memory_format=torch.channels_last)
            x, planes = (x, False) if rows else (x.contiguous(), True)
        try:
            ready = self._idle.pop()
        except IndexError:
            ready = _Ready(*self._sizes)
        pointers, call = ready.pointers, ready.call
        for i in self._images:
            pointers[i], ready.layouts[i] = x.data_ptr(), planes
        leaves = []
        for i, make, form in self._made:
            made = make(n)
            pointers[i] = made.data_ptr()
            leaves.append(made if form is None else form(made))
        call.images, call.threads = n, threads
        call.forced = None if decisions is None else decisions.array
        failed = self._forward(self.native.handle, ready.address, ready.text, _TEXT)
        if failed:
            self._stop(failed, n, ready.text.value.decode())
        self._idle.append(ready)
        return leaves[0] if self.single else _pytree.tree_unflatten(leaves, self.out_spec)

    def _stop(self, failed: int, n: int, text: str) -> None:
        if failed == _NO_CONTEXT:
            raise self.native.no_context(n)
        raise self.native.stopped(failed, text)


def _maker(value: Any, layout: str) -> tuple[Callable[[int], Tensor], Callable[[Tensor], Tensor] | None]:
    """What makes the memory [N, h, w, C] of a result, and what turns it into the result unless it is already."""
    height, width, channels = value.height, value.width, value.channels
    dtype = getattr(torch, value.dtype)
    if layout == "nc" and height == width == 1:
        return lambda n: torch.empty((n, channels), dtype=dtype), None
    return lambda n: torch.empty((n, height, width, channels), dtype=dtype), lambda made: look(made, layout)
