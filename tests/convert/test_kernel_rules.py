"""Which layers get dynamic kernels: by name, by pattern, by scope; and what is refused."""

from __future__ import annotations

import copy

import pytest
from tests.convert.kernel_networks import CONFIGS, close, images, rules_of, same
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.nn import RoutedBlock


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
