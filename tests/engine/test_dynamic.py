"""Networks with a kernel for each image through the compiler: the same values, no ATen where coefficients are a row."""

import pytest
import torch
from torch import Tensor, nn

import dynaconv as dc
import dynaconv.nn as dnn
from dynaconv.engine import runtime

BACKENDS = ["eager", *([] if runtime.missing() else ["cpu"])]


class Block(nn.Module):
    """A residual block around a dynamic layer, batch norm behind it."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, layer.in_channels, 3, padding=1)
        self.layer, self.norm = layer, nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.layer(x))
        return torch.relu(y + x if y.shape == x.shape else y)


LAYERS = {
    "dyconv": lambda: dnn.DYConv2d(16, 16, 3, padding=1, num_kernels=4, bias=True),
    "dyconv_wide": lambda: dnn.DYConv2d(8, 40, 3, stride=2, padding=1, num_kernels=3),
    "dyconv_1x1": lambda: dnn.DYConv2d(24, 33, 1, num_kernels=4),
    "dyconv_grouped": lambda: dnn.DYConv2d(8, 12, 3, padding=1, groups=4, num_kernels=4),
    "dyconv_depthwise": lambda: dnn.DYConv2d(40, 40, 3, padding=1, groups=40, num_kernels=4),
    "dyconv_dilated": lambda: dnn.DYConv2d(8, 8, 3, padding=2, dilation=2, num_kernels=2),
    "condconv": lambda: dnn.CondConv2d(16, 16, 3, padding=1, num_experts=8),
    "odconv": lambda: dnn.ODConv2d(16, 16, 3, padding=1, num_kernels=4),
    "dcd": lambda: dnn.DCDConv2d(16, 16, 3, padding=1),
    "dynet": lambda: dnn.DyNetConv2d(16, 16, 3, padding=1),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    block = Block(layer, layer.out_channels).eval()
    nn.init.uniform_(block.norm.running_mean, -1, 1)
    nn.init.uniform_(block.norm.running_var, 0.5, 2)
    return block


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_equals_eager(name: str, backend: str, tmp_path) -> None:
    model = network(name)
    fast = dc.compile(model, (torch.randn(1, 3, 9, 8),), backend=backend, measure=False)
    for n in (1, 3):
        x = 2 * torch.randn(n, 3, 9, 8)
        with torch.no_grad():
            expected = model(x)
        assert (fast(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    fast.verify((x,))
    again = dc.engine.load(fast.save(tmp_path / "model.plan"), backend=backend)
    assert torch.equal(again(x), fast(x))


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("dyconv")])
def test_rows_of_coefficients_need_no_aten(name: str) -> None:
    fast = dc.compile(network(name), (torch.randn(1, 3, 9, 8),), backend="eager", measure=False)
    assert fast.plan.aten == [] and "dynamic_conv" in str(fast.plan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_kernels_meet(backend: str) -> None:
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(model, (dc.SpatialMasking(), dc.DYConv(num_kernels=2, scope="all")), input_size=(3, 32, 32))
    model.eval()
    x = torch.randn(3, 3, 32, 32)
    fast = dc.compile(model, (x,), backend=backend, measure=False)
    with dc.testing.force_masks(model, 0.4), torch.no_grad():
        expected = model(x)
        assert (fast(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_fused_network_stays_in_evaluation_mode() -> None:
    model = dc.create_model("dyconv4_resnet18", num_classes=5).eval()
    dc.fuse_(model)
    assert not any(module.training for module in model.modules())
