"""The native executor: a plan handed to the compiled kernels, and one forward through it."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.engine.plan import Plan
from dynaconv.engine.structures import BYTE, PLAN_ABI, Call, PlanData, plan_data
from dynaconv.ops import _native

_TEXT = 512
_SPOILT = 3  # of dynaconv_plan_run


def library() -> ctypes.CDLL | None:
    """The compiled kernels with the plan functions declared, or None where they are missing or of another version."""
    loaded, _ = _native.load()
    if loaded is None or not hasattr(loaded, "dynaconv_plan_abi"):
        return None
    if loaded.dynaconv_plan_create.restype is ctypes.c_void_p:
        return loaded
    if loaded.dynaconv_plan_abi() != PLAN_ABI:
        return None
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.dynaconv_plan_create.argtypes = [ctypes.POINTER(PlanData), ctypes.c_char_p, i64]
    loaded.dynaconv_plan_create.restype = pointer
    loaded.dynaconv_plan_destroy.argtypes = [pointer]
    loaded.dynaconv_plan_destroy.restype = None
    loaded.dynaconv_plan_acquire.argtypes = [pointer, i64]
    loaded.dynaconv_plan_acquire.restype = pointer
    loaded.dynaconv_plan_most_images.argtypes = [pointer]
    loaded.dynaconv_plan_most_images.restype = i64
    loaded.dynaconv_plan_release.argtypes = [pointer, pointer]
    loaded.dynaconv_plan_release.restype = None
    loaded.dynaconv_plan_value.argtypes = [pointer, pointer, i32]
    loaded.dynaconv_plan_value.restype = pointer
    loaded.dynaconv_plan_run.argtypes = [pointer, pointer, ctypes.POINTER(Call), ctypes.c_char_p, i64]
    loaded.dynaconv_plan_forward.argtypes = [pointer, ctypes.POINTER(Call), ctypes.c_char_p, i64]
    loaded.dynaconv_plan_memory.argtypes = [pointer]
    loaded.dynaconv_plan_memory.restype = i64
    return loaded


def missing() -> str | None:
    """Why the native executor cannot be used, or None when it can."""
    loaded, reason = _native.load()
    if loaded is None:
        return reason
    return None if library() else _native.STALE


def missing_bfloat16() -> str | None:
    """Why plans in bfloat16 cannot run on the native executor, or None when they can."""
    found = library()
    if found is None:
        return missing()
    return None if found.dynaconv_has_bfloat16() else "this processor has no AVX512_BF16"


class RefusedPlan(RuntimeError):
    """The library has found something in a plan that it must not run."""


class NativePlan:
    """A plan that the library has checked and keeps; safe to use from several threads.

    Raises:
        RefusedPlan: the library refuses the plan, with its reason.
    """

    def __init__(self, plan: Plan) -> None:
        found = library()
        assert found is not None
        self.plan = plan
        data, self._keep = plan_data(plan)
        text = ctypes.create_string_buffer(_TEXT)
        handle = found.dynaconv_plan_create(ctypes.byref(data), text, _TEXT)
        if not handle:
            raise RefusedPlan(f"the compiled kernels refuse this plan: {text.value.decode()}")
        self.handle = handle
        self.most_images: int = found.dynaconv_plan_most_images(handle)
        weakref.finalize(self, found.dynaconv_plan_destroy, handle)

    def open(
        self, n: int, externals: list[Tensor | None], forced: dict[int, Tensor], threads: int
    ) -> NativeRun:
        """A forward over n images."""
        return NativeRun(self, n, externals, forced, threads)

    def admit(self, n: int) -> None:
        """Raise ValueError for more images than the kernels can number, before anything of their size is made."""
        if n > self.most_images:
            raise _checks.engine_batch(n, self.most_images)

    def stopped(self, failed: int, text: str) -> Exception:
        """Why a run has no result."""
        if failed == _SPOILT:
            return _checks.engine_nan_logits(self.plan.steps[int(text)].layer)
        return RuntimeError(f"the compiled kernels stopped: {text}")

    def no_context(self, n: int) -> Exception:
        """Why no arena for n images could be had."""
        return MemoryError(f"no memory for {n} images ({self.plan.arena_bytes * n} bytes of arena)")

    @property
    def memory(self) -> int:
        """Bytes of the arenas that are kept for the next calls."""
        return library().dynaconv_plan_memory(self.handle)


class NativeRun:
    """One forward: holds an arena until `close`."""

    def __init__(
        self,
        native: NativePlan,
        n: int,
        externals: list[Tensor | None],
        forced: dict[int, Tensor],
        threads: int,
    ) -> None:
        self.native, self.n, self.externals, self.threads = native, n, externals, threads
        self.plan = native.plan
        # Booleans are bytes of 0 and 1.
        self.forced = {g: mask.contiguous() for g, mask in forced.items()}
        self._forced = (ctypes.c_void_p * max(len(self.plan.grids), 1))()
        for grid, mask in self.forced.items():
            self._forced[grid] = mask.data_ptr()
        self.open_rows = (ctypes.c_int64 * max(len(self.plan.grids), 1))()
        self.step_ns = (ctypes.c_double * max(len(self.plan.steps), 1))()
        self.timed = False
        self.context = library().dynaconv_plan_acquire(native.handle, n)
        if not self.context:
            raise native.no_context(n)

    def steps(self, first: int, last: int) -> None:
        """Run native steps [first, last)."""
        count = max(len(self.externals), 1)
        pointers, planes = (ctypes.c_void_p * count)(), (ctypes.c_int32 * count)()
        keep = []
        for i, tensor in enumerate(self.externals):
            if tensor is not None:
                rows, planes[i] = _rows_or_planes(tensor, self.plan.externals[i].source)
                pointers[i] = rows.data_ptr()
                keep.append(rows)
        call = Call(
            self.n, self.threads, first, last, 0, pointers, planes,
            ctypes.cast(self._forced, ctypes.POINTER(ctypes.c_void_p)) if self.forced else None,
            self.open_rows, self.step_ns if self.timed else None,
        )  # fmt: skip
        text = ctypes.create_string_buffer(_TEXT)
        failed = library().dynaconv_plan_run(
            self.native.handle, self.context, ctypes.byref(call), text, _TEXT
        )
        if failed:
            raise self.native.stopped(failed, text.value.decode())

    def value(self, index: int) -> Tensor:
        """A view [N, h, w, C] of a value, valid until `close`."""
        value = self.plan.values[index]
        if value.external >= 0:
            return self.externals[value.external]
        address = library().dynaconv_plan_value(self.native.handle, self.context, index)
        dtype = getattr(torch, value.dtype)
        rows = value.height * value.width
        elements = self.n * rows * value.stride - value.first
        buffer = (BYTE * (elements * dtype.itemsize)).from_address(address)
        strides = (rows * value.stride, value.width * value.stride, value.stride, 1)
        return torch.frombuffer(buffer, dtype=dtype).as_strided(
            (self.n, *value.size, value.channels), strides
        )

    def close(self) -> None:
        """Give the arena back."""
        if self.context:
            library().dynaconv_plan_release(self.native.handle, self.context)
            self.context = None


def _rows_or_planes(tensor: Tensor, source: str) -> tuple[Tensor, int]:
    """The image [N, C, H, W] as it lies (planes: 1) or as rows (0); other tensors are rows."""
    if source != "input":
        return tensor, 0
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1), 0
    return tensor.contiguous(), 1
