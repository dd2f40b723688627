"""Dynamic kernels in whole networks: exact at the start, by rules or by paper, counted, reverted, refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tests.convert.networks import randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.convert import KernelConfig, config_from_dict
from dynaconv.nn import RoutedBlock
from dynaconv.nn.routers import Router

CONFIGS: dict[str, KernelConfig] = {
    "condconv": dc.CondConv(num_experts=2),
    "dyconv": dc.DYConv(num_kernels=2),
    "dynet": dc.DyNetConv(group_size=2),
    "dcd": dc.DCDConv(),
    "odconv": dc.ODConv(num_kernels=2),
    "weightnet": dc.WeightNetConv(),
}
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


def images(size: int = 32, batch: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == want.shape
    error = (got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1e-12)
    assert float(error) <= tolerance, f"relative deviation {float(error):.2e} > {tolerance:.0e}"


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


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[k], state[k]) for k in state)


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


def rules_of(model: nn.Module) -> dict[str, str]:
    return {name: type(layer).__name__ for name, layer in dc.dynamic_layers(model).items()}


def test_rules_by_name_pattern_and_none() -> None:
    model = dc.create_model("resnet8_cifar")
    report = dc.dynamize_(
        model,
        {
            "layer1": dc.DYConv(),
            "layer1.0.conv2": dc.ODConv(),
            r"re:.*conv2": dc.DCDConv(),
            r"re:layer[23].*conv": dc.CondConv(routing="layer"),
            "layer3.0.downsample": None,
            "fc": dc.CondConv(),
        },
    )
    assert rules_of(model) == {
        "layer1.0.conv1": "DYConv2d",
        "layer1.0.conv2": "ODConv2d",
        "layer2.0.conv1": "CondConv2d",
        "layer2.0.conv2": "DCDConv2d",
        "layer3.0.conv1": "CondConv2d",
        "layer3.0.conv2": "DCDConv2d",
        "fc": "CondLinear",
    }
    assert report.converted == list(rules_of(model))
    assert isinstance(model.layer2[0].downsample[0], nn.Conv2d)


def test_none_and_names_take_layers_out_of_a_scope() -> None:
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(
        model, {"": dc.DYConv(), "layer2": None, r"re:layer3.*conv1": None, "layer3.0.conv2": dc.ODConv()}
    )
    assert rules_of(model) == {
        "layer1.0.conv1": "DYConv2d",
        "layer1.0.conv2": "DYConv2d",
        "layer3.0.conv2": "ODConv2d",
        "layer3.0.downsample.0": "DYConv2d",
    }


def test_rules_share_routers_where_the_structure_is_known() -> None:
    model, x = dc.create_model("resnet8_cifar").eval(), images(batch=2)
    want = model(x)
    dc.dynamize_(model, {"layer2": dc.CondConv(num_experts=3), "layer3.0.conv2": dc.DyNetConv(group_size=2)})
    blocks = {n: m.layers for n, m in model.named_modules() if isinstance(m, RoutedBlock)}
    assert blocks == {"layer2.0": ("conv1", "conv2", "downsample.0"), "layer3.0": ("conv2",)}
    assert all(layer.router is None for layer in dc.dynamic_layers(model).values())
    close(model(x), want)


def test_scopes_of_the_whole_network() -> None:
    for config, stem in ((dc.DYConv(scope="all"), False), (dc.ODConv(), False)):
        model = dc.create_model("resnet8_cifar")
        dc.dynamize_(model, config)
        convs = [n for n, m in dc.create_model("resnet8_cifar").named_modules() if isinstance(m, nn.Conv2d)]
        shortcuts = [n for n in convs if "downsample" in n]
        expected = convs[1:] if config.scope == "all" else [n for n in convs[1:] if n not in shortcuts]
        assert list(dc.dynamic_layers(model)) == expected and ("conv1" in expected) is stem
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(model, dc.CondConv(first_block="layer3.0", classifier=False))
    assert [n.replace(".block", "") for n in dc.dynamic_layers(model)] == ["layer3.0.conv1", "layer3.0.conv2"]
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(model, dc.DYConv(classifier=None, first_block=-1))
    assert all(n.startswith("layer3") for n in dc.dynamic_layers(model))


@pytest.mark.needs("timm")
def test_squeeze_excite_becomes_dynamic_only_by_its_own_name() -> None:
    model = dc.create_model("timm:test_efficientnet", num_classes=7)
    dc.dynamize_(
        model, {"blocks.3": dc.DYConv(), "blocks.4.0.se.conv_reduce": dc.DYConv()}, input_size=(3, 32, 32)
    )
    assert list(dc.dynamic_layers(model)) == [
        "blocks.3.0.conv_pw",
        "blocks.3.0.conv_dw",
        "blocks.3.0.conv_pwl",
        "blocks.4.0.se.conv_reduce",
    ]


class Plain(nn.Module):
    """A network that nothing is known about, with a shared layer in it if asked."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = self.a if twice else nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.line = nn.Conv1d(4, 4, 3)
        self.volume = nn.Conv3d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.b(self.a(self.stem(x))))
        x = self.volume(x[:, :, None])[:, :, 0]
        return self.fc(self.line(x.flatten(2)).mean(2))


