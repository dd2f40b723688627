"""Layers with a kernel for each image through the compiler: the same values, and nothing through ATen."""

import pytest
import torch
from tests.convert.networks import randomise_norms
from tests.engine.networks import exact_convolutions, poisoned
from tests.engine.test_networks import check
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
    "odconv_one_kernel": lambda: dnn.ODConv2d(16, 40, 3, stride=2, padding=1),
    "odconv_1x1": lambda: dnn.ODConv2d(16, 16, 1, bias=False, num_kernels=3),
    "odconv_grouped": lambda: dnn.ODConv2d(16, 24, 3, padding=1, groups=4, num_kernels=2),
    "odconv_depthwise": lambda: dnn.ODConv2d(33, 33, 5, padding=2, groups=33, num_kernels=2),
    "dcd": lambda: dnn.DCDConv2d(16, 16, 3, padding=1),
    "dcd_wide": lambda: dnn.DCDConv2d(16, 40, 1, bias=False),
    "dcd_narrow": lambda: dnn.DCDConv2d(40, 8, 1),
    "dcd_strided": lambda: dnn.DCDConv2d(16, 24, 3, stride=2, padding=1, rule="resnet_basic"),
    "dcd_unpadded": lambda: dnn.DCDConv2d(16, 16, 5, padding=1, dilation=2, norm="none"),
    "dcd_grouped": lambda: dnn.DCDConv2d(16, 24, 3, padding=1, groups=2),
    "dcd_latent_one": lambda: dnn.DCDConv2d(16, 16, 1, latent_channels=1),
    "dynet": lambda: dnn.DyNetConv2d(16, 16, 3, padding=1),
    "dynet_two_layers": lambda: dnn.DyNetConv2d(16, 40, 1, hidden=5, group_size=1),
    "dynet_grouped": lambda: dnn.DyNetConv2d(16, 8, 3, padding=1, groups=2, bias=False),
    "dynet_depthwise": lambda: dnn.DyNetConv2d(40, 40, 3, stride=2, padding=1, groups=40),
    "weightnet": lambda: dnn.WeightNetConv2d(16, 12, 3, padding=1),
    "weightnet_rows": lambda: dnn.WeightNetConv2d(16, 16, 1, num_coefficients=8, num_blocks=4, bias=False),
    "weightnet_depthwise": lambda: dnn.WeightNetConv2d(33, 33, 3, padding=1, groups=33),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    return randomise_norms(Block(layer, layer.out_channels)).eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_equals_eager(name: str, backend: str, tmp_path) -> None:
    model = network(name)
    fast = dc.compile(model, (torch.randn(1, 3, 9, 8),), backend=backend, measure=False)
    assert fast.plan.aten == []
    kernel = "channel_fusion" if name.startswith("dcd") else "dynamic_conv"
    assert kernel in [row["kernel"].split()[0] for row in fast.plan.steps]
    for n in (1, 3, 8):
        x = 2 * torch.randn(n, 3, 9, 8)
        with torch.no_grad():
            expected = model(x)
        assert (fast(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    fast.verify((x,), tolerance=1e-5)
    again = dc.engine.load(fast.save(tmp_path / "model.plan"), backend=backend)
    assert torch.equal(again(x), fast(x))


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_reads_what_nobody_wrote(name: str) -> None:
    model, x = network(name), torch.randn(2, 3, 9, 8)
    with exact_convolutions():
        check(poisoned(model, x), model, x)


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


class Expansion(nn.Module):
    """Expansion and depthwise convolution, whose mean scales the result, and a projection."""

    def __init__(self, dynamic: bool, hidden: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.expand = dnn.DCDConv2d(24, hidden, 1, bias=False) if dynamic else nn.Conv2d(24, hidden, 1)
        self.norm = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden)
        self.project = nn.Conv2d(hidden, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.norm(self.expand(torch.relu(self.stem(x)))))).clamp(0, 6)
        return self.project(x * x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("hidden", "stride", "kernel"), [(144, 1, 3), (96, 2, 3), (70, 1, 5), (20, 2, 3)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_expansions_that_something_looks_at_before_they_are_projected(
    backend: str, hidden: int, stride: int, kernel: int, dynamic: bool, tmp_path
) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Expansion(dynamic, hidden, stride, kernel)).eval()
    fast = dc.compile(model, (torch.randn(1, 3, 15, 26),), backend=backend, measure=False)
    kinds = [step.kind for step in fast.plan.raw.steps]
    assert "inverted" in kinds and "depthwise" not in kinds and kinds.count("mean") == dynamic
    assert ("fusion_factors" in kinds) == dynamic
    for n in (1, 3, 8):
        x = torch.randn(n, 3, 15, 26)
        with torch.no_grad():
            expected = model(x)
        assert (fast(x) - expected).abs().max() <= 2e-5 * expected.abs().max()
    again = dc.engine.load(fast.save(tmp_path / "model.plan"), backend=backend)
    assert torch.equal(again(x), fast(x))
    with exact_convolutions():
        check(poisoned(model, x), model, x)


class Excitation(nn.Module):
    """A linear layer of all positions, times a gate of itself or not, and another one."""

    def __init__(self, gated: bool, size: tuple[int, int], hidden: int) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, hidden, size)
        self.gate = nn.Conv2d(hidden, hidden, 1, bias=False) if gated else None
        self.excite = nn.Conv2d(hidden, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        hidden = nn.functional.silu(
            self.squeeze(nn.functional.adaptive_avg_pool2d(x, self.squeeze.kernel_size))
        )
        if self.gate is not None:
            hidden = hidden * nn.functional.hardsigmoid(self.gate(hidden))
        return x * torch.sigmoid(self.excite(hidden))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "hidden"), [((1, 1), 5), ((2, 2), 33), ((1, 3), 40)])
@pytest.mark.parametrize("gated", [False, True])
def test_layers_behind_a_mean_are_one_step(
    backend: str, size: tuple[int, int], hidden: int, gated: bool, tmp_path
) -> None:
    torch.manual_seed(0)
    model = Excitation(gated, size, hidden).eval()
    fast = dc.compile(model, (torch.randn(1, 3, 9, 8),), backend=backend, measure=False)
    kinds = [step.kind for step in fast.plan.raw.steps]
    assert kinds.count("router") == 1 and kinds.count("conv") + kinds.count("stem") == 1
    for n in (1, 3, 17):
        x = torch.randn(n, 3, 9, 8)
        with torch.no_grad():
            expected = model(x)
        assert (fast(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = dc.engine.load(fast.save(tmp_path / "model.plan"), backend=backend)
    assert torch.equal(again(x), fast(x))
    with exact_convolutions():
        check(poisoned(model, x), model, x)


def test_routers_of_one_map_share_its_mean() -> None:
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), dnn.DYConv2d(8, 8, 3), dnn.DYConv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.a(x) + self.b(x) * nn.functional.adaptive_avg_pool2d(x, 2).sum((2, 3), keepdim=True)

    model, x = Branches().eval(), torch.randn(3, 3, 9, 8)
    fast = dc.compile(model, (x,), measure=False)
    sizes = [fast.plan.raw.values[s.out].size for s in fast.plan.raw.steps if s.kind == "mean"]
    assert sizes.count((1, 1)) == 1
    with torch.no_grad():
        expected = model(x)
    assert (fast(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
