"""Convolutions of one map that are added become one, where that multiplies no more."""

from __future__ import annotations

import pytest
import torch
from tests.convert.networks import randomise_norms
from tests.convert.test_families import set_backend
from tests.engine.networks import SIZE, conv_bn
from tests.engine.test_networks import BACKENDS, check
from torch import nn

import dynaconv as dc
from dynaconv.testing import force_masks


class Parallel(nn.Module):
    """Convolutions of one map, added, as networks have them before they are re-parameterised (arXiv 2101.03697)."""

    def __init__(self, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.large = nn.Conv2d(8, 8, 3, stride, 1, groups=groups)
        self.norm, self.small = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, stride, groups=groups, bias=False)
        self.wide = nn.Conv2d(8, 8, (1, 3), stride, (0, 1), groups=groups)
        self.identity = nn.BatchNorm2d(8) if stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.large(x)) + self.small(x) + self.wide(x)
        return (y if self.identity is None else y + self.identity(x)).relu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (8, 1), (1, 2)])
def test_sums_of_convolutions_are_one(groups: int, stride: int, backend: str) -> None:
    model = randomise_norms(nn.Sequential(conv_bn(3, 8), Parallel(groups, stride))).eval()
    fast = dc.compile(model, (torch.randn(1, *SIZE),), backend=backend)
    assert [step.kind for step in fast.plan.raw.steps][:1] == ["stem"] and len(fast.plan.raw.steps) == 2
    check(fast, model, torch.randn(3, *SIZE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shortcut", ["norm", "conv"])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (8, 1), (1, 2)])
def test_open_rows_take_the_shortcut_along_and_closed_rows_it_alone(
    groups: int, stride: int, shortcut: str, backend: str
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, stride, 1, groups=groups)
            self.shortcut = nn.BatchNorm2d(8)
            if shortcut == "conv" or stride > 1:
                self.shortcut = nn.Conv2d(8, 8, 1, stride, groups=groups)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.conv(x) + self.shortcut(x)).relu()

    torch.manual_seed(0)
    model = randomise_norms(nn.Sequential(conv_bn(3, 8), Block())).eval()
    dc.dynamize_(model, dc.SpatialMasking(unit="conv1x1"), input_size=SIZE)
    set_backend(model, "eager")
    fast = dc.compile(model, (torch.randn(1, *SIZE),), backend=backend, measure=False)
    conv, closed = (
        next(s for s in fast.plan.raw.steps if s.layer.endswith(part))
        for part in (".block.conv", ".shortcut")
    )
    assert closed.closed and closed.activation[0] == "relu" and conv.input2 == -1 and closed.grid == conv.grid
    assert sum(s.layer.endswith(".shortcut") for s in fast.plan.raw.steps) == 1
    for density in (0.0, 0.3, 1.0):
        with force_masks(model, density):
            check(fast, model, torch.randn(3, *SIZE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", ["squeeze", "conv1x1"])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride"), [(3, 3, 1), (3, 3, 2), (1, 3, 2), (4, 5, 2), (8, 3, 1)]
)
def test_a_masked_first_layer_reads_the_picture(
    channels: int, kernel: int, stride: int, unit: str, backend: str
) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, 40, kernel, stride, kernel // 2)
            self.small = nn.Conv2d(channels, 40, 1, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.conv(x) + self.small(x)).relu()

    torch.manual_seed(0)
    model, size = nn.Sequential(First(), nn.Conv2d(40, 4, 1)).eval(), (channels, *SIZE[1:])
    dc.dynamize_(model, dc.SpatialMasking(unit=unit, init="paper"), input_size=size)
    set_backend(model, "eager")
    fast = dc.compile(model, (torch.randn(1, *size),), backend=backend, measure=False)
    kinds, x = [step.kind for step in fast.plan.raw.steps], torch.randn(3, *size)
    assert kinds.count("stem") == (2 if channels <= 4 else 0)
    assert ("layout" in kinds) == (channels > 4 or unit == "conv1x1")
    for form in (torch.contiguous_format, torch.channels_last):
        check(fast, model, x.contiguous(memory_format=form))
        for density in (0.0, 0.4, 1.0):
            with force_masks(model, density):
                check(fast, model, x.contiguous(memory_format=form))
    fast.verify((x,))


def test_convolutions_that_fit_no_common_kernel_stay_two() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, (1, 3), 1, (0, 1)), nn.Conv2d(8, 8, (3, 1), 1, (1, 0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    model = nn.Sequential(conv_bn(3, 8), Crossed()).eval()
    fast = dc.compile(model, (torch.randn(1, *SIZE),), backend="eager")
    assert [step.kind for step in fast.plan.raw.steps].count("conv") == 2
    check(fast, model, torch.randn(3, *SIZE))
