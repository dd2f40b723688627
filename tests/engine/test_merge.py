"""Convolutions of one map that are added become one, where that multiplies no more."""

from __future__ import annotations

import pytest
import torch
from tests.convert.networks import randomise_norms
from tests.engine.networks import SIZE, conv_bn
from tests.engine.test_networks import BACKENDS, check
from torch import nn

import dynaconv as dc


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
