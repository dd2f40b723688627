"""Dynamic kernels in whole networks: exact at the start, counted, reverted."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tests.convert.kernel_networks import CONFIGS, close, images
from tests.convert.networks import randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.convert import config_from_dict
from dynaconv.nn import RoutedBlock
from dynaconv.nn.routers import Router

# A small member of every family with every method, and larger ones and other spellings with one of them.
NETWORKS = [
    "resnet8_cifar",
    "timm:test_resnet",
    "timm:mobilenetv2_035",
    "torchvision:mobilenet_v3_small",
    "timm:test_efficientnet",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:mnasnet0_5",
    "timm:test_convnext",
]
OTHERS = {
    "torchvision:resnet18": ("dyconv",),
    "timm:resnet14t": ("dcd",),
    "torchvision:mobilenet_v2": ("odconv",),
    "timm:mobilenetv3_small_050": ("dynet",),
    "torchvision:efficientnet_b0": ("condconv",),
    "timm:efficientnet_b0": ("dynet",),
    "timm:mnasnet_small": ("weightnet",),
    "timm:convnext_atto": ("condconv", "dcd"),
}
CASES = [(n, m) for n in NETWORKS for m in CONFIGS] + [
    (n, m) for n, methods in OTHERS.items() for m in methods
]
# Not every router's inner layer: a ReLU behind it may be closed for all images.
LAST = ("router.fc.bias", "router.fc2.bias", "router.fc.weight", "router.scale.weight", "router.fusion.weight",
        "router.channel.bias", "router.filter.bias", "router.spatial.bias", "router.kernel.bias")  # fmt: skip


def build(name: str) -> nn.Module:
    """Norms that are no identities, layer scales that let something through, no dropout."""
    torch.manual_seed(0)
    model = randomise_norms(dc.create_model(name, num_classes=7))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model


@pytest.mark.needs("timm", "torchvision")
@pytest.mark.parametrize(("name", "method"), CASES)
def test_exact_before_training_then_trains_then_reverts(name: str, method: str) -> None:
    # Double precision, so that batch norm over a few values does not blow rounding up.
    original, x = build(name).double(), images()
    model = copy.deepcopy(original)
    report = dc.dynamize_(model, CONFIGS[method], input_size=(3, 32, 32))
    layers = dc.dynamic_layers(model)
    assert len(report.converted) == len(layers) > 0
    assert [y.config for y in layers.values()] == [CONFIGS[method]] * len(layers)
    for training, dtype, tolerance in ((True, torch.float64, 1e-8), (False, torch.float32, 1e-4)):
        results = []
        for network in (model, original):
            torch.manual_seed(3)
            with torch.no_grad():
                results.append(copy.deepcopy(network).to(dtype).train(training)(x.to(dtype)))
        close(*results, tolerance)
    kept = copy.deepcopy(model)
    reverted = dc.revert_(kept)
    assert set(reverted) == set(report.converted)
    assert not dc.dynamic_layers(kept) and not any(
        isinstance(m, Router | RoutedBlock) for m in kept.modules()
    )
    before, after = original.state_dict(), kept.state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        close(after[key], value, 1e-12)
    _descend(model.float().train(), x)
    old = {n for n, _ in original.named_parameters()}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert key in old or not key.endswith(LAST) or bool(parameter.grad.any()), key
    for key, layer in dc.dynamic_layers(model).items():
        assert bool(layer.weight.grad.any()), key


def _descend(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    """Some steps, since a few parts only get gradient once others have moved."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x)) % 7).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step < steps - 1:
            optimizer.step()


