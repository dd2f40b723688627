"""CondConv, DY-Conv and DyNet: the formulas over every geometry, published numbers, conversion, folding."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from dynaconv.nn import (
    CondConv1d,
    CondConv2d,
    CondConv3d,
    CondLinear,
    DYConv1d,
    DYConv2d,
    DYConv3d,
    DyNetConv1d,
    DyNetConv2d,
    DyNetConv3d,
)
from dynaconv.nn.routers import ChannelRouter, SigmoidRouter, pool_active

FIXTURES = Path(__file__).parent.parent / "fixtures"
OUTPUTS, GRADIENTS = 1e-5, 5e-5
STATIC = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYERS = {
    "condconv": {1: CondConv1d, 2: CondConv2d, 3: CondConv3d},
    "dyconv": {1: DYConv1d, 2: DYConv2d, 3: DYConv3d},
    "dynet": {1: DyNetConv1d, 2: DyNetConv2d, 3: DyNetConv3d},
}
OPTIONS = {
    "condconv": {"num_experts": 3},
    "dyconv": {"num_kernels": 3, "temperature": 2.0, "reduction": 1.0},
    "dynet": {"group_size": 2},
}
METHODS = tuple(LAYERS)


def close(got: Tensor, want: Tensor, tolerance: float = OUTPUTS) -> None:
    assert got.shape == want.shape
    error = (got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1e-12)
    assert float(error) <= tolerance, f"relative deviation {float(error):.2e} > {tolerance:.0e}"


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic random, so that nothing is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and "temperature" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.5)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return module


def plain_routing(method: str, layer: nn.Module, x: Tensor) -> Tensor:
    """The predictor, written out."""
    pooled = x.mean(tuple(range(2, x.dim())))
    router = layer.router
    if method == "condconv":
        return 1 / (1 + torch.exp(-(pooled @ router.fc.weight.t() + router.fc.bias)))
    if method == "dyconv":
        hidden = (pooled @ router.fc1.weight.t() + router.fc1.bias).clamp(min=0)
        z = torch.exp((hidden @ router.fc2.weight.t() + router.fc2.bias) / 2.0)
        return z / z.sum(1, keepdim=True)
    if router.fc1 is not None:
        pooled = (pooled @ router.fc1.weight.t() + router.fc1.bias).clamp(min=0)
    eta = 1 / (1 + torch.exp(-(pooled @ router.fc.weight.t() + router.fc.bias)))
    return torch.stack([eta[:, t * 2 : t * 2 + 2] for t in range(layer.out_channels)], 1)


def plain_kernel(method: str, layer: nn.Module, a: Tensor) -> tuple[Tensor, Tensor | None]:
    """Kernel and bias of one image from its coefficients, expert by expert."""
    if method != "dynet":
        weight = sum(a[k] * layer.weight[k] for k in range(3))
        return weight, None if layer.bias is None else sum(a[k] * layer.bias[k] for k in range(3))
    rows = [sum(a[t, i] * layer.weight[t * 2 + i] for i in range(2)) for t in range(layer.out_channels)]
    if layer.bias is None:
        return torch.stack(rows), None
    biases = [sum(a[t, i] * layer.bias[t * 2 + i] for i in range(2)) for t in range(layer.out_channels)]
    return torch.stack(rows), torch.stack(biases)


def plain(method: str, layer: nn.Module, x: Tensor) -> Tensor:
    """Each image through PyTorch's own convolution, with its own kernel."""
    images = []
    for image, a in zip(x, plain_routing(method, layer, x), strict=True):
        weight, bias = plain_kernel(method, layer, a)
        static = STATIC[layer.dims](
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, bias is not None, layer.padding_mode, dtype=x.dtype,
        )  # fmt: skip
        static.weight = nn.Parameter(weight)
        if bias is not None:
            static.bias = nn.Parameter(bias)
        y = static(image[None])
        if layer.static_bias is not None:
            y = y + layer.static_bias.reshape(-1, *(1,) * layer.dims)
        images.append(y)
    return torch.cat(images)


