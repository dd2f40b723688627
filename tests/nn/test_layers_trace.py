"""DCD, ODConv and WeightNet under torch.compile (one graph, any batch size) and torch.export (dynamic batch)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from dynaconv.nn.dcd import DCDConv2d, DCDLinear
from dynaconv.nn.odconv import ODConv2d
from dynaconv.nn.weightnet import WeightNetConv2d

LAYERS = {
    "dcd 3x3 factored": lambda: DCDConv2d(8, 8, 3, 2, 1, form="factored"),
    "dcd 3x3 folded": lambda: DCDConv2d(8, 8, 3, 2, 1, form="folded"),
    "dcd 1x1 folded": lambda: DCDConv2d(8, 8, 1, form="folded", rule="resnet_bottleneck"),
    "dcd depthwise": lambda: DCDConv2d(8, 8, 3, 2, 1, groups=8),
    "dcd classifier": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), DCDLinear(8, 5)),
    "odconv 3x3": lambda: ODConv2d(8, 8, 3, padding="same", num_kernels=4),
    "odconv 3x3, one kernel": lambda: ODConv2d(8, 8, 3, 2, 1, padding_mode="reflect"),
    "odconv 1x1, one kernel": lambda: ODConv2d(8, 8, 1),
    "odconv depthwise": lambda: ODConv2d(8, 8, 3, padding=1, groups=8, num_kernels=2),
    "weightnet 3x3": lambda: WeightNetConv2d(8, 8, 3, padding=1),
    "weightnet depthwise": lambda: WeightNetConv2d(8, 8, 3, padding=1, groups=8),
}


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= 5e-5 * float(want.detach().abs().max())


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


COMPILED = [
    ("dcd 3x3 factored", True),
    ("dcd 1x1 folded", False),
    ("odconv 3x3", True),
    ("odconv 1x1, one kernel", False),
    ("weightnet depthwise", True),
]


@pytest.mark.parametrize(("name", "training"), COMPILED)
def test_compiles_once_for_all_batch_sizes(name: str, training: bool, seed: int) -> None:
    layer = LAYERS[name]().train(training)
    eager, counter = copy.deepcopy(layer), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts: list[int] = []
    for batch in (3, 8):
        x = torch.randn(batch, 8, 9, 7)
        got, want = compiled(x), eager(x)
        close(got, want)
        if training:
            got.square().sum().backward()
            want.square().sum().backward()
            for mine, other in zip(layer.parameters(), eager.parameters(), strict=True):
                close(mine.grad, other.grad)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_exports_with_dynamic_batch(name: str, seed: int) -> None:
    layer = LAYERS[name]().eval()
    program = torch.export.export(layer, (torch.randn(3, 8, 9, 7),), dynamic_shapes=({0: Dim.DYNAMIC},))
    for batch in (1, 2, 8):
        x = torch.randn(batch, 8, 9, 7)
        close(program.module()(x), layer(x))