def test_report_says_what_became_of_every_layer() -> None:
    model = dc.create_model("resnet8_cifar")
    names, before = [n for n, _ in model.named_modules() if n], sum(p.numel() for p in model.parameters())
    report = dc.dynamize_(model, dc.CondConv(num_experts=3))
    chosen = [f"layer{stage}.0.conv{i}" for stage in (1, 2, 3) for i in (1, 2)]
    assert report.converted == [*chosen, "fc"] and [m.name for m in report.modules] == names
    details = {m.name: (m.status, m.detail) for m in report.modules}
    assert details["fc"] == ("converted", "condconv, 3 experts, a router a block")
    assert details["conv1"] == ("kept", "not asked for") and details["layer1"] == (
        "kept",
        "container",
    )
    weights = dict(zip(chosen, [(16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)], strict=True))
    more = sum(2 * 9 * i * o for i, o in weights.values()) + 2 * 640 + 3 * (16 + 16 + 32 + 64 + 4)
    assert (report.params_before, report.params_after) == (before, before + more)
    static = 12_500_992
    mixing = 3 * (sum(9 * i * o for i, o in weights.values()) + 640)
    assert report.dense_macs_before == static
    assert report.dense_macs_after == static + mixing + 3 * (16 + 16 + 32 + 64)
    assert json.loads(report.to_json())["params_after"] == before + more


STAGES = [("layer1.0", 16, 16, 32), ("layer2.0", 16, 32, 16), ("layer3.0", 32, 64, 8)]


