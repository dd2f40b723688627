"""DCD: the published numbers, the formula over every geometry, both forms, conversion, folding, sizes and costs."""

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

from dynaconv.nn.dcd import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear
from dynaconv.nn.dcd_router import DCDSizes, dcd_sizes, pool_bins

FIXTURES = Path(__file__).parent.parent / "fixtures"
OUTPUTS, GRADIENTS = 1e-5, 5e-5
LAYERS = {1: DCDConv1d, 2: DCDConv2d, 3: DCDConv3d}
TERMS = {
    "W0": "weight",
    "Q": "q",
    "P": "p",
    "A": "router.squeeze.weight",
    "G": "router.gate.weight",
    "E_Phi": "router.fusion.weight",
    "E_Lambda": "router.scale.weight",
}


def close(got: Tensor, want: Tensor, tolerance: float = OUTPUTS) -> None:
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


def own(term: str) -> str:
    return f"norm{term[2:]}" if term.startswith("BN") else TERMS[term]


FILES = {"dcd_conv3x3_s1": ("resnet_basic", 1), "dcd_expansion_1x1": ("mobilenetv2", 0)}
CASES = [
    (name, case, form)
    for name in FILES
    for case, facts in read(name)[2].items()
    for form in (("auto",) if facts["mode"] == "train" else ("auto", "factored", "folded"))
]


