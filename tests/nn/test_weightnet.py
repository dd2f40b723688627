"""WeightNet: the published construction, conversion, folding and costs."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.nn.weightnet import WeightNetConv1d, WeightNetConv2d, WeightNetConv3d, WeightNetRouter

LAYERS = {1: WeightNetConv1d, 2: WeightNetConv2d, 3: WeightNetConv3d}
STATIC = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    error = (got - want).detach().abs().max() / want.detach().abs().max()
    assert float(error) <= tolerance, f"relative deviation {float(error):.2e} > {tolerance:.0e}"


def published(layer: nn.Module, a: Tensor) -> Tensor:
    """The kernels as released: a 1x1 convolution of a with groups, reshaped to [O, I/g, k, k]."""
    groups = layer.out_channels * layer.row_blocks
    # Released weight [O * I/g * taps, M / G, 1, 1]; ours has the M / G axis first.
    weight = layer.weight.flatten(1).t()[:, :, None, None]
    made = F.conv2d(a[:, :, None, None], weight, groups=groups)
    return made.reshape(-1, *layer.weight.shape[1:])


GEOMETRIES = [
    # dims, I, O, k, stride, padding, dilation, groups, mode, size
    (2, 4, 6, 3, 1, 1, 1, 1, "zeros", (7, 5)),
    (2, 4, 6, 3, 2, 0, 2, 1, "zeros", (9, 8)),
    (2, 4, 6, 2, 1, "same", 1, 1, "zeros", (6, 7)),
    (2, 4, 6, 3, 1, "valid", 1, 2, "zeros", (6, 7)),
    (2, 4, 6, 3, 2, 1, 1, 1, "reflect", (9, 7)),
    (2, 4, 6, 1, 1, 0, 1, 1, "zeros", (1, 1)),
    (2, 4, 4, 3, 2, 1, 1, 4, "zeros", (5, 7)),
    (2, 4, 8, 3, 1, 1, 1, 4, "circular", (5, 7)),
    (1, 4, 6, 3, 2, 1, 1, 1, "zeros", (9,)),
    (3, 4, 6, 2, 1, 1, 1, 2, "zeros", (4, 3, 5)),
]


# An even kernel with padding "same" makes torch mention that it copies its input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
@pytest.mark.parametrize("coefficients", [2, 4])
def test_equals_the_published_construction(case: tuple, coefficients: int, seed: int) -> None:
    dims, i, o, k, stride, padding, dilation, groups, mode, size = case
    for bias, batch in itertools.product((True, False), (1, 3)):
        layer = LAYERS[dims](
            i, o, k, stride, padding, dilation, groups, bias, mode, dtype=torch.float64,
            num_coefficients=coefficients,
        )  # fmt: skip
        x = torch.randn(batch, i, *size, dtype=torch.float64)
        hidden = x.flatten(2).mean(2) @ layer.router.reduce.weight.t() + layer.router.reduce.bias
        a = torch.sigmoid(hidden @ layer.router.fc.weight.t() + layer.router.fc.bias)
        assert a.shape[1] == o * coefficients // (2 if groups == i else 1)
        static = STATIC[dims](i, o, k, stride, padding, dilation, groups, bias, mode, dtype=torch.float64)
        static.bias = layer.static_bias
        images = []
        for image, kernel in zip(x, published(layer, a), strict=True):
            static.weight = nn.Parameter(kernel)
            images.append(static(image[None]))
        close(layer(x), torch.cat(images), 1e-12)
        close(layer.kernels(layer.route(x))[0], published(layer, a), 1e-12)
        close(layer(x, routing=a), layer(x), 1e-12)


def test_equal_numbers_of_coefficients_and_blocks_scale_rows() -> None:
    torch.manual_seed(0)
    layer = WeightNetConv2d(4, 3, 3)
    a = torch.rand(2, 6)
    rows = layer.weight[0].reshape(3, 2, 2, 3, 3)
    want = a.reshape(2, 3, 2, 1, 1, 1) * rows
    close(layer.kernels(a)[0], want.reshape(2, 3, 4, 3, 3))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(groups: int, seed: int) -> None:
    layer = WeightNetConv2d(
        4, 4, 3, 2, 1, groups=groups, dtype=torch.float64, num_coefficients=4, min_channels=2
    )
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_(True) for p in layer.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("coefficients", [2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_conversion_is_exact(groups: int, coefficients: int, training: bool, seed: int) -> None:
    x = torch.randn(3, 8, 9, 7)
    for bias in (True, False):
        conv = nn.Conv2d(8, 8, 3, 2, 1, groups=groups, bias=bias).train(training)
        layer = WeightNetConv2d.from_conv(conv, num_coefficients=coefficients)
        close(layer(x), conv(x), 1e-4)
        back = layer.to_conv()
        assert list(back.state_dict()) == list(conv.state_dict()) and layer.training is training
        for name, value in conv.state_dict().items():
            close(back.state_dict()[name], value, 1e-5)
    # The router stands still at first where all experts are equal; noise gives each of them gradients of its own.
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    if coefficients == 4:
        gradients = layer.weight.grad
        assert float((gradients[0] - gradients[1]).abs().max()) > 1e-4 * float(gradients.abs().max())


@pytest.mark.parametrize("bias", [True, False])
def test_folding_norms_is_exact(bias: bool, seed: int) -> None:
    layer = WeightNetConv2d(4, 6, 3, 2, 1, bias=bias, dtype=torch.float64, num_coefficients=4).eval()
    norm = nn.BatchNorm2d(6, dtype=torch.float64).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 2)
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    want = norm(layer(x))
    layer.fold_norm_(norm)
    close(layer(x), want, 1e-12)


def test_block_router_serves_several_layers(seed: int) -> None:
    layers = [WeightNetConv2d(8, 6, 1, router=False), WeightNetConv2d(6, 6, 3, groups=6, router=False)]
    router = WeightNetRouter(8, [layer.routing_shape[0] for layer in layers])
    x = torch.randn(2, 8, 5, 5)
    first, second = router(x)
    assert (first.shape, second.shape) == ((2, 12), (2, 6))
    assert layers[1](layers[0](x, routing=first), routing=second).shape == (2, 6, 3, 3)
    assert router.macs == 8 * 16 + 16 * 18
    router.make_neutral_()
    close(router(x)[0], torch.full((2, 12), 0.5))


def test_macs_and_init(seed: int) -> None:
    layer = WeightNetConv2d(64, 128, 3, num_coefficients=4)
    weights = 64 * 128 * 9
    assert layer.macs(49) == (49 * weights, 2 * weights, 64 * 16 + 16 * 4 * 128)
    assert WeightNetConv2d(64, 64, 3, groups=64).macs(1) == (576, 576, 64 * 16 + 16 * 64)
    assert WeightNetConv2d(512, 8, 1).router.reduce.out_features == 32
    neutral = layer.to_conv().weight
    assert neutral.std().item() == pytest.approx(nn.Conv2d(64, 128, 3).weight.std().item(), rel=0.05)


def test_layouts_copies_and_precision(seed: int) -> None:
    layer = WeightNetConv2d(4, 6, 3, padding=1)
    x = torch.randn(3, 4, 6, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    y = copy.deepcopy(layer)(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.route(x).dtype == torch.float32
        close(layer(x).float(), y, 0.02)
    mask = (torch.rand(3, 1, 6, 5) < 0.5).float()
    other = torch.where(mask > 0, x, torch.randn_like(x))
    close(layer.route(other, mask), layer.route(x, mask), 1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_coefficients=3 must be divisible by num_blocks=2"):
        WeightNetConv2d(4, 4, 3, num_coefficients=3)
    with pytest.raises(ValueError, match="num_blocks=2 must divide the 27 weights.*num_blocks=1"):
        WeightNetConv2d(3, 4, 3)
    with pytest.raises(ValueError, match="num_coefficients"):
        WeightNetConv2d(4, 4, 3, num_coefficients=0)
    with pytest.raises(TypeError, match="WeightNetConv2d"):
        WeightNetConv2d.from_conv(nn.ConvTranspose2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"routing.*\[2, 8\].*got \[2, 7\]"):
        WeightNetConv2d(4, 4, 3)(torch.zeros(2, 4, 5, 5), routing=torch.zeros(2, 7))
    with pytest.raises(ValueError, match="'feature' cannot run"):
        WeightNetConv2d(4, 4, 3, execution="feature")(torch.zeros(2, 4, 5, 5))