def by_formula(method: str) -> tuple[int, int, int]:
    """Static, mixing and routing multiply-adds of a converted resnet8_cifar at 32 x 32, written down by hand."""
    static, mixing, routing = 27 * 16 * 32 * 32 + 64 * 10, 0, 0
    for _, i, o, size in STAGES:
        positions, shortcut = size * size, 0 if i == o else i * o
        static += (9 * i * o + 9 * o * o + shortcut) * positions
        weights = 9 * i * o + 9 * o * o
        if method == "condconv":
            mixing, routing = mixing + 3 * weights, routing + 3 * i
        elif method == "dyconv":
            mixing += 3 * (weights + shortcut)
            routing += sum(c * (c // 4) + (c // 4) * 3 for c in ((i, o) if i == o else (i, o, i)))
        elif method == "dynet":
            mixing, routing = mixing + 2 * weights, routing + i * (i // 4) + (i // 4) * 2 * 2 * o
        elif method == "odconv":
            mixing += 2 * weights
            routing += sum(c * 16 + 16 * (c + o + 9 + 2) for c in (i, o))
        elif method == "weightnet":
            mixing += weights + shortcut
            routing += i * 16 + 16 * 2 * (2 * o + (0 if i == o else o))
        elif method == "dcd":
            for c in (i, o):
                latent = math.isqrt(4 * c)
                squeeze = max(max(4 * c, latent**2) // 16, 4)
                factored, folded = latent * (c + latent + o) * positions, o * (latent**2 + latent * c + c * 9)
                mixing += min(factored, folded)
                routing += 4 * c * squeeze + squeeze**2 + squeeze * (o + latent**2)
    if method == "condconv":
        mixing, routing = mixing + 3 * 640, routing + 3 * 64
    if method == "dcd":
        mixing, routing = mixing + 64 * 32 + 32**2 + 32 * 10, routing + 64 * 32 + 32**2 + 32 * (10 + 32**2)
    return static, mixing, routing


SMALL = {**CONFIGS, "condconv": dc.CondConv(num_experts=3), "dyconv": dc.DYConv(num_kernels=3)}


@pytest.mark.parametrize("method", SMALL)
def test_profile_counts_as_the_formula_does(method: str) -> None:
    model = dc.create_model("resnet8_cifar")
    report = dc.dynamize_(model, SMALL[method])
    static, mixing, routing = by_formula(method)
    for training in (True, False):
        profile = dc.profile(model.train(training), images(batch=2))
        assert profile.dense_macs == static and profile.counts_linear
        assert profile.mixing_macs.tolist() == [mixing] * 2 and profile.routing_macs.tolist() == [routing] * 2
        assert profile.executed_macs.tolist() == [static + mixing + routing] * 2
        layers = {y.name: y for y in profile.layers}
        shared = [y for y in profile.layers if y.role == "routing"]
        assert sum(y.mixing_macs for y in layers.values()) == mixing
        assert sum(y.routing_macs for y in layers.values()) + sum(y.dense_macs for y in shared) == routing
        assert bool(shared) is (method in ("condconv", "dynet", "weightnet"))
    assert (report.dense_macs_before, report.dense_macs_after) == (
        static - 640,
        static - 640 + mixing + routing,
    )


def test_modes_and_devices_follow_the_layers() -> None:
    model = dc.create_model("resnet8_cifar").train()
    model.layer1.eval()
    model.layer3[0].bn1.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    dc.dynamize_(model, dc.CondConv(num_experts=2))
    for name, layer in dc.dynamic_layers(model).items():
        assert layer.training is modes[name.replace(".block.", ".")], name
    dc.revert_(model)
    assert {n: m.training for n, m in model.named_modules()} == modes
    model = model.double()
    dc.dynamize_(model, dc.WeightNetConv())
    assert all(p.dtype == torch.float64 for p in model.parameters())
    with torch.device("meta"):
        lazy = dc.create_model("resnet8_cifar")
    dc.dynamize_(lazy, dc.DYConv())
    assert all(p.device.type == "meta" for p in lazy.parameters())


def test_a_layer_by_itself_cannot_be_reverted_in_place() -> None:
    layer = dc.nn.DYConv2d(4, 4, 3)
    modules = list(layer.modules())
    with pytest.raises(
        ValueError, match=r"this DYConv2d is itself the module to replace.*call its to_conv\(\)"
    ):
        dc.revert_(layer)
    assert list(layer.modules()) == modules


@pytest.mark.parametrize("method", CONFIGS)
def test_reverting_after_training_gives_the_neutral_network(method: str) -> None:
    model = build("resnet8_cifar")
    names = list(model.state_dict())
    dc.dynamize_(model, CONFIGS[method])
    _descend(model.train(), images())
    model.eval()
    for module in model.modules():
        if isinstance(module, Router) and method != "dcd":
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        if isinstance(module, Router) and method == "dcd":
            nn.init.zeros_(module.scale.weight)
            nn.init.zeros_(module.fusion.weight)
    want = model(images())
    dc.revert_(model)
    # DCD's dynamic part leaves a bias behind.
    assert [n for n in model.state_dict() if n in names] == names
    close(model(images()), want)


def test_configs_are_json_and_validated() -> None:
    for config in CONFIGS.values():
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.describe().startswith(config.kind)
    for made, message in [
        (lambda: dc.CondConv(num_experts=0), "num_experts must be a whole number >= 1, got 0"),
        (lambda: dc.CondConv(routing="blok"), "unknown routing 'blok'; did you mean 'block'"),
        (lambda: dc.DYConv(num_kernels=0), "num_kernels must be a whole number >= 1, got 0"),
        (lambda: dc.DYConv(temperature=0), "temperature must be positive, got 0"),
        (lambda: dc.DYConv(scope="papers"), "unknown scope 'papers'; did you mean 'paper'"),
        (lambda: dc.DyNetConv(group_size=0), "group_size must be a whole number >= 1, got 0"),
        (lambda: dc.DyNetConv(predictor="three"), "unknown predictor 'three'"),
        (lambda: dc.DCDConv(latent_channels=0), "latent_channels must be a whole number >= 1, got 0"),
        (lambda: dc.DCDConv(form="fold"), "unknown form 'fold'; did you mean 'folded'"),
        (lambda: dc.ODConv(norm="group"), "unknown norm 'group'"),
        (lambda: dc.ODConv(temperature=-1.0), "temperature must be positive, got -1.0"),
        (lambda: dc.DYConv(execution="gruped"), "unknown execution 'gruped'; did you mean 'grouped'"),
        (lambda: dc.DYConv(init="exakt"), "unknown init 'exakt'; did you mean 'exact'"),
        (
            lambda: config_from_dict({"kind": "dyconf"}),
            "unknown kind of conversion 'dyconf'; did you mean 'dyconv'",
        ),
        (
            lambda: config_from_dict({"kind": "dyconv", "kernels": 2}),
            "unknown option of dyconv 'kernels'; did you mean",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            made()


def test_fresh_conversions_start_elsewhere() -> None:
    original = build("resnet8_cifar").eval()
    for method, config in CONFIGS.items():
        model = copy.deepcopy(original)
        dc.dynamize_(model, type(config)(init="fresh"))
        with torch.no_grad():
            got, want = model(images()), original(images())
        assert float((got - want).abs().max()) > 0.01 * float(want.abs().max()), method
