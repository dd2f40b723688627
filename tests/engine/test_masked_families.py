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
