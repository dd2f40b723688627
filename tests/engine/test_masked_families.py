"""Blocks with squeeze-excite and LayerNorm in the engine: right at every density, and native where that is promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.convert.families import FAMILIES, timm_model
from tests.convert.test_families import lively, set_backend
from torch import nn

import dynaconv as dc
from dynaconv.ops import _native
from dynaconv.testing import force_masks

pytestmark = pytest.mark.needs("timm", "torchvision")
NATIVE = ["se-resnet", "blurred resnet", "mobilenetv3", "efficientnet", "convnext", "repvit", "fastvit"]
THROUGH_ATEN = ["convnextv2"]


def masked(family: str) -> tuple[nn.Module, int]:
    """A small network of the family with masks, and the side of its pictures."""
    build, side, _, _ = FAMILIES[family]
    if family.startswith("convnext"):
        build, side = lambda: timm_model(f"{family}_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 64
    model = lively(build()).eval()
    dc.dynamize_(model, input_size=(3, side, side))
    return model, side


@pytest.mark.parametrize("family", NATIVE + THROUGH_ATEN)
def test_compiled_is_the_masked_network(family: str) -> None:
    torch.manual_seed(0)
    model, side = masked(family)
    x = torch.randn(2, 3, side, side)
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


@pytest.mark.parametrize("family", ["se-resnet", "convnext", "convnextv2"])
def test_every_operation_of_a_branch_follows_its_mask(family: str) -> None:
    model, side = masked(family)
    fast = dc.compile(model, (torch.randn(1, 3, side, side),), measure=False, backend="eager")
    plan = fast.plan.raw
    parts = tuple(f"{name}.block" for name in fast.gates)
    branch = [s for s in plan.steps if s.layer in fast.gates or s.layer.startswith(parts)]
    branch = [s for s in branch if s.out >= 0 and "downsample" not in s.layer]
    whole = [s for s in branch if s.grid < 0 and plan.values[s.out].size != (1, 1)]
    assert {s.kind for s in branch} >= {"conv", "multiply" if family == "se-resnet" else "layer_norm"}
    assert not whole, [(s.kind, s.layer) for s in whole]


@pytest.mark.parametrize("family", ["mobilenetv3", "efficientnet"])
def test_what_squeeze_excite_looks_at_is_one_masked_step(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, side = masked(family)
    x = torch.randn(2, 3, side, side)
    fast = dc.compile(model, (x,), measure=False)
    plan = fast.plan.raw
    (first, *more) = [
        (step, row)
        for step, row in zip(plan.steps, fast.plan.steps, strict=True)
        if step.kind == "inverted" and step.conv[2] < 0 and step.grid >= 0
    ]
    assert more and not any(step.kind == "mean" and step.grid >= 0 for step in plan.steps)
    for step, row in (first, *more):
        assert step.grid2 >= 0 and step.aux[1] >= 0
        assert row["kernel"] == "inverted (no projection)" and row["choice"] == "sparse"
    # Above a share of open rows all are computed, and the mean is still over the open ones.
    for above in (2.0, 0.2):
        for step, _ in (first, *more):
            step.run_all_above = above
        again = dc.engine.load(fast.save(tmp_path / "model.plan"))
        with torch.no_grad(), force_masks(model, 0.4), force_masks(again, 0.4):
            want = model(x)
            assert float((again(x) - want).abs().max() / want.abs().max()) <= 1e-4


def compiled(block: nn.Module, backend: str) -> tuple[nn.Module, torch.Tensor, dc.engine.CompiledModel]:
    """A convolution and a masked block of 8 channels, pictures for them, and the compiled network."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), block).eval(), torch.randn(2, 3, 20, 17)
    dc.dynamize_(model, input_size=(3, 20, 17))
    set_backend(model, "eager")
    return model, x, dc.compile(model, (x,), measure=False, backend=backend)


class MixedDepthwise(nn.Module):
    """A branch that is cut along channels, convolved by windows of two sizes, and joined (arXiv 1907.09595)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 12, 1)
        self.small, self.large = nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.Conv2d(6, 6, 5, 1, 2, groups=6)
        self.project = nn.Conv2d(12, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small, large = self.expand(x).relu().chunk(2, 1)
        return x + self.project(torch.cat([self.small(small), self.large(large)], 1))


@pytest.mark.parametrize("backend", ["eager"] if _native.missing() else ["eager", "cpu"])
def test_what_several_windows_read_is_the_widest_of_them(backend: str) -> None:
    model, x, fast = compiled(MixedDepthwise(), backend)
    expand = next(s for s in fast.plan.raw.steps if s.layer.endswith("expand"))
    (wide,) = (s for s in fast.plan.raw.steps if s.kind == "dilate" and s.grid2 == expand.grid)
    assert fast.plan.raw.convs[wide.conv[0]].kernel == (5, 5)
    for density in (0.0, 0.1, 1.0):
        with torch.no_grad(), force_masks(model, density):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class Ghostly(nn.Module):
    """Two ghost modules (arXiv 1911.11907) with squeeze-excite between them."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(8, 16, 1), nn.Conv2d(32, 4, 1)
        self.ghosts = nn.ModuleList(nn.Conv2d(c, c, 3, 1, 1, groups=c) for c in (16, 4))
        self.squeeze, self.excite = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.widen(x).relu()
        wide = torch.cat([wide, self.ghosts[0](wide).relu()], 1)
        scale = self.excite(self.squeeze(wide.mean((2, 3), keepdim=True)).relu()).sigmoid()
        narrow = self.narrow(wide * scale)
        return x + torch.cat([narrow, self.ghosts[1](narrow)], 1)


@pytest.mark.parametrize("backend", ["eager"] if _native.missing() else ["eager", "cpu"])
def test_squeeze_excite_sees_what_several_readers_need_together(backend: str) -> None:
    model, x, fast = compiled(Ghostly(), backend)
    assert not fast.plan.aten
    widen = next(s for s in fast.plan.raw.steps if s.layer.endswith("widen"))
    assert widen.grid >= 0
    for density in (0.0, 0.1, 0.4, 1.0):
        with torch.no_grad(), force_masks(model, density):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class Joined(nn.Module):
    """A branch whose last step is no convolution; `last` comes after the addition."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.parts, self.last = nn.ModuleList(nn.Conv2d(8, 4, 3, 1, 1) for _ in range(2)), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x + torch.cat([part(x) for part in self.parts], 1))


@pytest.mark.parametrize("backend", ["eager"] if _native.missing() else ["eager", "cpu"])
@pytest.mark.parametrize("again", [False, True], ids=["in place", "read again"])
@pytest.mark.parametrize("last", [nn.Identity(), nn.ReLU(), nn.SiLU()], ids=["none", "relu", "silu"])
def test_sums_behind_a_branch_walk_open_rows(last: nn.Module, again: bool, backend: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Conv2d(8, 8, 1), Joined(last)
            self.last = nn.Conv2d(16 if again else 8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(torch.cat([x, self.block(x)], 1) if again else self.block(x))

    model, x, fast = compiled(Twice(), backend)
    (added,) = (s for s in fast.plan.raw.steps if s.kind == "add")
    closed = [s for s in fast.plan.raw.steps if s.kind == "activate" and s.closed]
    assert added.grid >= 0 and not any(s.kind == "mask_value" for s in fast.plan.raw.steps)
    assert len(closed) == (again or not isinstance(last, nn.Identity))
    for density in (0.0, 0.4, 1.0):
        with torch.no_grad(), force_masks(model, density):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
