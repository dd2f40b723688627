"""Compiled kernels that were built from another version: nothing runs on them, and nobody has to wonder why."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

import dynaconv as dc
from dynaconv.engine import files, load, runtime
from dynaconv.measure.roofline import engine_state
from dynaconv.ops import _native


def test_kernels_of_another_version_are_told(monkeypatch) -> None:
    model, x = dc.create_model("resnet8_cifar", width=4).eval(), torch.randn(1, 3, 32, 32)
    monkeypatch.setattr(_native, "load", lambda: (object(), "avx512"))
    assert runtime.library() is None and runtime.missing() == _native.STALE
    with pytest.warns(UserWarning, match="from another version; run `make setup`, or install dynaconv again"):
        fast = dc.compile(model, (x,), measure=False)
    assert fast.backend == "eager" and "another version" in str(fast.plan)
    assert engine_state()[0].startswith("PyTorch operations: the compiled kernels are from another version")
    with pytest.raises(RuntimeError, match="from another version"):
        dc.compile(model, (x,), backend="cpu")


@pytest.mark.skipif(_native.load()[0] is None, reason="the kernels are not built")
def test_the_version_of_plans_is_asked_of_the_library(monkeypatch) -> None:
    fresh = ctypes.CDLL(str(_native.LIBRARY))
    monkeypatch.setattr(_native, "load", lambda: (fresh, "avx512"))
    monkeypatch.setattr(runtime, "PLAN_ABI", runtime.PLAN_ABI + 1)
    assert runtime.library() is None


@pytest.mark.parametrize("step", [-1, 1])
def test_files_from_kernels_of_another_version_are_refused(step: int, tmp_path: Path, monkeypatch) -> None:
    model, x = dc.create_model("resnet8_cifar", width=4).eval(), torch.randn(1, 3, 32, 32)
    fast = dc.compile(model, (x,), backend="eager", measure=False)
    other = runtime.PLAN_ABI + step
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT", other)
        file = fast.save(tmp_path / "fast.plan")
    expected = (
        f"is of format {other}, expected a compiled model of format {runtime.PLAN_ABI}; compile and save it"
    )
    with pytest.raises(ValueError, match=expected):
        load(file)
    assert torch.equal(load(fast.save(file), backend="eager")(x), fast(x))
