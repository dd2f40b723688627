"""ODConv: the published numbers, the formula over every geometry, batch 1, conversion, folding and costs."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from dynaconv.nn.odconv import ODConv1d, ODConv2d, ODConv3d
from dynaconv.nn.temperature import set_temperature

FIXTURES = Path(__file__).parent.parent / "fixtures"
LAYERS = {1: ODConv1d, 2: ODConv2d, 3: ODConv3d}
STATIC = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
HEADS = {"alpha_c": "channel", "alpha_f": "filter", "alpha_s": "spatial", "alpha_w": "kernel"}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    error = (got - want).detach().abs().max() / want.detach().abs().max()
    assert float(error) <= tolerance, f"relative deviation {float(error):.2e} > {tolerance:.0e}"


def shaken(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic random, so that nothing is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point() and "temperature" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.5)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return layer


def read(name: str) -> tuple[dict[str, Tensor], dict, dict]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["settings"]), json.loads(file.metadata()["cases"])


def own(term: str, value: Tensor) -> tuple[str, Tensor]:
    """Our name and shape of a term of the reference page."""
    if term == "W":
        return "weight", value
    name = term.replace("trunk.BN", "norm").replace("trunk.weight", "trunk.weight")
    for head, part in HEADS.items():
        name = name.replace(head, part)
    return f"router.{name}", value.flatten(1) if value.dim() == 4 else value


FILES = ("odconv_3x3_k4", "odconv_1x1_k1")


@pytest.mark.parametrize(("name", "case"), [(n, c) for n in FILES for c in read(n)[2]])
def test_published_numbers(name: str, case: str) -> None:
    tensors, settings, cases = read(name)
    layer = ODConv2d(
        settings["I"], settings["O"], settings["k"], padding=settings["padding"], bias=False,
        num_kernels=settings["K"], reduction=settings["reduction"], min_channels=settings["min_channels"],
    )  # fmt: skip
    assert layer.router.trunk.out_features == settings["A"]
    loaded = dict(own(k[6:], v) for k, v in tensors.items() if k.startswith("param."))
    result = layer.load_state_dict(loaded, strict=False)
    assert set(result.missing_keys) <= {"router.temperature", "router.norm.num_batches_tracked"}
    assert not result.unexpected_keys
    layer.eval()
    set_temperature(layer, cases[case]["tau"])
    x = tensors[f"{case}.x"]
    close(layer(x), tensors[f"{case}.y"])
    routing = layer.route(x)
    for head, part in HEADS.items():
        got = getattr(layer.split(routing), part)
        assert (got is None) == (f"{case}.{head}" not in tensors)
        if got is not None:
            close(got, tensors[f"{case}.{head}"])
    kernels, _ = layer.kernels(routing)
    images = [F.conv2d(i[None], k, padding=settings["padding"]) for i, k in zip(x, kernels, strict=True)]
    close(torch.cat(images), tensors[f"{case}.y"])


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    """sum over k of alpha_w,k * alpha_f * alpha_c * alpha_s * W_k, as one static convolution an image."""
    router, tau, dims = layer.router, float(layer.router.temperature), layer.dims
    h = x.flatten(2).mean(2) @ router.trunk.weight.t()
    if isinstance(router.norm, nn.LayerNorm):
        h = F.layer_norm(h, h.shape[1:], router.norm.weight, router.norm.bias)
    elif not isinstance(router.norm, nn.Identity):
        norm = router.norm
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        use_batch = layer.training and x.shape[0] > 1
        h = F.batch_norm(h, mean, var, norm.weight, norm.bias, use_batch)
    h = h.relu()

    def head(linear: nn.Linear | None, width: int) -> Tensor:
        if linear is None:
            return torch.ones(x.shape[0], width, dtype=x.dtype)
        return torch.sigmoid((h @ linear.weight.t() + linear.bias) / tau)

    outputs, inputs = layer.out_channels, layer.in_channels
    a_c, a_f = head(router.channel, inputs), head(router.filter, outputs)
    a_s = head(router.spatial, math.prod(layer.kernel_size)).reshape(-1, *layer.kernel_size)
    a_w = torch.ones(x.shape[0], 1, dtype=x.dtype)
    if router.kernel is not None:
        a_w = torch.softmax((h @ router.kernel.weight.t() + router.kernel.bias) / tau, dim=1)
    static = STATIC[dims](
        inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
        layer.static_bias is not None, layer.padding_mode, dtype=x.dtype,
    )  # fmt: skip
    images = []
    for b in range(x.shape[0]):
        weight = torch.zeros_like(layer.weight[0])
        for o, i in itertools.product(range(outputs), range(inputs // layer.groups)):
            channel = o // (outputs // layer.groups) * (inputs // layer.groups) + i
            mixed = sum(a_w[b, k] * layer.weight[k, o, i] for k in range(layer.num_kernels))
            weight[o, i] = a_f[b, o] * a_c[b, channel] * a_s[b] * mixed
        static.weight = nn.Parameter(weight.detach())
        if layer.static_bias is not None:
            static.bias = layer.static_bias
        images.append(static(x[b : b + 1]))
    return torch.cat(images)


GEOMETRIES = [
    # dims, I, O, k, stride, padding, dilation, groups, mode, size
    (2, 4, 6, 3, 1, 1, 1, 1, "zeros", (7, 5)),
    (2, 4, 6, 3, 2, 0, 2, 1, "zeros", (9, 8)),
    (2, 4, 6, 2, 1, "same", 1, 1, "zeros", (6, 7)),
    (2, 4, 6, 3, 1, "valid", 1, 2, "zeros", (6, 7)),
    (2, 4, 6, (3, 1), (2, 1), (0, 2), 1, 1, "zeros", (8, 5)),
    (2, 4, 6, 3, 2, 1, 1, 1, "reflect", (9, 7)),
    (2, 4, 6, 5, 1, "same", 1, 2, "circular", (7, 6)),
    (2, 4, 6, 3, 1, (2, 1), 2, 1, "replicate", (7, 6)),
    (2, 4, 6, 1, 1, 0, 1, 1, "zeros", (1, 1)),
    (2, 4, 6, 1, 2, 1, 1, 2, "zeros", (5, 4)),
    (2, 4, 4, 3, 2, 1, 1, 4, "zeros", (5, 7)),
    (2, 4, 8, 3, 1, 1, 1, 4, "reflect", (5, 7)),
    (2, 4, 4, 1, 1, 0, 1, 4, "zeros", (3, 3)),
    (1, 4, 6, 3, 2, 1, 1, 1, "zeros", (9,)),
    (3, 4, 6, 3, 1, 1, 1, 1, "zeros", (4, 3, 5)),
    (3, 4, 4, 2, 2, 1, 1, 4, "circular", (4, 3, 5)),
]


# An even kernel with padding "same" makes torch mention that it copies its input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kernels", [1, 3])
def test_equals_the_formula(case: tuple, kernels: int, seed: int) -> None:
    dims, i, o, k, stride, padding, dilation, groups, mode, size = case
    for (bias, norm), batch in itertools.product(((True, "batch"), (False, "layer"), (True, "none")), (1, 3)):
        layer = LAYERS[dims](
            i, o, k, stride, padding, dilation, groups, bias, mode, dtype=torch.float64, num_kernels=kernels,
            norm=norm, temperature=2.5,
        )  # fmt: skip
        x = torch.randn(batch, i, *size, dtype=torch.float64)
        for training in (False, True):
            shaken(layer).train(training)
            close(layer(x), plain(copy.deepcopy(layer), x), 1e-12)


@pytest.mark.parametrize(
    ("groups", "outputs", "kernel", "kernels", "sizes"),
    [
        (1, 6, 3, 4, (4, 6, 9, 4)),
        (1, 6, 1, 4, (4, 6, 0, 4)),
        (1, 6, 3, 1, (4, 6, 9, 0)),
        (4, 4, 3, 1, (4, 0, 9, 0)),
        (4, 8, 3, 1, (4, 8, 9, 0)),
        (4, 4, 1, 2, (4, 0, 0, 2)),
    ],
)
def test_absent_parts(groups: int, outputs: int, kernel: int, kernels: int, sizes: tuple) -> None:
    layer = ODConv2d(4, outputs, kernel, groups=groups, num_kernels=kernels)
    assert layer.sizes == sizes
    routing = layer.route(torch.randn(3, 4, 5, 5))
    assert routing.shape == (3, sum(sizes)) == (3, *layer.routing_shape)
    for part, width in zip(layer.split(routing), sizes, strict=True):
        assert (part is None) if width == 0 else (part.shape == (3, width))
    if kernels > 1:
        close(layer.split(routing).kernel.sum(1), torch.ones(3))


def test_training_at_batch_1_uses_running_statistics(seed: int) -> None:
    x = torch.randn(1, 4, 5, 5)
    for norm in ("batch", "layer", "none"):
        layer = shaken(ODConv2d(4, 6, 3, num_kernels=2, norm=norm)).train()
        before = copy.deepcopy(layer.state_dict())
        y = layer(x)
        y.sum().backward()
        close(y, copy.deepcopy(layer).eval()(x))
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        assert all(p.grad is not None for p in layer.parameters())
    layer = ODConv2d(4, 6, 3).train()
    layer(torch.randn(2, 4, 5, 5))
    assert int(layer.router.norm.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("kernel", "kernels", "groups"), [(3, 2, 1), (3, 1, 1), (1, 2, 2), (1, 1, 1), (3, 1, 4)]
)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(kernel: int, kernels: int, groups: int, training: bool, seed: int) -> None:
    layer = ODConv2d(
        4, 4, kernel, 2, kernel // 2, groups=groups, dtype=torch.float64, num_kernels=kernels, min_channels=3
    )
    layer = shaken(layer).train(training)
    # A bias keeps the trunk's ReLU away from its corner.
    layer.router.norm.bias.data += 2
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_(True) for p in layer.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


CONVERSIONS = [(1, 3, 8), (1, 1, 8), (2, 3, 12), (8, 3, 8), (8, 1, 8), (8, 3, 16)]


@pytest.mark.parametrize(("groups", "kernel", "outputs"), CONVERSIONS)
@pytest.mark.parametrize("kernels", [1, 4])
@pytest.mark.parametrize("training", [True, False])
def test_conversion_is_exact(
    groups: int, kernel: int, outputs: int, kernels: int, training: bool, seed: int
) -> None:
    x = torch.randn(3, 8, 9, 7)
    for bias, temperature in ((True, 1.0), (False, 30.0)):
        conv = nn.Conv2d(8, outputs, kernel, 2, kernel // 2, groups=groups, bias=bias).train(training)
        layer = ODConv2d.from_conv(conv, num_kernels=kernels, temperature=temperature)
        assert layer.training is training and float(layer.router.temperature) == temperature
        close(layer(x), conv(x), 1e-4)
        back = layer.to_conv()
        assert list(back.state_dict()) == list(conv.state_dict())
        for name, value in conv.state_dict().items():
            close(back.state_dict()[name], value, 1e-6)


def test_training_separates_converted_kernels(seed: int) -> None:
    layer = ODConv2d.from_conv(nn.Conv2d(4, 6, 3, padding=1), num_kernels=3)
    x, target = torch.randn(4, 4, 5, 5), torch.randn(4, 6, 5, 5)
    (layer(x) - target).square().mean().backward()
    gradients = layer.weight.grad
    for a, b in itertools.combinations(range(3), 2):
        assert float((gradients[a] - gradients[b]).abs().max()) > 1e-3 * float(gradients.abs().max())
    fresh = ODConv2d.from_conv(nn.Conv2d(64, 32, 3), num_kernels=2, init="fresh")
    assert fresh.weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize(("groups", "kernel", "bias"), [(1, 3, True), (4, 3, False), (2, 1, True)])
def test_folding_norms_is_exact(norm: str, groups: int, kernel: int, bias: bool, seed: int) -> None:
    layer = ODConv2d(
        4, 4, kernel, 2, 1, groups=groups, bias=bias, norm=norm, num_kernels=2, dtype=torch.float64
    )
    after = shaken(nn.BatchNorm2d(4, dtype=torch.float64), seed=1).eval()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    want = after(shaken(layer).eval()(x))
    layer.fold_norm_(after)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in layer.modules())
    close(layer(x), want, 1e-12)
    kernels, shift = layer.kernels(layer.route(x))
    images = zip(x, kernels, shift, strict=True)
    close(torch.cat([F.conv2d(i[None], k, b, 2, 1, 1, groups) for i, k, b in images]), want, 1e-12)


@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), (1, 1), (3, 4), (1, 2)])
@pytest.mark.parametrize("kernels", [1, 2])
def test_executions_agree(kernel: int, groups: int, kernels: int, seed: int) -> None:
    layer = shaken(ODConv2d(4, 4, kernel, padding=kernel // 2, groups=groups, num_kernels=kernels))
    x = torch.randn(3, 4, 6, 5)
    want = plain(layer.eval(), x)
    for execution in ("grouped", "unfold", *(("bmm", "feature") if kernel == 1 else ())):
        layer.execution = execution
        close(layer(x), want)
    if kernel > 1:
        layer.execution = "feature"
        with pytest.raises(ValueError, match=r"'feature' cannot run.*taps"):
            layer(x)


def test_macs() -> None:
    layer = ODConv2d(64, 128, 3, num_kernels=4)
    weights, hidden = 64 * 128 * 9, 16
    routing = 64 * hidden + hidden * (64 + 128 + 9 + 4)
    assert layer.macs(49) == (weights * 49, 4 * weights, routing)
    assert ODConv2d(64, 128, 3).macs(49).mixing == weights
    assert ODConv2d(64, 128, 1).macs(49).mixing == 0
    assert ODConv2d(64, 128, 1, num_kernels=2).macs(1).mixing == 2 * 64 * 128
    depthwise = ODConv2d(64, 64, 3, groups=64)
    assert depthwise.macs(10) == (64 * 9 * 10, 64 * 9, 64 * 16 + 16 * (64 + 9))
    assert ODConv2d(64, 64, 3, router=False).macs(1).routing == 0


def test_resnet18_numbers() -> None:
    """Main-path convolutions of ODConv(1x) ResNet-18: the reference table's parameters, mixing and routing."""
    convs = [(64, 64)] * 4
    for width in (128, 256, 512):
        convs += [(width // 2, width)] + [(width, width)] * 3
    layers = [ODConv2d(i, o, 3, bias=False, device="meta") for i, o in convs]
    costs = [layer.macs(1) for layer in layers]
    assert sum(c.mixing for c in costs) == 10_985_472 and sum(c.routing for c in costs) == 246_448
    dynamic = sum(p.numel() for layer in layers for p in layer.parameters())
    assert 11_689_512 - sum(i * o * 9 for i, o in convs) + dynamic == 11_943_944


def test_masked_routing_reads_open_positions_only(seed: int) -> None:
    layer = shaken(ODConv2d(4, 6, 3, num_kernels=2)).eval()
    x, mask = torch.randn(2, 4, 5, 7), (torch.rand(2, 1, 5, 7) < 0.5).float()
    other = torch.where(mask > 0, x, torch.randn_like(x))
    close(layer.route(other, mask), layer.route(x, mask), 1e-6)
    close(layer.route(x, torch.ones_like(mask)), layer.route(x), 1e-6)
    assert bool(layer.route(x, torch.zeros_like(mask)).isfinite().all())


def test_layouts_copies_precision_and_temperature(seed: int) -> None:
    layer = shaken(ODConv2d(4, 6, 3, padding=1, num_kernels=2))
    x = torch.randn(3, 4, 6, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        y = copy.deepcopy(layer.train(training))(last)
        assert y.is_contiguous(memory_format=torch.channels_last)
        close(y, copy.deepcopy(layer)(x))
    one = shaken(ODConv2d(4, 6, 1)).eval()
    assert one(last).is_contiguous(memory_format=torch.channels_last)
    routing, want = layer.route(x), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.route(x).dtype == torch.float32
        close(layer.route(x), routing, 1e-6)
        assert layer(x).dtype == torch.bfloat16
        close(layer(x).float(), want, 0.02)
    assert set_temperature(layer, 7.0) == 1
    fresh = ODConv2d(4, 6, 3, padding=1, num_kernels=2).eval()
    fresh.load_state_dict(layer.state_dict())
    assert float(fresh.router.temperature) == 7.0
    close(fresh(x), layer(x), 1e-6)
    close(layer(x, routing=fresh.route(x)), layer(x), 1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_kernels"):
        ODConv2d(4, 4, 3, num_kernels=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        ODConv2d(4, 4, 3, temperature=0)
    with pytest.raises(ValueError, match="reduction must be positive"):
        ODConv2d(4, 4, 3, reduction=0)
    with pytest.raises(ValueError, match="unknown norm 'group'"):
        ODConv2d(4, 4, 3, norm="group", router=False)
    with pytest.raises(ValueError, match="groups"):
        ODConv2d(4, 6, 3, groups=4)
    with pytest.raises(ValueError, match="exact only without noise"):
        ODConv2d.from_conv(nn.Conv2d(4, 4, 3), noise=0.1)
    with pytest.raises(TypeError, match="ODConv1d"):
        ODConv1d.from_conv(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"routing.*\[2, 17\].*got \[2, 16\]"):
        ODConv2d(4, 4, 3)(torch.zeros(2, 4, 5, 5), routing=torch.zeros(2, 16))
    with pytest.raises(ValueError, match="router"):
        ODConv2d(4, 4, 3, router=False)(torch.zeros(2, 4, 5, 5))
