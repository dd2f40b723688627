"""Static networks under the dynamic ones: parameters and multiply-adds against closed forms."""

from __future__ import annotations

import pytest
import torch
from tests.models.closed_forms import Net, dymobile, efficientnet_b0, mobilenet_v2, resnet
from torch import nn

from dynaconv.convert.scopes import layer_sites, paper_sites
from dynaconv.cost.dense import count_dense
from dynaconv.models.dynamic import DyMobile, DyResNet, DyShuffleNetV2, build_base, listed_names, parse_name

WIDTHS = (0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4, 2.0)


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module) -> int:
    counts = count_dense(model, (3, 224, 224))
    return counts.static + sum(counts.linears.values())


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize(
    ("name", "net"),
    [
        *((f"resnet{d}", resnet(d)) for d in (18, 34, 50, 101, 152)),
        *((f"mobilenetv2_{round(100 * w):03d}", mobilenet_v2(w)) for w in WIDTHS),
        ("efficientnet_b0", efficientnet_b0()[0]),
        ("efficientnet_b0_depth110", efficientnet_b0(1.1)[0]),
    ],
)
def test_parameters_of_bases(name: str, net: Net) -> None:
    with torch.device("meta"):
        assert params(build_base(name)) == net.params


@pytest.mark.parametrize("width", WIDTHS)
def test_parameters_of_dymobile(width: float) -> None:
    with torch.device("meta"):
        assert params(DyMobile(width=width)) == dymobile(width).params


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_parameters_of_dyresnet(depth: int) -> None:
    with torch.device("meta"):
        model = DyResNet(depth)
    assert params(model) == resnet(depth, base=32).params
    assert len(paper_sites(model, "dynet")) == sum(c.role == "conv" for c in resnet(depth).convs)


def test_multiply_adds_of_the_skeletons() -> None:
    # Published: 129 M for the convolutions of Dy-mobile, 550 for Dy-ResNet18 in units of 2^20 (OpenReview SyeZIkrKwS).
    assert count_dense(DyMobile(), (3, 224, 224)).static == 129_262_392
    assert macs(DyResNet(18)) == 577_480_704
    assert macs(DyMobile(width=0.5)) == dymobile(0.5).macs
    assert macs(DyResNet(50)) == resnet(50, base=32).macs


@pytest.mark.needs("torchvision")
def test_multiply_adds_of_bases() -> None:
    for name, net in (
        ("mobilenetv2_075", mobilenet_v2(0.75)),
        ("efficientnet_b0_depth110", efficientnet_b0(1.1)[0]),
    ):
        model = build_base(name)
        # The squeeze-excite convolutions have a bias, which the papers' rules do not count.
        biases = sum(
            m.bias.numel() for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None
        )
        assert macs(model) - biases == net.macs, name


@pytest.mark.parametrize("width", [0.5, 1.0, 1.5, 2.0])
def test_dyshuffle_splits_three_to_one(width: float) -> None:
    model = DyShuffleNetV2(num_classes=3, in_chans=1, width=width).eval()
    shapes = {}
    for site in layer_sites(model):
        if site.role == "depthwise" and not site.name.endswith("0.branch2.3"):
            conv = model.get_submodule(site.name)
            shapes[site.name.split(".")[0]] = (conv.out_channels, conv.groups)
    stages = {0.5: (48, 96, 192), 1.0: (120, 232, 464), 1.5: (176, 352, 704), 2.0: (248, 488, 976)}[width]
    assert shapes == {f"stage{n}": (c // 4, c // 8) for n, c in zip((2, 3, 4), stages, strict=True)}
    assert model(torch.zeros(2, 1, 64, 96)).shape == (2, 3)


def test_the_passing_channels_of_a_dyshuffle_unit(seed: int) -> None:
    unit = DyShuffleNetV2(width=0.5).stage2[1].eval()
    x = torch.randn(1, 48, 4, 4)
    y = unit(x)
    # Channel c of the concatenation lands at (c % 12) * 4 + c // 12; the first 36 are the input's own.
    moved = torch.tensor([(c % 12) * 4 + c // 12 for c in range(36)])
    assert torch.equal(y[:, moved], x[:, :36])


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize(
    "name", ["mobilenetv3_small", "mobilenetv3_large_075", "mnasnet_050", "shufflenetv2_150", "convnext_tiny"]
)
def test_other_bases_take_classes_and_channels(name: str) -> None:
    with torch.device("meta"):
        model = build_base(name, num_classes=7, in_chans=5).eval()
        assert model(torch.zeros(1, 5, 64, 64)).shape == (1, 7)


@pytest.mark.needs("torchvision")
def test_bad_bases() -> None:
    with pytest.raises(ValueError, match="unknown base network 'resnet19'; did you mean 'resnet18'"):
        build_base("resnet19")
    with pytest.raises(ValueError, match=r"ShuffleNetV2 has these widths: .*got 'shufflenetv2_075'"):
        build_base("shufflenetv2_075")
    with pytest.raises(ValueError, match="a depth factor is for efficientnet_b0"):
        build_base("efficientnet_b1_depth110")
    with pytest.raises(ValueError, match="width must be one of ShuffleNetV2's: 0.5, 1, 1.5, 2, got 0.75"):
        DyShuffleNetV2(width=0.75)
    with pytest.raises(ValueError, match="depth must be one of 18, 34, 50, 101, 152, got 20"):
        DyResNet(20)
    for build in (lambda: DyMobile(width=0), lambda: DyMobile(num_classes=0)):
        with pytest.raises(ValueError, match="must be"):
            build()


def test_names_come_apart() -> None:
    assert all(parse_name(name) for name in listed_names())
    assert len(set(listed_names())) == len(listed_names())
    for name in (
        "condconv16_resnet34",
        "odconv2_resnet101",
        "dyconv4_mobilenetv2_140",
        "dyconv3_resnet26_cifar",
    ):
        assert parse_name(name) is not None, name
    for name in (
        "condconv_resnet18",
        "dcd8_resnet18",
        "odconv0_resnet18",
        "condconv8_vgg11",
        "dynconv_resnet8_cifar",
    ):
        assert parse_name(name) is None, name