def test_unknown_networks_take_rules_by_name() -> None:
    model, x = Plain().eval(), images(9)
    want = model(x)
    rules = {
        "a": dc.CondConv(),
        "b": dc.DCDConv(),
        "line": dc.DyNetConv(),
        "volume": dc.ODConv(),
        "fc": dc.DCDConv(),
    }
    dc.dynamize_(model, rules, input_size=(3, 9, 9))
    assert rules_of(model) == {
        "a": "CondConv2d", "b": "DCDConv2d", "line": "DyNetConv1d", "volume": "ODConv3d", "fc": "DCDLinear",
    }  # fmt: skip
    close(model(x), want)
    other = Plain()
    dc.dynamize_(other, dc.DYConv(scope="all"), input_size=(3, 9, 9))
    assert list(dc.dynamic_layers(other)) == ["a", "b", "line", "volume"]


REFUSED = [
    (
        Plain,
        dc.DYConv(),
        ValueError,
        "the layers of Plain have no known roles, so no paper's choice applies to it; name",
    ),
    (
        Plain,
        {"up": dc.DYConv()},
        TypeError,
        "from_conv expects a plain nn.Conv1d, Conv2d or Conv3d, got ConvTranspose2d",
    ),
    (
        Plain,
        {"fc": dc.DYConv()},
        ValueError,
        "DYConv has no form for a linear layer; leave the classifier static",
    ),
    (Plain, {"a": dc.ODConv(), "fc": dc.ODConv()}, ValueError, "ODConv has no form for a linear layer"),
    (
        lambda: Plain(True),
        {"a": dc.DYConv()},
        ValueError,
        "a is one layer used in 2 places (a, b); give each place its",
    ),
    (Plain, {"aa": dc.DYConv()}, ValueError, "unknown module 'aa'; did you mean 'a'"),
    (Plain, {"re:x": dc.DYConv()}, ValueError, "rule 're:x' matches no module; print(model) shows the names"),
    (Plain, {"a": None}, ValueError, "Plain has nothing to convert"),
    (
        Plain,
        {"a": "dyconv"},
        TypeError,
        "rule 'a' must map to a config, a tuple of configs or None, got 'dyconv'",
    ),
    (
        Plain,
        {"a": (dc.DYConv(), dc.ODConv())},
        ValueError,
        "rule 'a' has two configs of one kind; a tuple takes one gate",
    ),
    (Plain, {"a": ()}, TypeError, "rule 'a' must map to a config"),
    (
        lambda: dc.create_model("resnet8_cifar"),
        {"layer3.0.conv1": dc.CondConv(), "layer3.0.conv2": dc.DyNetConv()},
        ValueError,
        "two configs want to share a router inside layer3.0; use one config there, or routing='layer' in one of them",
    ),
    (
        lambda: dc.create_model("resnet8_cifar"),
        {"": dc.DYConv(), "fc": dc.ODConv()},
        ValueError,
        "ODConv has no form for a linear layer",
    ),
]


@pytest.mark.parametrize(("make", "rules", "kind", "message"), REFUSED)
def test_what_cannot_be_converted_leaves_the_model_alone(make, rules, kind, message) -> None:
    model = make()
    modules, state = dict(model.named_modules(remove_duplicate=False)), copy.deepcopy(model.state_dict())
    with pytest.raises(kind) as caught:
        dc.dynamize_(model, rules, input_size=(3, 9, 9))
    assert message in str(caught.value)
    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == list(modules) and all(after[n] is m for n, m in modules.items())
    assert same(model, state) and all(m.training for m in model.modules())


class ByData(dc.models.BasicBlock):
    """A block that looks at its data, so that no router can be shared inside it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


ByData.__name__ = "BasicBlock"


def test_a_block_that_cannot_be_traced_is_told_and_nothing_changes() -> None:
    model = dc.create_model("resnet8_cifar")
    model.layer3[0] = ByData(32, 64, 2)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="a router cannot be shared inside this BasicBlock: .*routing='layer'"
    ):
        dc.dynamize_(model, dc.CondConv())
    after = dict(model.named_modules())
    assert (
        list(after) == list(modules) and all(after[n] is m for n, m in modules.items()) and same(model, state)
    )
    want = model.eval()(images())
    dc.dynamize_(model, dc.CondConv(routing="layer"))
    close(model(images()), want)


def test_dynamic_layers_are_not_converted_again() -> None:
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(model, {"layer3.0.conv1": dc.DYConv()})
    state, pattern = copy.deepcopy(model.state_dict()), {r"re:layer.*conv": dc.DCDConv()}
    again = [{"layer3.0.conv1": dc.ODConv()}, {"layer3": dc.ODConv()}, pattern, dc.DYConv(), dc.CondConv()]
    for rules in (*again, (dc.SpatialMasking(), dc.DYConv()), {"": dc.DYConv(), "layer1": None}):
        with pytest.raises(
            ValueError, match=r"layer3.0.conv1 is dynamic already \(DYConv2d\); call dc.revert_ first"
        ):
            dc.dynamize_(model, rules)
        assert same(model, state)
    dc.dynamize_(model, {"layer3": dc.ODConv(), "layer3.0.conv1": None})
    assert rules_of(model) == {
        "layer3.0.conv1": "DYConv2d", "layer3.0.conv2": "ODConv2d", "layer3.0.downsample.0": "ODConv2d",
    }  # fmt: skip
    assert set(dc.revert_(model)) == {"layer3.0.conv1", "layer3.0.conv2", "layer3.0.downsample.0"}


@pytest.mark.parametrize("method", CONFIGS)
def test_no_method_is_applied_twice(method: str) -> None:
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(model, CONFIGS[method])
    kinds, state = rules_of(model), copy.deepcopy(model.state_dict())
    for config in CONFIGS.values():
        with pytest.raises(ValueError, match=r"conv1 is dynamic already \(.*\); call dc.revert_ first"):
            dc.dynamize_(model, config)
        assert rules_of(model) == kinds and same(model, state)


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