GEOMETRIES = [
    # dims, I, O, k, stride, padding, dilation, groups, mode, size
    (2, 4, 6, 3, 1, 1, 1, 1, "zeros", (7, 5)),
    (2, 4, 6, 3, 2, 0, 2, 1, "zeros", (11, 9)),
    (2, 4, 6, 2, 1, "same", 1, 1, "zeros", (6, 7)),
    (2, 4, 6, 5, 1, "same", 2, 1, "reflect", (11, 10)),
    (2, 4, 6, 3, 1, "valid", 1, 2, "zeros", (6, 7)),
    (2, 4, 6, 3, 2, "valid", 1, 1, "zeros", (6, 7)),
    (2, 4, 6, (3, 1), (2, 1), (0, 2), (1, 3), 1, "zeros", (8, 5)),
    (2, 4, 6, 3, 2, 1, 1, 1, "reflect", (9, 7)),
    (2, 4, 6, 5, 1, 2, 1, 2, "circular", (7, 6)),
    (2, 4, 6, 3, 1, (2, 1), 2, 1, "replicate", (7, 6)),
    (2, 4, 6, 1, 1, 0, 1, 1, "zeros", (1, 1)),
    (2, 4, 6, 1, 2, 1, 1, 2, "zeros", (5, 4)),
    (2, 4, 4, 3, 2, 1, 1, 4, "zeros", (5, 7)),
    (2, 4, 8, 3, 1, 1, 1, 4, "circular", (5, 7)),
    (1, 4, 6, 3, 2, 1, 1, 1, "zeros", (9,)),
    (1, 4, 6, 4, 1, "same", 1, 2, "replicate", (9,)),
    (3, 4, 6, 3, 1, 1, 1, 1, "zeros", (4, 3, 5)),
    (3, 4, 4, 2, 2, 1, 1, 4, "circular", (4, 3, 5)),
]

# An even kernel with padding "same" makes torch mention that it copies its input.
even_same = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@even_same
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_formula(method: str, case: tuple, seed: int) -> None:
    dims, i, o, k, stride, padding, dilation, groups, mode, size = case
    for bias, batch in itertools.product((True, False), (1, 3)):
        layer = LAYERS[method][dims](
            i, o, k, stride, padding, dilation, groups, bias, mode, dtype=torch.float64, **OPTIONS[method]
        )
        shaken(layer)
        x = torch.randn(batch, i, *size, dtype=torch.float64)
        want = plain(method, layer, x)
        close(layer(x), want, 1e-12)
        with torch.no_grad():
            close(layer(x), want, 1e-12)
        routing = layer.route(x)
        assert tuple(routing.shape) == (batch, *layer.routing_shape)
        close(routing, plain_routing(method, layer, x), 1e-12)
        close(layer(x, routing=routing), want, 1e-12)
        kernels, biases = layer.kernels(routing)
        for image in range(batch):
            weight, mixed = plain_kernel(method, layer, routing[image])
            close(kernels[image], weight, 1e-12)
            assert (biases is None) is (mixed is None)
            if mixed is not None:
                close(biases[image], mixed, 1e-12)


def test_two_linear_layers_predict_for_dynet(seed: int) -> None:
    layer = shaken(DyNetConv2d(4, 6, 3, padding=1, group_size=2, hidden=5, dtype=torch.float64))
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    assert layer.router.fc1.out_features == 5
    close(layer(x), plain("dynet", layer, x), 1e-12)
    assert layer.router.macs == 4 * 5 + 5 * 12


def test_attention_of_dyconv_sums_to_one_and_sharpens(seed: int) -> None:
    layer = shaken(DYConv2d(8, 4, 1, num_kernels=4))
    assert (layer.router.fc1.out_features, layer.router.fc2.out_features) == (2, 4)
    x = torch.randn(5, 8, 3, 3)
    largest = []
    for temperature in (30.0, 3.0, 0.1):
        layer.router.temperature.fill_(temperature)
        routing = layer.route(x)
        close(routing.sum(1), torch.ones(5))
        largest.append(float(routing.detach().max(1).values.mean()))
    assert largest == sorted(largest) and largest[0] < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_executions_agree(method: str, seed: int) -> None:
    for kernel, groups in itertools.product((3, 1), (1, 2, 4)):
        layer = shaken(LAYERS[method][2](4, 8, kernel, 2, 1, groups=groups, **OPTIONS[method]))
        x, v = torch.randn(3, 4, 7, 5), torch.randn(3, 8, 4 if kernel == 3 else 5, 3 if kernel == 3 else 4)
        results = []
        for execution in ("auto", "grouped", "feature", "unfold", *(("bmm",) if kernel == 1 else ())):
            layer.execution = execution
            layer.zero_grad()
            y = layer(x)
            (y * v).sum().backward()
            results.append((y, {n: p.grad.clone() for n, p in layer.named_parameters()}))
        with torch.no_grad():
            layer.execution = "auto"
            for memory_format in (torch.contiguous_format, torch.channels_last):
                close(layer(x.contiguous(memory_format=memory_format)), results[0][0])
        for y, gradients in results[1:]:
            close(y, results[0][0])
            for name, gradient in gradients.items():
                close(gradient, results[0][1][name])


