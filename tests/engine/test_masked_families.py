"""Blocks with squeeze-excite and LayerNorm in the engine: right at every density, and native where that is promised."""

from __future__ import annotations

import pytest
import torch
from tests.convert.families import FAMILIES, timm_model
from tests.convert.test_families import lively, set_backend

import dynaconv as dc
from dynaconv.ops import _native
from dynaconv.testing import force_masks

pytestmark = pytest.mark.needs("timm", "torchvision")
NATIVE = ["se-resnet", "mobilenetv3", "convnext"]
THROUGH_ATEN = ["blurred resnet"]


@pytest.mark.parametrize("family", NATIVE + THROUGH_ATEN)
def test_compiled_is_the_masked_network(family: str) -> None:
    torch.manual_seed(0)
    build, side, _, _ = FAMILIES[family]
    if family == "convnext":
        build, side = lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 64
    model, x = lively(build()).eval(), torch.randn(2, 3, side, side)
    dc.dynamize_(model, input_size=(3, side, side))
    set_backend(model, "eager")
    # The interpreter fills rows that nobody computed with NaN.
    backends = ["eager"] if _native.missing() else ["eager", "cpu"]
    for backend in backends:
        fast = dc.compile(model, (x,), measure=False, backend=backend)
        assert (not fast.plan.aten) == (family in NATIVE)
        for density in (0.0, 0.3):
            with torch.no_grad(), force_masks(model, density):
                want = model(x)
                assert float((fast(x) - want).abs().max() / want.abs().max()) <= 1e-4


@pytest.mark.parametrize("family", ["se-resnet", "convnext"])
def test_every_operation_of_a_branch_follows_its_mask(family: str) -> None:
    build, side, _, _ = FAMILIES[family]
    if family == "convnext":
        build, side = lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 64
    model = lively(build()).eval()
    dc.dynamize_(model, input_size=(3, side, side))
    fast = dc.compile(model, (torch.randn(1, 3, side, side),), measure=False, backend="eager")
    plan = fast.plan.raw
    parts = tuple(f"{name}.block" for name in fast.gates)
    branch = [s for s in plan.steps if s.layer in fast.gates or s.layer.startswith(parts)]
    branch = [s for s in branch if s.out >= 0 and s.kind != "mask_value" and "downsample" not in s.layer]
    # Sums at the end skip what their weights close.
    whole = [s for s in branch if s.grid < 0 and s.aux[0] < 0 and plan.values[s.out].size != (1, 1)]
    assert {s.kind for s in branch} >= {"conv", "layer_norm" if family == "convnext" else "multiply"}
    assert not whole, [(s.kind, s.layer) for s in whole]
