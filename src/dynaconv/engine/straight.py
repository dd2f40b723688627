"""The short way through a plan that needs no ATen: from one image tensor to the results in one call of the kernels."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from dynaconv.engine.aten import look
from dynaconv.engine.plan import Plan
from dynaconv.engine.runtime import NativePlan, library
from dynaconv.engine.structures import Call

_TEXT = 512


class Straight:
    """A forward of a plan with one native segment; what it needs to know is looked up once."""

    def __init__(self, plan: Plan, native: NativePlan, out_spec: Any) -> None:
        self.native, self.out_spec = native, out_spec
        self.shape = plan.image
        self.count, self.steps, self.grids = len(plan.externals), len(plan.steps), len(plan.grids)
        self.images = [i for i, e in enumerate(plan.externals) if e.source == "input"]
        self.made = []
        for i, external in enumerate(plan.externals):
            if external.source == "made":
                value = plan.values[external.value]
                size = (value.height, value.width, value.channels)
                self.made.append((i, external.slot, size, getattr(torch, value.dtype)))
        self.outputs = [(ref["slot"], ref["layout"]) for ref in plan.outputs]
        self.single = len(self.outputs) == 1 and out_spec == _pytree.tree_structure(0)

    @classmethod
    def of(cls, plan: Plan, native: object, out_spec: Any) -> Straight | None:
        """None where the long way must be taken."""
        if not isinstance(native, NativePlan) or plan.aten or plan.batch is not None or plan.inputs != 1:
            return None
        made = {e.slot for e in plan.externals if e.source == "made"}
        rows = all(
            isinstance(ref, dict) and ref.get("$") == "slot" and ref["held"] == "rows" and ref["slot"] in made
            for ref in plan.outputs
        )
        known = all(e.source in ("input", "made") for e in plan.externals)
        return cls(plan, native, out_spec) if rows and known and len(plan.segments) == 1 else None

    def takes(self, inputs: tuple[Any, ...]) -> bool:
        """Whether this is a plain batch of images; everything else, errors too, is for the long way."""
        if len(inputs) != 1 or type(inputs[0]) is not Tensor:
            return False
        x = inputs[0]
        fits = x.dtype is torch.float32 and x.dim() == 4 and x.shape[1:] == self.shape and x.shape[0] > 0
        return fits and x.layout is torch.strided and x.device.type == "cpu"

    def __call__(self, x: Tensor, threads: int, forced: dict[int, Tensor]) -> Any:
        """Run it; `forced` holds decisions [N, h, w] by grid."""
        n, kernels, native = x.shape[0], library(), self.native
        native.admit(n)
        planes = x.is_contiguous()
        if not planes:
            rows = x.is_contiguous(memory_format=torch.channels_last)
            x, planes = (x, False) if rows else (x.contiguous(), True)
        pointers, layouts = (ctypes.c_void_p * self.count)(), (ctypes.c_int32 * self.count)()
        for i in self.images:
            pointers[i], layouts[i] = x.data_ptr(), planes
        slots = {}
        for i, slot, size, dtype in self.made:
            slots[slot] = tensor = torch.empty((n, *size), dtype=dtype)
            pointers[i] = tensor.data_ptr()
        decisions = None
        if forced:
            decisions = (ctypes.c_void_p * self.grids)()
            for grid, mask in forced.items():
                decisions[grid] = mask.data_ptr()
        context = kernels.dynaconv_plan_acquire(native.handle, n)
        if not context:
            raise native.no_context(n)
        try:
            call = Call(n, threads, 0, self.steps, 0, pointers, layouts, decisions, None, None)
            text = ctypes.create_string_buffer(_TEXT)
            if kernels.dynaconv_plan_run(native.handle, context, ctypes.byref(call), text, _TEXT):
                raise RuntimeError(f"the compiled kernels stopped: {text.value.decode()}")
        finally:
            kernels.dynaconv_plan_release(native.handle, context)
        leaves = [look(slots[slot], layout) for slot, layout in self.outputs]
        return leaves[0] if self.single else _pytree.tree_unflatten(leaves, self.out_spec)