def test_parity_with_the_published_condconv() -> None:
    with safe_open(FIXTURES / "condconv_3x3.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        settings, cases = (json.loads(file.metadata()[k]) for k in ("settings", "cases"))
    layer = CondConv2d(
        settings["I"], settings["O"], settings["k"], settings["stride"], settings["padding"],
        num_experts=settings["K"], router=False,
    )  # fmt: skip
    # Published experts are flat, [K, O * I/g * kh * kw].
    close(tensors["param.W_flat"].reshape(layer.weight.shape), tensors["param.W"], 0)
    state = {"weight": tensors["param.W_flat"].reshape(layer.weight.shape), "bias": tensors["param.b"]}
    layer.load_state_dict(state)
    for case, execution in itertools.product(cases, ("auto", "grouped", "feature", "unfold")):
        layer.execution = execution
        x, routing = (tensors[f"{case}.{n}"].clone().requires_grad_(True) for n in "xr")
        y = layer(x, routing=routing)
        close(y, tensors[f"{case}.y"])
        with torch.no_grad():
            close(layer(x, routing=routing), tensors[f"{case}.y"])
        if f"{case}.v" not in tensors:
            continue
        layer.zero_grad()
        (tensors[f"{case}.v"] * y).sum().backward()
        close(x.grad, tensors[f"{case}.grad.x"], GRADIENTS)
        close(routing.grad, tensors[f"{case}.grad.r"], GRADIENTS)
        close(layer.weight.grad.flatten(1), tensors[f"{case}.grad.W_flat"], GRADIENTS)
        close(layer.bias.grad, tensors[f"{case}.grad.b"], GRADIENTS)


def converted(method: str, conv: nn.Module, **options) -> nn.Module:
    kind = next(d for d, c in STATIC.items() if isinstance(conv, c))
    return LAYERS[method][kind].from_conv(conv, **{**OPTIONS[method], **options})


@even_same
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_conversion_is_exact(method: str, case: tuple, seed: int) -> None:
    dims, i, o, k, stride, padding, dilation, groups, mode, size = case
    for bias, training in ((True, True), (False, False)):
        conv = STATIC[dims](i, o, k, stride, padding, dilation, groups, bias, mode).train(training)
        layer = converted(method, conv)
        x = torch.randn(3, i, *size)
        assert layer.training is training and (layer.bias is not None) is bias
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(layer, name) == getattr(conv, name), name
        assert layer.padding_mode == mode
        close(layer(x), conv(x))
        with torch.no_grad():
            close(layer(10 * x - 3), conv(10 * x - 3))
        back = layer.to_conv()
        assert type(back) is type(conv) and back.training is training
        assert list(back.state_dict()) == list(conv.state_dict()) and repr(back) == repr(conv)
        for name, value in conv.state_dict().items():
            close(back.state_dict()[name], value, 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("experts", [1, 2, 6])
def test_conversion_is_exact_for_any_number_of_experts(method: str, experts: int, seed: int) -> None:
    conv = nn.Conv2d(4, 6, 3, dtype=torch.float64)
    layer = converted(
        method, conv, **dict.fromkeys(OPTIONS[method].keys() - {"temperature", "reduction"}, experts)
    )
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert (
        layer.weight.dtype
        == layer.router.state_dict()[next(iter(dict(layer.router.named_parameters())))].dtype
    )
    close(layer(x), conv(x), 1e-12)
    assert converted(method, conv, router=False).router is None


def separations(method: str, layer: nn.Module) -> list[float]:
    """Distances between experts, relative to their size."""
    experts = layer.experts().detach()
    return [
        float((experts[a] - experts[b]).norm() / experts[a].norm())
        for a, b in itertools.combinations(range(experts.shape[0]), 2)
    ]


def descend(layer: nn.Module, steps: int = 20) -> None:
    generator = torch.Generator().manual_seed(3)
    x, target = (torch.randn(4, c, 6, 6, generator=generator) for c in (4, 6))
    optimizer = torch.optim.SGD(layer.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_training_separates_converted_experts(method: str, seed: int) -> None:
    layer = converted(method, nn.Conv2d(4, 6, 3, padding=1))
    before, weight = separations(method, layer), layer.weight.detach().clone()
    descend(layer)
    after = separations(method, layer)
    assert not torch.equal(layer.weight, weight)
    assert min(after) > (0.01 if method == "dyconv" else 0.05)
    assert [round(a, 4) for a in after] != [round(b, 4) for b in before]
    rows = (layer.router.fc2 if method == "dyconv" else layer.router.fc).weight.detach()
    assert all(
        float((rows[a] - rows[b]).abs().max()) > 1e-4 for a, b in itertools.combinations(range(len(rows)), 2)
    )


@pytest.mark.parametrize("method", ["condconv", "dynet"])
def test_without_noise_experts_would_stay_equal_for_ever(method: str, seed: int) -> None:
    layer = converted(method, nn.Conv2d(4, 6, 3, padding=1), noise=0.0)
    descend(layer)
    assert max(separations(method, layer)) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 64])
def test_every_expert_is_initialised_as_a_convolution(method: str, groups: int) -> None:
    """Not by the fan of the stack of experts, which would make them many times too small."""
    torch.manual_seed(0)
    layer = LAYERS[method][2](64, 64, 3, groups=groups, **OPTIONS[method])
    bound = 1 / math.sqrt(64 // groups * 9)
    for tensors in (layer.experts(), layer.expert_biases()):
        for expert in tensors.detach():
            assert float(expert.abs().max()) <= bound
            assert expert.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)
    assert min(separations(method, layer)) > 1
    fresh = converted(method, nn.Conv2d(64, 64, 3, groups=groups), init="fresh")
    for expert in fresh.experts().detach():
        assert expert.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case", [GEOMETRIES[0], GEOMETRIES[6], GEOMETRIES[12], GEOMETRIES[14], GEOMETRIES[16]], ids=str
)
def test_folding_a_norm_is_exact(method: str, case: tuple, seed: int) -> None:
    dims, i, o, k, stride, padding, dilation, groups, mode, size = case
    norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    x = torch.randn(3, i, *size, dtype=torch.float64)
    for bias, options in ((True, {}), (False, {}), (True, {"affine": False})):
        layer = LAYERS[method][dims](
            i, o, k, stride, padding, dilation, groups, bias, mode, dtype=torch.float64, **OPTIONS[method]
        )
        norm = shaken(norms[dims](o, dtype=torch.float64, **options), seed=1).eval()
        want = norm(shaken(layer)(x))
        layer.fold_norm_(norm)
        close(layer(x), want, 1e-12)
        close(layer(x), plain(method, layer, x), 1e-12)
        again = norm(want)
        layer.fold_norm_(norm)
        close(layer(x), again, 1e-12)
        kernels, shifts = layer.kernels(layer.route(x))
        assert kernels.shape[:2] == shifts.shape == (3, o)
        # Both folds are in the static convolution of neutral coefficients too.
        neutral = torch.full(
            (1, *layer.routing_shape), 1 / 3 if method == "dyconv" else 0.5, dtype=torch.float64
        )
        close(layer.to_conv()(x[:1]), layer(x[:1], routing=neutral), 1e-12)
    with pytest.raises(
        TypeError, match="only a batch norm with running statistics folds .* got InstanceNorm2d"
    ):
        DYConv2d(4, 4, 1).fold_norm_(nn.InstanceNorm2d(4))