@pytest.mark.parametrize(("name", "case", "form"), CASES)
def test_published_numbers(name: str, case: str, form: str) -> None:
    tensors, settings, cases = read(name)
    rule, padding = FILES[name]
    layer = DCDConv2d(
        settings["I"], settings["O"], settings["k"], padding=padding, bias=False, rule=rule, form=form
    )
    assert (layer.latent_channels, layer.squeeze_channels) == (settings["L"], settings["s"])
    layer.load_state_dict({own(k[6:]): v for k, v in tensors.items() if k.startswith("param.")}, strict=False)
    layer.train(cases[case]["mode"] == "train")
    x = tensors[f"{case}.x"].clone().requires_grad_(True)
    y = layer(x)
    close(y, tensors[f"{case}.y"])
    if not layer.training:
        return
    (tensors[f"{case}.v"] * y).sum().backward()
    close(x.grad, tensors[f"{case}.grad.x"], GRADIENTS)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    compared = 0
    for key, value in tensors.items():
        if key.startswith(f"{case}.grad.") and key != f"{case}.grad.x":
            close(parameters[own(key.split(".grad.")[1])].grad, value, GRADIENTS)
            compared += 1
        if key.startswith(f"{case}.after."):
            close(buffers[own(key.split(".after.")[1])], value)
            compared += 1
    assert compared == len(parameters) + 4


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    """Lambda (W0 * x + b) + P (BN2(Phi u) + u), image by image where Lambda and Phi act."""
    dims, latent = layer.dims, layer.latent_channels
    ones = (1,) * dims
    bins = tuple(layer.pool_size for _ in ones)
    pooled = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1](x, bins)
    v = pooled.reshape(x.shape[0], -1) @ layer.router.squeeze.weight.t()
    v = v * F.relu6(v @ layer.router.gate.weight.t() + 3) / 3
    scale = F.relu6(v @ layer.router.scale.weight.t() + 3) / 3
    fusion = (v @ layer.router.fusion.weight.t()).reshape(-1, latent, latent)
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    static = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, layer.bias is not None, layer.padding_mode, dtype=x.dtype,
    )  # fmt: skip
    with torch.no_grad():
        static.weight.copy_(layer.weight)
        if layer.bias is not None:
            static.bias.copy_(layer.bias)
        main = static(x)
        # The centre tap by itself is a static convolution with a one at the centre of an identity kernel.
        static.groups, static.bias = 1, None
        centre = torch.zeros(layer.in_channels, layer.in_channels, *layer.kernel_size, dtype=x.dtype)
        centre[(..., *(k // 2 for k in layer.kernel_size))] = torch.eye(layer.in_channels, dtype=x.dtype)
        static.weight = nn.Parameter(centre)
        u = conv(static(x), layer.q)
        if layer.norm == "batch":
            u = batch_norm(u, layer.norm1, layer.training)
        fused = torch.einsum("blm,bmn->bln", fusion, u.flatten(2)).reshape(u.shape)
        if layer.norm == "batch":
            fused = batch_norm(fused, layer.norm2, layer.training)
        return main * scale.reshape(*scale.shape, *ones) + conv(fused + u, layer.p)


def batch_norm(u: Tensor, norm: nn.Module, training: bool) -> Tensor:
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    return F.batch_norm(u, mean, var, norm.weight, norm.bias, training)


GEOMETRIES = [
    # dims, I, O, k, stride, padding, dilation, groups, mode, size
    (2, 6, 8, 3, 1, 1, 1, 1, "zeros", (7, 5)),
    (2, 6, 8, 3, 2, 0, 2, 1, "zeros", (11, 9)),
    (2, 6, 8, 2, 1, "same", 1, 1, "zeros", (6, 7)),
    (2, 6, 8, 5, 1, "same", 2, 1, "zeros", (11, 10)),
    (2, 6, 8, 3, 1, "valid", 1, 1, "zeros", (6, 7)),
    (2, 6, 8, (3, 1), (2, 1), (0, 2), 1, 1, "zeros", (8, 5)),
    (2, 6, 8, 3, 2, 1, 1, 1, "reflect", (9, 7)),
    (2, 6, 8, 5, 1, 2, 1, 1, "circular", (7, 6)),
    (2, 6, 8, 3, 1, (2, 1), 2, 1, "replicate", (7, 6)),
    (2, 6, 4, 1, 1, 0, 1, 1, "zeros", (1, 1)),
    (2, 6, 4, 1, 2, 1, 1, 1, "zeros", (5, 4)),
    (2, 6, 9, 3, 1, 1, 1, 3, "zeros", (5, 7)),
    (2, 6, 6, 3, 2, 1, 1, 6, "reflect", (5, 7)),
    (1, 6, 8, 3, 2, 1, 1, 1, "zeros", (9,)),
    (3, 6, 8, 3, 1, 1, 1, 1, "zeros", (4, 3, 5)),
    (3, 4, 4, 2, 2, 1, 1, 4, "circular", (4, 3, 5)),
]


# An even kernel with padding "same" makes torch mention that it copies its input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_formula(case: tuple, batch: int, seed: int) -> None:
    dims, i, o, k, stride, padding, dilation, groups, mode, size = case
    for bias, norm in itertools.product((True, False), ("batch", "none")):
        layer = LAYERS[dims](
            i,
            o,
            k,
            stride,
            padding,
            dilation,
            groups,
            bias,
            mode,
            dtype=torch.float64,
            norm=norm,
            pool_size=2,
        )
        shaken(layer)
        x = torch.randn(batch, i, *size, dtype=torch.float64)
        for form in ("factored", "auto") if groups > 1 else ("factored", "folded", "auto"):
            layer.form = form
            close(layer.eval()(x), plain(layer, x), 1e-12)
        if batch > 1 or math.prod(size) > 1:
            before = copy.deepcopy(layer).train()
            close(layer.train()(x), plain(before, x), 1e-12)


def test_training_on_one_value_a_channel_uses_running_statistics(seed: int) -> None:
    layer = shaken(DCDConv2d(8, 8, 1)).train()
    x = torch.randn(1, 8, 1, 1)
    before = copy.deepcopy(layer.state_dict())
    y = layer(x)
    y.sum().backward()
    close(y, copy.deepcopy(layer).eval()(x))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    classifier = shaken(DCDLinear(8, 5)).train()
    close(classifier(x.flatten(1)), copy.deepcopy(classifier).eval()(x.flatten(1)))


@pytest.mark.parametrize("form", ["factored", "folded"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(form: str, training: bool, seed: int) -> None:
    layer = DCDConv2d(4, 4, 3, 2, 1, dtype=torch.float64, form=form, latent_channels=2, squeeze_channels=2)
    layer = shaken(layer).train(training)
    # Lambda's clipping has corners; small gates stay between them.
    for linear in (layer.router.gate, layer.router.scale):
        linear.weight.data *= 0.1
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_(True) for p in layer.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_forms_agree_in_gradient(seed: int) -> None:
    layer = shaken(DCDConv2d(6, 8, 3, padding=1)).eval()
    x, v = torch.randn(2, 6, 5, 7), torch.randn(2, 8, 5, 7)
    gradients = []
    for form in ("factored", "folded"):
        layer.form = form
        layer.zero_grad()
        (layer(x) * v).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, GRADIENTS)


def test_published_sizes() -> None:
    published = """
    (16,96,8,4) (96,24,12,9) (24,144,12,9) (144,24,12,9) (24,144,12,9) (144,32,16,16) (32,192,16,16) (192,32,16,16)
    (192,64,16,16) (64,384,16,16) (384,64,16,24) (384,96,24,36) (96,576,24,36) (576,96,24,36) (576,160,20,36)
    (160,960,20,40) (960,160,40,100) (960,320,40,100)"""
    for row in published.split():
        i, o, latent, squeeze = json.loads(row.replace("(", "[").replace(")", "]"))
        assert dcd_sizes(i, o) == DCDSizes(latent, squeeze, 2 if i < o else 1)
    for i, latent, squeeze in ((64, 16, 16), (128, 22, 32), (256, 32, 64), (512, 45, 128)):
        assert dcd_sizes(i, i, rule="resnet_basic") == DCDSizes(latent, squeeze, 2)
    for i in (64, 256, 512, 2048):
        want = DCDSizes(math.isqrt(i), max(i, math.isqrt(i) ** 2) // 16, 1)
        assert dcd_sizes(i, 4 * i, rule="resnet_bottleneck") == want
    given = dcd_sizes(24, 144, latent_channels=5, squeeze_channels=3, pool_size=1)
    assert given == DCDSizes(5, 3, 1)
    assert dcd_sizes(24, 144, fc_squeeze=8).squeeze_channels == 18


def test_macs_against_brute_force() -> None:
    layer = DCDConv2d(16, 96, 1, latent_channels=8, squeeze_channels=4, pool_size=2).eval()
    assert layer.router.macs == 64 * 4 + 4 * 4 + 4 * 96 + 4 * 64
    assert layer.macs(112 * 112) == (16 * 96 * 112 * 112, 19_968, layer.router.macs)
    layer.form = "factored"
    per_position = 16 * 8 + 8 * 8 + 8 * 96
    assert layer.macs(49) == (16 * 96 * 49, per_position * 49, layer.router.macs)
    wide = DCDConv2d(960, 160, 1).eval()
    assert wide.macs(49).mixing == (960 * 40 + 40 * 40 + 40 * 160) * 49
    assert wide.train().macs(10**6).mixing == (960 * 40 + 40 * 40 + 40 * 160) * 10**6
    assert DCDConv2d(16, 16, 3, router=False).macs(9).routing == 0
    linear = DCDLinear(512, 1000)
    mixing = 512 * 32 + 32 * 32 + 32 * 1000
    assert linear.macs() == (512_000, mixing, 512 * 32 + 32 * 32 + 32 * 1024 + 32 * 1000)


def test_resnet18_numbers() -> None:
    """Convolutions and classifier of DCD ResNet-18: the reference table's mixing and routing multiply-adds."""
    convs = [(64, 64, 56, 1)] * 4
    for width, size in ((128, 28), (256, 14), (512, 7)):
        convs += [(width // 2, width, size, 2)] + [(width, width, size, 1)] * 3
    totals = {"factored": [0, 0], "folded": [0, 0]}
    for form, total in totals.items():
        for i, o, size, stride in convs:
            layer = DCDConv2d(i, o, 3, stride, 1, bias=False, rule="resnet_basic", form=form, device="meta")
            cost = layer.eval().macs(size * size)
            total[0] += cost.mixing
            total[1] += cost.routing
        classifier = DCDLinear(512, 1000, device="meta").macs()
        total[0] += classifier.mixing
        total[1] += classifier.routing
    assert totals == {"factored": [66_257_179, 2_715_008], "folded": [63_934_720, 2_715_008]}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_conversion_is_exact(training: bool, bias: bool, groups: int, seed: int) -> None:
    conv = nn.Conv2d(8, 12, 3, 2, 1, groups=groups, bias=bias, padding_mode="reflect").train(training)
    layer = DCDConv2d.from_conv(conv, rule="resnet_basic")
    x = torch.randn(3, 8, 9, 7)
    assert layer.training is training
    close(layer(x), conv(x), 1e-4)
    back = layer.to_conv()
    assert list(back.state_dict()) == list(conv.state_dict())
    for name, value in conv.state_dict().items():
        close(back.state_dict()[name], value, 1e-6)
    layer(x).square().sum().backward()
    for name in ("weight", "p", "router.scale.weight"):
        assert float(dict(layer.named_parameters())[name].grad.abs().max()) > 0
    fresh = DCDConv2d.from_conv(conv, init="fresh")
    assert float(fresh.p.detach().abs().max()) > 0


def test_fresh_init_is_the_published_one() -> None:
    torch.manual_seed(0)
    layer = DCDConv2d(64, 128, 3, rule="resnet_basic")
    for kernel, deviation in ((layer.weight, 9 * 128), (layer.q, layer.latent_channels), (layer.p, 128)):
        assert kernel.std().item() == pytest.approx((2 / deviation) ** 0.5, rel=0.1)
    assert DCDConv2d(64, 128, 1).router.fusion.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert float(layer.bias.detach().abs().max()) == 0


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_folding_norms_is_exact(norm: str, bias: bool, groups: int, seed: int) -> None:
    layer = shaken(DCDConv2d(6, 8, 3, 2, 1, groups=groups, bias=bias, norm=norm, dtype=torch.float64)).eval()
    after = shaken(nn.BatchNorm2d(8, dtype=torch.float64), seed=1).eval()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    want = after(layer(x))
    layer.fold_norm_(after)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in layer.modules())
    for form in ("factored", "folded")[: 2 if groups == 1 else 1]:
        layer.form = form
        close(layer(x), want, 1e-12)
    if groups == 1:
        kernels, shift = layer.kernels(layer.route(x))
        images = zip(x, kernels, shift, strict=True)
        close(torch.cat([F.conv2d(i[None], k, b, 2, 1) for i, k, b in images]), want, 1e-12)
    layer.fold_norm_(nn.BatchNorm2d(8, eps=0, dtype=torch.float64).eval())
    close(layer(x), want, 1e-12)
    close(layer.train()(x), want, 1e-12)


def test_synchronised_norms_fold_too(seed: int) -> None:
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(shaken(DCDConv2d(6, 8, 3, padding=1)).eval())
    assert type(layer.norm1) is nn.SyncBatchNorm
    x = torch.randn(2, 6, 5, 7)
    layer.form = "factored"
    want = layer(x)
    layer.form = "folded"
    close(layer(x), want)
    layer.fold_own_norms_()
    close(layer(x), want)


def test_classifier(seed: int) -> None:
    layer = shaken(DCDLinear(12, 5, dtype=torch.float64)).eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    scale, fusion = layer.split(layer.route(x))
    u = batch_norm(x @ layer.q.t(), layer.norm1, False)
    fused = batch_norm(torch.einsum("blm,bm->bl", fusion, u), layer.norm2, False) + u
    want = scale * (x @ layer.weight.t() + layer.bias) + fused @ layer.p.t()
    close(layer(x), want, 1e-12)
    kernels, shift = layer.kernels(layer.route(x))
    close(torch.einsum("boi,bi->bo", kernels, x) + shift, want, 1e-12)
    layer.fold_own_norms_()
    close(layer(x), want, 1e-12)
    for bias, training in itertools.product((True, False), repeat=2):
        linear = nn.Linear(12, 5, bias).train(training)
        converted = DCDLinear.from_linear(linear)
        x = torch.randn(4, 12)
        close(converted(x), linear(x), 1e-5)
        assert list(converted.to_linear().state_dict()) == list(linear.state_dict())
        close(converted.to_linear()(x), linear(x), 1e-5)
    parameters = sum(p.numel() for p in DCDLinear(1280, 1000).parameters())
    assert parameters - (1280 * 1000 + 1000) == 179_840


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bins", [1, 2])
def test_masked_pooling_reads_open_positions_only(dims: int, bins: int, seed: int) -> None:
    x = torch.randn(2, 3, *(5, 7, 4)[:dims], dtype=torch.float64)
    mask = (torch.rand(2, 1, *x.shape[2:]) < 0.5).to(x.dtype)
    mask[1, ..., : x.shape[-1] // 2 + 1] = 0
    got = pool_bins(x, bins, mask).reshape(2, 3, *(bins,) * dims)
    for b, c in itertools.product(range(2), range(3)):
        for where in itertools.product(range(bins), repeat=dims):
            cut = tuple(
                slice(i * n // bins, -(-(i + 1) * n // bins)) for i, n in zip(where, x.shape[2:], strict=True)
            )
            values = x[b, c][cut][mask[b, 0][cut] > 0]
            want = values.mean() if values.numel() else torch.zeros((), dtype=x.dtype)
            assert float(got[(b, c, *where)]) == pytest.approx(float(want), abs=1e-12)
    close(pool_bins(x, bins, torch.ones_like(mask)), pool_bins(x, bins), 1e-12)
    layer = shaken(LAYERS[dims](3, 4, 1, pool_size=bins, dtype=torch.float64))
    other = torch.where(mask > 0, x, torch.randn_like(x))
    close(layer.route(other, mask), layer.route(x, mask), 1e-12)


def test_routing_from_outside(seed: int) -> None:
    layer = shaken(DCDConv2d(6, 8, 3, padding=1)).eval()
    x = torch.randn(2, 6, 5, 5)
    alone = DCDConv2d(6, 8, 3, padding=1, router=False).eval()
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("router")})
    close(alone(x, routing=layer.route(x)), layer(x))
    with pytest.raises(ValueError, match=r"routing.*\[2, 24\].*got \[2, 23\]"):
        alone(x, routing=torch.zeros(2, 23))
    with pytest.raises(ValueError, match="router"):
        alone(x)


def test_layouts_copies_and_precision(seed: int) -> None:
    layer = shaken(DCDConv2d(6, 8, 3, padding=1)).eval()
    x = torch.randn(2, 6, 5, 7)
    last = x.contiguous(memory_format=torch.channels_last)
    for form, training in itertools.product(("factored", "folded"), (True, False)):
        layer.form = form
        layer.train(training)
        twin = copy.deepcopy(layer)
        y = twin(last)
        assert y.is_contiguous(memory_format=torch.channels_last)
        close(y, copy.deepcopy(layer)(x))
        close(layer(x), y)
    exact, want = layer.eval().route(x), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        routing = layer.route(x)
        assert routing.dtype == torch.float32 and torch.equal(routing, exact)
        for form in ("factored", "folded"):
            layer.form = form
            assert layer(x).dtype == torch.bfloat16
            close(layer(x).float(), want, 0.02)
    half = layer.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="form 'folded' cannot run with groups=2.*form='factored'"):
        DCDConv2d(4, 4, 3, groups=2, form="folded")
    with pytest.raises(ValueError, match="unknown rule 'resnet'; did you mean"):
        DCDConv2d(4, 4, 3, rule="resnet")
    with pytest.raises(ValueError, match="unknown norm 'layer'"):
        DCDConv2d(4, 4, 3, norm="layer")
    with pytest.raises(ValueError, match="latent_channels"):
        DCDConv2d(4, 4, 3, latent_channels=0)
    with pytest.raises(ValueError, match="groups"):
        DCDConv2d(4, 6, 3, groups=4)
    with pytest.raises(ValueError, match="exact only without noise"):
        DCDConv2d.from_conv(nn.Conv2d(4, 4, 3), noise=0.1)
    with pytest.raises(TypeError, match="DCDConv2d"):
        DCDConv2d.from_conv(nn.ConvTranspose2d(4, 4, 3))
    with pytest.raises(ValueError, match="unknown init 'warm'"):
        DCDConv2d.from_conv(nn.Conv2d(4, 4, 3), init="warm")
    with pytest.raises(ValueError, match=r"got \[2, 5, 4, 4\]"):
        DCDConv2d(4, 4, 3)(torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match="groups=2"):
        layer = DCDConv2d(4, 4, 3, groups=2)
        layer.kernels(layer.route(torch.zeros(1, 4, 4, 4)))