def test_macs() -> None:
    weights = 64 * 128 * 9
    assert CondConv2d(64, 128, 3, num_experts=8).macs(49) == (weights * 49, 8 * weights, 64 * 8)
    assert DYConv2d(64, 128, 3).macs(49) == (weights * 49, 4 * weights, 64 * 16 + 16 * 4)
    assert DyNetConv2d(64, 128, 3).macs(49) == (weights * 49, 6 * weights, 64 * 128 * 6)
    assert DyNetConv2d(64, 128, 3, hidden=16).macs(1).routing == 64 * 16 + 16 * 128 * 6
    assert DYConv2d(64, 64, 3, groups=64).macs(10) == (64 * 9 * 10, 4 * 64 * 9, 64 * 16 + 16 * 4)
    assert CondConv1d(8, 4, 5, router=False).macs(3) == (8 * 4 * 5 * 3, 8 * 8 * 4 * 5, 0)
    assert CondConv2d(64, 128, 3).macs(2).total == weights * 10 + 64 * 8
    assert CondLinear(512, 1000, num_experts=8).macs() == (512_000, 8 * 512_000, 512 * 8)


@pytest.mark.parametrize("method", METHODS)
def test_one_router_serves_several_layers(method: str, seed: int) -> None:
    options = {**OPTIONS[method], "router": False}
    first = shaken(LAYERS[method][2](4, 6, 3, padding=1, **options))
    second = shaken(LAYERS[method][2](6, 4, 1, **options))
    assert all("router" not in name for name, _ in (*first.named_parameters(), *second.named_parameters()))
    x = torch.randn(3, 4, 5, 5)
    if method == "dynet":
        routings = shaken(ChannelRouter(4, [6, 4], 2))(x)
        assert [tuple(r.shape) for r in routings] == [(3, 6, 2), (3, 4, 2)]
    else:
        routings = (shaken(SigmoidRouter(4, 3))(x),) * 2
    y = second(first(x, routing=routings[0]), routing=routings[1])
    y.sum().backward()
    hidden = first(x, routing=routings[0])
    for image in range(3):
        one = second(hidden[image : image + 1], routing=routings[1][image : image + 1])
        close(one, y[image : image + 1])
    for layer in (first, second):
        with pytest.raises(
            ValueError, match=f"this {type(layer).__name__} has no router of its own; pass routing="
        ):
            layer(torch.zeros(2, layer.in_channels, 5, 5))


def test_masked_routing_reads_open_positions_only(seed: int) -> None:
    x, mask = torch.randn(2, 4, 5, 7), (torch.rand(2, 1, 5, 7) < 0.5).float()
    other = torch.where(mask > 0, x, torch.randn_like(x))
    for method in METHODS:
        layer = shaken(LAYERS[method][2](4, 6, 3, **OPTIONS[method]))
        close(layer.route(other, mask), layer.route(x, mask), 1e-6)
        close(layer.route(x, torch.ones_like(mask)), layer.route(x), 1e-6)
        assert bool(layer.route(x, torch.zeros_like(mask)).isfinite().all())
    close(pool_active(x, mask)[0], x[0][:, mask[0, 0] > 0].mean(1), 1e-6)
    assert not bool(pool_active(x, torch.zeros_like(mask)).any())


def test_dynamic_classifier(seed: int) -> None:
    layer = shaken(CondLinear(6, 5, True, num_experts=3, static_bias=True, dtype=torch.float64))
    x = torch.randn(4, 6, dtype=torch.float64)
    r = torch.sigmoid(x @ layer.router.fc.weight.t() + layer.router.fc.bias)
    want = torch.stack([
        sum(r[b, k] * (layer.weight[k] @ x[b] + layer.bias[k]) for k in range(3)) + layer.static_bias
        for b in range(4)
    ])  # fmt: skip
    close(layer(x), want, 1e-12)
    close(layer(x, routing=r), want, 1e-12)
    close(layer(x[:1]), want[:1], 1e-12)
    neutral = torch.full((4, 3), 0.5, dtype=torch.float64)
    close(layer.to_linear()(x), layer(x, routing=neutral), 1e-12)
    assert not any("bias" in n and "router" not in n for n, _ in CondLinear(6, 5).named_parameters())
    with pytest.raises(
        ValueError, match=r"CondLinear expects x \[B, 6\], got \[4, 6, 1, 1\]; pool and flatten"
    ):
        layer(x[:, :, None, None])
    with pytest.raises(ValueError, match=r"CondLinear: routing must be \[4, 3\] .*got \[4, 2\]"):
        layer(x, routing=r[:, :2])
    with pytest.raises(ValueError, match="num_experts must be a whole number >= 1, got 0"):
        CondLinear(6, 5, num_experts=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_converted_classifier_is_exact_and_separates(bias: bool, seed: int) -> None:
    linear = nn.Linear(12, 7, bias).eval()
    layer = CondLinear.from_linear(linear, num_experts=4)
    x, target = torch.randn(5, 12), torch.randn(5, 7)
    assert not layer.training and (layer.static_bias is not None) is bias and layer.bias is None
    close(layer(x), linear(x))
    back = layer.to_linear()
    assert list(back.state_dict()) == list(linear.state_dict()) and not back.training
    for name, value in linear.state_dict().items():
        close(back.state_dict()[name], value, 1e-6)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    for _ in range(10):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    rows = layer.router.fc.weight.detach()
    assert all(float((rows[a] - rows[b]).abs().max()) > 1e-4 for a, b in itertools.combinations(range(4), 2))
    fresh = CondLinear.from_linear(linear, init="fresh")
    assert fresh.static_bias is None and fresh.bias is None
    assert fresh.weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_trains_on_one_image_of_one_position(method: str, seed: int) -> None:
    layer = LAYERS[method][2](4, 6, 1, **OPTIONS[method]).train()
    layer(torch.randn(1, 4, 1, 1)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
